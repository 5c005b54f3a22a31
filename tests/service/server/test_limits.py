"""What is refused below ASGI is refused in its turn; an upgrade is never made, and nothing of its request lost."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
import tracemalloc
from contextlib import ExitStack, suppress

import pytest
from hypothesis import given, settings, strategies
from structlog.testing import capture_logs

from service.server.limits import LimitedProtocol
from tests.service.http import PROBLEM_KEYS, serving
from tests.service.requests import (
    IDLE,
    LEVELS,
    NPY,
    ROW,
    answers,
    chunked,
    connected,
    metric,
    raw,
    received,
    statuses,
    turn,
    under_way,
    until,
)

LIVE = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
NOISE = b"\0noise\r\n\r\n"
UPGRADE = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQ"}
CHUNKED = b"POST /v1/encode HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
NOWHERE = b"POST /nowhere HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture(scope="module")
def client(ppca_root):
    with serving(ppca_root, header_timeout=0.3) as client:
        yield client


@pytest.fixture(scope="module")
def patient(ppca_root):
    """A server that waits for as long as a busy machine may take."""
    with serving(ppca_root, header_timeout=100, receive_timeout=100) as client:
        yield client


@pytest.fixture
def protocols(monkeypatch):
    """The server's side of each connection that is made."""
    protocols, connection_made = [], LimitedProtocol.connection_made

    def made(self, transport):
        protocols.append(self)
        connection_made(self, transport)

    monkeypatch.setattr(LimitedProtocol, "connection_made", made)
    return protocols


def hurry(client, protocols, connection):
    """From its next answer on, the connection is idle for long after 0.2 s. The client's own stays as it is."""
    peer = connection.getsockname()
    until(client, lambda: any(protocol.client == peer for protocol in protocols))
    next(protocol for protocol in protocols if protocol.client == peer).timeout_keep_alive = 0.2


VALID = {
    "octets": [raw()],
    "chunks": [chunked(ROW, b"x-trailer: 1\r\n")],
    "live": [LIVE],
    "octets, octets": [raw(), raw()],
    "octets, live": [raw(), LIVE],
    "live, octets": [LIVE, raw()],
    "chunks, octets, live": [chunked(ROW), raw(), LIVE],
    "upgrade, live": [raw(**UPGRADE), LIVE],
}
LAST = {
    "noise": (NOISE, b"400"),
    "no length": (raw(content_length="x")[: -len(ROW)], b"400"),
    "no address": (b"GET http://x:99999/ HTTP/1.1\r\nhost: x\r\n\r\n", b"400"),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
    "long headers": (b"GET / HTTP/1.1\r\na: " + b"b" * 2**16 + b"\r\n\r\n", b"431"),
    "half a head": (LIVE[:20], b"408"),
    "a broken chunk": (CHUNKED + b"z\r\n", b"400"),
}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("valid", [*VALID, "nothing"])
@pytest.mark.parametrize("kind", ["all_are_short", "all_are_long"])
def test_what_came_before_is_answered_before_a_refusal(client, request, kind, valid, last):
    request.getfixturevalue(kind)
    before = VALID.get(valid, [])
    noise, status = LAST[last]
    answered = received(client, b"".join(before) + noise)
    assert statuses(answered) == [b"200"] * len(before) + [status]
    assert_refusal(answered)
    assert under_way(client) == IDLE


def assert_refusal(answered):
    """The last answer is in the one error shape, and says that it is the last."""
    head, _, body = answered[answered.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert fields[b"content-type"] == b"application/problem+json"
    assert fields[b"connection"] == b"close"
    assert int(fields[b"content-length"]) == len(body)
    problem = json.loads(body)
    assert problem.keys() >= PROBLEM_KEYS
    assert problem["status"] == int(head.split()[1])
    assert problem["error"] == problem["detail"] != ""
    assert problem["request_id"].encode() == fields[b"x-request-id"]


@pytest.mark.parametrize("last", ["noise", "no address", "many headers", "half a head"])
def test_a_refusal_waits_for_the_answers_that_are_due(client, all_are_long, stuck, last):
    with connected(client, raw() + raw() + LAST[last][0]) as (_, stream):
        until(client, lambda: stuck.rows)
        received(client, LIVE[:20])  # for as long as headers may take
        stuck.release()
        answered = stream.read()
    assert statuses(answered) == [b"200", b"200", LAST[last][1]]


HEADS = {
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /livez HTTP/1.1\r\nhost: x\r\nhost: x\r\n\r\n",
    "two hosts of 1.0": b"GET /livez HTTP/1.0\r\nhost: x\r\nHost: y\r\n\r\n",
    "a host of two words": b"GET /livez HTTP/1.1\r\nhost: x y\r\n\r\n",
    "a host with a path": b"GET /livez HTTP/1.1\r\nhost: x/y\r\n\r\n",
    "a host with a user": b"GET /livez HTTP/1.1\r\nhost: a@x\r\n\r\n",
    "a host and a word for a port": b"GET /livez HTTP/1.1\r\nhost: x:http\r\n\r\n",
    "2.0": LIVE.replace(b"1.1", b"2.0"),
    "1.2": LIVE.replace(b"1.1", b"1.2"),
    "0.9": LIVE.replace(b"1.1", b"0.9"),
    "gzip, chunked": CHUNKED.replace(b"chunked", b"gzip, chunked") + b"1\r\na\r\n0\r\n\r\n",
    "gzip and chunked": CHUNKED.replace(b"transfer", b"transfer-encoding: gzip\r\ntransfer") + b"0\r\n\r\n",
    "identity": CHUNKED.replace(b"chunked", b"identity"),
    "chunked twice": CHUNKED.replace(b"chunked", b"chunked, chunked") + b"0\r\n\r\n",
    "chunked of 1.0": CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n",
    "chunked, and a length": CHUNKED.replace(b"transfer", b"content-length: 1\r\ntransfer") + b"0\r\n\r\n",
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("before", [b"", LIVE])
def test_a_head_that_is_not_http_1_is_refused(client, before, head):
    answered = received(client, before + HEADS[head] + LIVE)
    assert statuses(answered) == [*[b"200"] * bool(before), b"400"]
    assert_refusal(answered)


@pytest.mark.parametrize("host", ["", "x", "x:80", "x:", "1.2.3.4:8000", "[::1]", "[fe80::1%25eth0]:8000", "a_b-c.d~"])
def test_a_host_may_be_any_name_or_address(client, host):
    for version in ("1.1", "1.0"):
        request = f"GET /livez HTTP/{version}\r\nhost: {host}\r\nconnection: close\r\n\r\n"
        assert statuses(received(client, request.encode())) == [b"200"]
    assert statuses(received(client, b"GET /livez HTTP/1.0\r\n\r\n")) == [b"200"]


@pytest.mark.parametrize("coding", ["Chunked", "chunked ", "CHUNKED"])
def test_chunked_may_be_written_in_any_case(client, coding):
    request = chunked(ROW).replace(b"chunked", coding.encode()).replace(b"host", b"connection: close\r\nhost")
    assert statuses(received(client, request)) == [b"200"]


@pytest.mark.parametrize("size", [0, 12_000, 25_000, 32_600])
@pytest.mark.parametrize("body", [0, 64, 3200])
@settings(max_examples=25, deadline=None)
@given(data=strategies.data())
def test_what_arrives_with_a_request_counts_as_the_next(patient, size, body, data):
    """However the bytes of requests that are valid are cut, also some bytes of the next in one read with the last."""
    one = (
        raw(bytes(body), padding="x" * size)
        if body
        else LIVE.replace(b"host", b"padding: " + b"x" * size + b"\r\nhost")
    )
    stream_, cuts = one * 3, sorted(data.draw(strategies.lists(strategies.integers(1, 3 * len(one) - 1), max_size=4)))
    pieces = [stream_[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream_)], strict=True)]
    with connected(patient) as (connection, stream):
        for piece in pieces:
            turn(patient)
            connection.sendall(piece)
        assert [head[9:12] for head, _ in answers(stream, 3)] == [b"200"] * 3


@pytest.mark.parametrize("last", ["noise", "many headers"])
def test_nothing_is_counted_twice_or_left_under_way(client, last, capsys):
    starts = [f'vaeserve_requests_total{{method="{method}",route="{route}",status="200"}}' for method, route in COUNTED]
    before = [metric(client, start) for start in starts]
    for _ in range(3):
        received(client, raw() + raw() + b"HEAD" + LIVE[3:] + LAST[last][0])
    assert [metric(client, start) - then for start, then in zip(starts, before, strict=True)] == [6, 3]
    assert_no_errors(capsys)


COUNTED = ("POST", "/v1/models/{model}/encode"), ("HEAD", "/livez")


def assert_no_errors(capsys):
    """In the log."""
    out, err = capsys.readouterr()
    assert "[error" not in out + err
    assert "[warning" not in out + err


def test_answers_arrive_whatever_is_sent_behind_a_refusal(client):
    """A connection that is closed on bytes that nobody has read is reset, and its answers with it."""
    requests = LIVE + raw() + LIVE
    assert statuses(received(client, requests + NOISE + bytes(2**22))) == [b"200"] * 3 + [b"400"]
    much = b"%x\r\n%b\r\n" % (2**18, bytes(2**18))  # of which uvicorn reads no more than the route does
    assert statuses(received(client, CHUNKED + much + b"z\r\n" + bytes(2**22))) == [b"400"]


def test_a_request_whose_body_is_refused_is_not_answered_for_another_reason(ppca_root, capsys):
    with serving(ppca_root) as client, connected(client, CHUNKED) as (connection, stream):
        until(client, lambda: under_way(client)[2] == 2)
        connection.sendall(b"z\r\n")
        assert statuses(stream.read()) == [b"400"]
        until(client, lambda: under_way(client) == IDLE)
    assert_no_errors(capsys)


def test_nothing_is_answered_behind_a_refusal(client):
    assert statuses(received(client, raw() + NOISE + raw())) == [b"200", b"400"]


def test_a_request_is_answered_once_whatever_becomes_of_its_body(client):
    with connected(client, NOWHERE + b"transfer-encoding: chunked\r\n\r\n") as (connection, stream):
        assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 404")
        connection.sendall(b"z\r\n")
        assert stream.read() == b""


@pytest.mark.parametrize("rest", [b"", b"x", b"x" * 7])
def test_a_connection_whose_body_comes_late_or_never_ends_after_an_early_answer(ppca_root, protocols, rest):
    with serving(ppca_root, receive_timeout=0.3) as client, connected(client) as (connection, stream):
        hurry(client, protocols, connection)
        connection.sendall(NOWHERE + b"content-length: 10\r\n\r\nabc")
        assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 404")
        connection.sendall(rest)
        assert stream.read() == b""


@pytest.mark.parametrize(
    "rest", [b"%x\r\n%b\r\n" % (2**16, bytes(2**16)), b"x: y\r\n" * 2**12, b"1;%b\r\nx\r\n" % bytes(2**12)]
)
def test_a_body_that_never_ends_is_ended_after_an_early_answer(ppca_root, rest):
    """Chunks, trailers or chunk extensions: however fast they come, and although nobody waits for them."""
    with (
        serving(ppca_root, receive_timeout=1e6, max_body_bytes=2**20) as client,
        connected(client) as (connection, stream),
    ):
        connection.sendall(NOWHERE + b"transfer-encoding: chunked\r\n\r\n")
        assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 404")
        sent = b"0\r\n" * rest.startswith(b"x") + rest
        with suppress(OSError):  # closed on what is still under way
            while True:
                connection.sendall(sent)
                sent = rest
        with suppress(ConnectionResetError):
            assert stream.read() == b""
        until(client, lambda: under_way(client) == IDLE)


@pytest.mark.parametrize("request_", [raw(), LIVE])
def test_an_empty_line_is_no_request_that_is_waited_for(client, protocols, request_):
    with connected(client) as (connection, stream):
        hurry(client, protocols, connection)
        connection.sendall(request_)
        answers(stream, 1)
        connection.sendall(b"\r\n")
        assert stream.read() == b""


def test_a_connection_is_not_idle_while_a_request_is_under_way(ppca_root, protocols, all_are_long, stuck):
    with serving(ppca_root) as client, connected(client) as (connection, stream), connected(client) as (other, closed):
        hurry(client, protocols, connection)
        hurry(client, protocols, other)
        connection.sendall(LIVE)
        answers(stream, 1)
        connection.sendall(raw())
        until(client, lambda: stuck.rows)
        other.sendall(LIVE)
        answers(closed, 1)
        assert closed.read() == b""  # for as long as a connection may be idle
        stuck.release()
        assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 200")
        assert stream.read() == b""


def test_a_body_that_does_not_arrive_is_refused(ppca_root):
    with serving(ppca_root, receive_timeout=0.3) as client:
        for before in (b"", LIVE, raw()):
            for part in (raw()[:-1], CHUNKED, CHUNKED + b"1\r\na", chunked(ROW, b"x-trailer: 1\r\n")[:-2]):
                answered = received(client, before + part)
                assert statuses(answered) == [*[b"200"] * bool(before), b"408"]
                assert b"receive_timeout" in answered
                assert_refusal(answered)
        assert under_way(client) == IDLE


def test_a_pipelined_body_that_does_not_arrive_is_refused_in_its_turn(ppca_root, all_are_long, stuck):
    with serving(ppca_root, receive_timeout=0.3) as client, connected(client, raw() + raw()[:-1]) as (_, stream):
        until(client, lambda: stuck.rows)
        assert statuses(received(client, raw()[:-1])) == [b"408"]  # for as long as a body may take
        stuck.release()
        answered = stream.read()
        assert statuses(answered) == [b"200", b"408"]
        assert_refusal(answered)
        assert under_way(client) == IDLE


@pytest.mark.parametrize("before", [b"", LIVE])
@pytest.mark.parametrize("rest", [raw()[:-1], CHUNKED + b"1\r\na", chunked(ROW, b"x-trailer: 1\r\n")[:-2]])
def test_a_body_that_is_on_its_way_is_ended_with_the_server(ppca_root, before, rest):
    """One slow body does not delay the stop until it, or its time, is over."""
    with ExitStack() as held:
        with serving(ppca_root, receive_timeout=1e6, request_timeout=1e6) as client:
            _, stream = held.enter_context(connected(client, before + rest))
            until(client, lambda: under_way(client)[2] == 2)
            started = time.monotonic()
        assert time.monotonic() - started < 30
        answered = stream.read()
    assert statuses(answered) == [*[b"200"] * bool(before), b"503"]
    assert_refusal(answered)


@pytest.mark.parametrize("rest", [LIVE[:20], NOWHERE + b"content-length: 10\r\n\r\na"])
def test_what_will_not_be_answered_does_not_delay_the_end_of_the_server(ppca_root, rest):
    """Half a head, and the rest of a body whose answer was early."""
    with ExitStack() as held:
        with serving(ppca_root, receive_timeout=1e6, header_timeout=1e6, request_timeout=1e6) as client:
            _, stream = held.enter_context(connected(client, LIVE + rest))
            answers(stream, 1 + rest.startswith(b"POST"))
        assert stream.read() == b""


def test_what_came_whole_is_answered_by_a_server_that_ends(ppca_root, all_are_long, stuck, monkeypatch):
    shutdown = LimitedProtocol.shutdown
    monkeypatch.setattr(LimitedProtocol, "shutdown", lambda self: (shutdown(self), stuck.release()))
    with ExitStack() as held:
        with serving(ppca_root, receive_timeout=1e6, request_timeout=1e6) as client:
            _, stream = held.enter_context(connected(client, raw() + raw()[:-1]))
            until(client, lambda: stuck.rows)
        assert statuses(stream.read()) == [b"200", b"503"]


def ids_of(answer):
    """Request ids of the refusal that ends an answer: its header's and its body's."""
    head, _, body = answer[answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    return re.search(rb"x-request-id: (\S+)", head)[1].decode(), json.loads(body)["request_id"]


@pytest.mark.parametrize("before", [b"", raw()])
@pytest.mark.parametrize(
    "late", [raw(x_request_id="mine")[:-1], CHUNKED.replace(b"host: x", b"host: x\r\nx-request-id: mine") + b"z\r\n"]
)
def test_a_refused_body_has_the_id_of_its_request(ppca_root, before, late):
    with serving(ppca_root, receive_timeout=0.3) as client:
        answered = received(client, before + late)
        assert statuses(answered)[-1] in (b"408", b"400")
        assert ids_of(answered) == ("mine", "mine")
        until(client, lambda: under_way(client) == IDLE)


@pytest.mark.parametrize("late", [raw()[:-1], CHUNKED + b"z\r\n"])
def test_a_refused_body_without_an_id_has_one_that_the_log_tells_of_it_and_of_its_connection(ppca_root, late):
    with capture_logs() as lines, serving(ppca_root, receive_timeout=0.3) as client:
        header, body = ids_of(received(client, late))
        until(client, lambda: under_way(client) == IDLE)
    assert header == body
    assert [line["event"] for line in lines if line.get("request_id") == header] == ["connection refused", "request"]


@pytest.mark.parametrize("cut", [-1, -len(ROW), 40])
def test_a_client_is_not_late_while_the_server_does_not_read(ppca_root, all_are_long, stuck, cut):
    """Pipelined requests wait in the socket: the rest of the third is there, but not asked for."""
    settings = {"receive_timeout": 0.5, "header_timeout": 0.5}
    with serving(ppca_root, **settings) as client, connected(client, raw() * 2 + raw()[:cut]) as (connection, stream):
        until(client, lambda: stuck.rows)
        connection.sendall(raw()[cut:])
        assert statuses(received(client, raw()[:-1])) == [b"408"]  # for as long as bodies and headers may take
        stuck.release()
        assert [head[9:12] for head, _ in answers(stream, 3)] == [b"200"] * 3


@pytest.mark.parametrize("body", [40_000, 200])
def test_a_body_does_not_count_as_headers_of_the_next_request(client, body):
    """They may arrive together."""
    for part in (20, len(LIVE) - 1):
        with connected(client, raw(bytes(body)) + LIVE[:part]) as (connection, stream):
            assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 422" if body % 64 else b"HTTP/1.1 200")
            connection.sendall(LIVE[part:])
            assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("before", [b"", LIVE, raw()])
def test_headers_without_an_end_are_refused(client, before):
    start = b"GET / HTTP/1.1\r\n"
    for line in (b"GET /" + b"a" * 2**20, start + b"x: " + b"a" * 2**20, start + b"a:b\r\n" * 2**16):
        answered = received(client, before + line)
        assert statuses(answered) == [*[b"200"] * bool(before), b"431"]
        assert_refusal(answered)


@pytest.mark.parametrize(("count", "padding", "most_waiting"), [(6000, 200, 8), (10_000, 0, 64)])
def test_what_pipelines_waits_in_the_socket(ppca_root, all_are_long, stuck, protocols, count, padding, most_waiting):
    """However many requests come behind one that takes long, few are made of the bytes of one read."""
    request = LIVE.replace(b"host: x", b"host: x\r\nx-padding: " + b"x" * padding) if padding else LIVE
    with serving(ppca_root, receive_timeout=0.3) as client, connected(client) as (connection, stream):
        hurry(client, protocols, connection)
        waiting = next(protocol for protocol in protocols if protocol.timeout_keep_alive < 1)
        sender = threading.Thread(target=connection.sendall, args=[raw() + request * count])
        sender.start()
        until(client, lambda: stuck.rows)
        received(client, raw()[:-1])  # for as long as a body may take: the client of the first is watched by then
        most = [len(waiting.pipeline)]
        stuck.release()
        for _ in range(count + 1):
            assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 200")
            most.append(len(waiting.pipeline))
        sender.join()
        assert 0 < max(most) <= most_waiting
        assert under_way(client) == IDLE


def test_nothing_is_kept_of_a_connection_that_its_client_resets(client, protocols, monkeypatch):
    """As proxies end idle ones: uvicorn's timer would hold the request for as long as a connection may be idle."""
    lost, connection_lost = [], LimitedProtocol.connection_lost

    def noted(self, error):
        connection_lost(self, error)
        lost.append((self.client, error, self.timeout_keep_alive_task))

    monkeypatch.setattr(LimitedProtocol, "connection_lost", noted)
    with connected(client, raw()) as (connection, stream):
        answers(stream, 1)
        peer = connection.getsockname()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    until(client, lambda: any(who == peer for who, *_ in lost))
    ((error, timer),) = [rest for who, *rest in lost if who == peer]
    assert isinstance(error, ConnectionResetError)
    assert timer is None


def test_what_pipelines_behind_a_read_that_was_parsed_in_part_is_refused_in_its_turn(client):
    """The rest of a read waits as it came: half a head of it is late, noise is noise, and a head is a head."""
    assert statuses(received(client, LIVE * 500 + LIVE[:20])) == [b"200"] * 500 + [b"408"]
    assert statuses(received(client, LIVE * 500 + NOISE)) == [b"200"] * 500 + [b"400"]
    assert statuses(received(client, LIVE * 500 + raw() * 20 + NOISE)) == [b"200"] * 520 + [b"400"]


@pytest.mark.parametrize("cut", [0, 20, -len(ROW), -1])
@pytest.mark.parametrize("more", [{}, {"expect": ""}])
def test_an_upgrade_is_not_made_and_its_body_read(client, cut, more):
    plain = received(client, raw(connection="close", accept=NPY, **more))
    request = raw(**{**UPGRADE, **more})
    for pieces in ([request[:cut], request[cut:]] if cut else [request], [request + raw(connection="close")]):
        with connected(client) as (connection, stream):
            for index, piece in enumerate(pieces):
                if index:
                    turn(client)
                connection.sendall(piece)
            ((head, body),) = answers(stream, 1)
        assert head.startswith(b"HTTP/1.1 200")
        assert plain.endswith(body)


def test_a_body_behind_an_upgrade_is_no_request(client):
    body = LIVE.ljust(len(ROW), b"x")
    request = raw(body, **UPGRADE)
    answered = received(client, request[: -len(body)], body + LIVE.replace(b"host: x", b"host: x\r\nconnection: close"))
    assert statuses(answered) == [b"200", b"200"]
    assert answered.endswith(b"}")  # of /livez


def test_many_requests_with_upgrades_on_one_connection(client):
    requests = [raw(LEVELS[i].tobytes(), **UPGRADE) for i in range(4)]
    plain = [raw(LEVELS[i].tobytes()) for i in range(4)]
    pairs = []
    with connected(client) as (connection, stream):
        for sent in (requests, plain):
            connection.sendall(b"".join(sent))
            pairs.append([body for _, body in answers(stream, 4)])
    assert pairs[0] == pairs[1]


def test_very_many_requests_with_upgrades_at_once(client):
    upgrade = LIVE.replace(b"host: x", b"connection: upgrade\r\nupgrade: h2c\r\nhost: x")
    assert statuses(received(client, upgrade * 700 + NOISE)) == [b"200"] * 700 + [b"400"]


def test_headers_count_that_ask_for_an_upgrade(client):
    lines = b"".join(b"upgrade: %d\r\n" % i for i in range(200))
    upgrade = b"connection: upgrade\r\n"
    assert statuses(received(client, b"GET /livez HTTP/1.1\r\nhost: x\r\n" + upgrade + lines + b"\r\n")) == [b"431"]


@pytest.mark.parametrize("before", [b"", LIVE])
@pytest.mark.parametrize("target", [b"a:1", b"/livez"])
def test_a_tunnel_is_refused(client, before, target):
    answered = received(client, before + b"CONNECT " + target + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"hello")
    first, *others = [status[:1] for status in statuses(answered)][bool(before) :]
    assert first == b"4"
    assert set(others) <= {b"4"}  # what follows is not read


class Seen:
    """Middleware that keeps the headers of each request, as they stand when it has been answered."""

    def __init__(self):
        self.headers = []

    def middleware(self, app):
        async def answer(scope, receive, send):
            await app(scope, receive, send)
            if scope["type"] == "http" and scope["method"] == "POST":
                self.headers.append([name for name, _ in scope["headers"]])

        return answer


@pytest.mark.parametrize("cut", [0, -2, -20, 40])
def test_trailers_are_dropped(ppca_root, cut):
    seen = Seen()
    request = chunked(ROW, b"x-trailer: 1\r\naccept: application/json\r\n" * 40)
    with serving(ppca_root, lambda app: app.add_middleware(seen.middleware)) as client:
        plain = received(client, raw(connection="close"))
        with connected(client, request[:cut]) as (connection, stream):
            turn(client)
            connection.sendall(request[cut:] + raw())
            assert [body for _, body in answers(stream, 2)] == [plain[-len(answers_body(plain)) :]] * 2
        until(client, lambda: len(seen.headers) == 3)
    assert seen.headers[1] == [b"host", b"content-type", b"accept", b"transfer-encoding"]
    assert seen.headers[2] == [b"host", b"content-type", b"accept", b"content-length"]


def answers_body(answered):
    return answered.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("line", [b"x: y\r\n" * 1000, b"x" * 6000])
def test_trailers_do_not_fill_the_memory(ppca_root, protocols, line):
    """However many of them come, or how long: that is over when the body should have arrived, at the latest."""
    most, traced = [], []
    with serving(ppca_root, receive_timeout=3) as client, connected(client, chunked(ROW)[:-2]) as (connection, stream):
        until(client, lambda: any(protocol.cycle for protocol in protocols))
        waiting = protocols[-1]
        tracemalloc.start()
        try:
            for _ in range(400):
                connection.sendall(line * 8)
                most.append(len(waiting.headers))
            turn(client)
            traced.append(tracemalloc.get_traced_memory()[0])
        except OSError:  # refused
            pass
        finally:
            tracemalloc.stop()
        assert statuses(stream.read()) in ([b"408"], [b"431"], [b"400"])
    assert max(most) <= 2**18 / len(b"x: y\r\n")
    assert not traced or max(traced) < 2**22
