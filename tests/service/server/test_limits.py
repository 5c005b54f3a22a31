"""What is refused below ASGI is refused in its turn; an upgrade is never made, and nothing of its request lost."""

import socket

import pytest

from service.inference.batcher import Batcher
from service.server.limits import GuardedProtocol
from service.server.transport import GatheringTransport
from tests.service.api.test_direct import LEVELS, NPY, ROW, answers, raw
from tests.service.http import APPS, serving

LIVE = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
NOISE = b"\0noise\r\n\r\n"
UPGRADE = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQ"}


@pytest.fixture(scope="module")
def client(ppca_root):
    with serving(ppca_root, header_timeout=0.5) as client:
        yield client


@pytest.fixture(params=["short", "long"])
def kind(request, monkeypatch):
    """Whether jobs run on the event loop or on the pool."""
    monkeypatch.setattr(Batcher, "is_short", lambda self, key, rows: request.param == "short")


def asked(client, *pieces):
    """All that comes back until the server closes."""
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
        for index, piece in enumerate(pieces):
            if index:
                assert client.get("/livez").status_code == 200  # what went before has been read
            connection.sendall(piece)
        with connection.makefile("rb") as stream:
            return stream.read()


def statuses(received):
    return [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]


def encode(rows=ROW, **headers):
    return raw(rows, **headers)


def by_asgi(rows=ROW):
    return raw(rows, expect="")


VALID = {
    "direct": [encode()],
    "by ASGI": [by_asgi()],
    "live": [LIVE],
    "direct, direct": [encode(), encode()],
    "direct, live": [encode(), LIVE],
    "live, direct": [LIVE, encode()],
    "by ASGI, direct, live": [by_asgi(), encode(), LIVE],
    "live, live": [LIVE, LIVE],
}
LAST = {
    "noise": (NOISE, b"400"),
    "no length": (raw(content_length="x")[: -len(ROW)], b"400"),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
    "half a head": (LIVE[:20], b"408"),
    "a broken chunk": (b"POST /v1/encode HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nz\r\n", b"400"),
}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("valid", VALID)
def test_what_came_before_is_answered_before_a_refusal(client, kind, valid, last):
    app = APPS[client]
    noise, status = LAST[last]
    received = asked(client, b"".join(VALID[valid]) + noise)
    assert statuses(received) == [b"200"] * len(VALID[valid]) + [status]
    assert app.state.metrics._under_way == 0
    assert (app.state.house.pool.pending, app.state.direct.bodies.held) == (0, 0)


@pytest.mark.parametrize("last", ["noise", "many headers"])
def test_nothing_is_counted_twice_or_left_under_way(client, kind, last, capsys):
    before = answered(client)
    for _ in range(3):
        asked(client, encode() + encode() + LIVE + LAST[last][0])
    assert [now - then for now, then in zip(answered(client), before, strict=True)] == [6, 3]
    assert_no_errors(capsys)


def assert_no_errors(capsys):
    """In the log."""
    out, err = capsys.readouterr()
    assert "[error" not in out + err
    assert "[warning" not in out + err


def answered(client):
    lines = client.get("/metrics").text.splitlines()
    counts = dict(line.rsplit(" ", 1) for line in lines if line.startswith("vaeserve_requests_total"))
    return [
        float(next((count for name, count in counts.items() if f'{route}",status="200"' in name), 0))
        for route in ("{model}/encode", "/livez")
    ]


def test_answers_arrive_whatever_is_sent_behind_a_refusal(client, kind):
    """A connection that is closed on bytes that nobody has read is reset, and its answers with it."""
    requests = LIVE + by_asgi() + LIVE
    assert statuses(asked(client, requests + NOISE + bytes(2**22))) == [b"200"] * 3 + [b"400"]
    chunked = b"POST /v1/encode HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    much = b"%x\r\n%b\r\n" % (2**18, bytes(2**18))  # of which uvicorn reads no more than the route does
    assert statuses(asked(client, chunked + much + b"z\r\n" + bytes(2**22))) == [b"400"]


def test_a_request_whose_body_is_refused_is_not_answered_for_another_reason(ppca_root, capsys):
    with serving(ppca_root, receive_timeout=0.1) as client:
        head = b"POST /v1/encode HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
            connection.sendall(head)
            while APPS[client].state.metrics._under_way < 1:
                assert client.get("/livez").status_code == 200
            connection.sendall(b"z\r\n")
            with connection.makefile("rb") as stream:
                assert statuses(stream.read()) == [b"400"]
            while APPS[client].state.metrics._under_way:  # this one stays, and so the other might be answered
                assert client.get("/livez").status_code == 200
    assert_no_errors(capsys)


def test_nothing_is_answered_behind_a_refusal(client):
    assert statuses(asked(client, encode() + NOISE + encode())) == [b"200", b"400"]


@pytest.mark.parametrize("cut", [0, 20, -len(ROW), -1])
@pytest.mark.parametrize("more", [{}, {"expect": ""}])
def test_an_upgrade_is_not_made_and_its_body_read(client, cut, more):
    plain = asked(client, encode(connection="close", accept=NPY, **more))
    request = encode(**{**UPGRADE, **more})
    for pieces in ([request[:cut], request[cut:]] if cut else [request], [request + encode(connection="close")]):
        with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
            for index, piece in enumerate(pieces):
                if index:
                    assert client.get("/livez").status_code == 200
                connection.sendall(piece)
            with connection.makefile("rb") as stream:
                ((head, body),) = answers(stream, 1)
        assert head.startswith(b"HTTP/1.1 200")
        assert plain.endswith(body)


def test_a_body_behind_an_upgrade_is_no_request(client):
    body = LIVE.ljust(len(ROW), b"x")
    request = encode(body, **UPGRADE)
    received = asked(client, request[: -len(body)], body + LIVE.replace(b"host: x", b"connection: close"))
    assert statuses(received) == [b"200", b"200"]
    assert received.endswith(b"}")  # of /livez


def test_many_requests_with_upgrades_on_one_connection(client):
    requests = [encode(LEVELS[i].tobytes(), **UPGRADE) for i in range(4)]
    plain = [encode(LEVELS[i].tobytes()) for i in range(4)]
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
        stream = connection.makefile("rb")
        found = []
        for sent in (requests, plain):
            connection.sendall(b"".join(sent))
            found.append([body for _, body in answers(stream, 4)])
        stream.close()
    assert found[0] == found[1]


NOWHERE = b"POST /nowhere HTTP/1.1\r\nhost: x\r\n"


def test_a_request_is_answered_once_whatever_becomes_of_its_body(client):
    chunked = NOWHERE + b"transfer-encoding: chunked\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
        connection.sendall(chunked)
        stream = connection.makefile("rb")
        assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 404")
        connection.sendall(b"z\r\n")
        assert stream.read() == b""
        stream.close()


@pytest.mark.parametrize("rest", [b"", b"x", b"x" * 7])
def test_a_connection_whose_body_comes_late_or_never_is_idle_after_an_early_answer(client, monkeypatch, rest):
    look_later = GuardedProtocol._look_later
    monkeypatch.setattr(GuardedProtocol, "_look_later", lambda self, seconds: look_later(self, min(seconds, 0.2)))
    made = GuardedProtocol.connection_made

    def hurried(self, transport):
        made(self, transport)
        self.timeout_keep_alive = 0.2

    monkeypatch.setattr(GuardedProtocol, "connection_made", hurried)
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
        connection.sendall(NOWHERE + b"content-length: 10\r\n\r\nabc")
        stream = connection.makefile("rb")
        assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 404")
        connection.sendall(rest)
        assert stream.read() == b""
        stream.close()


def test_what_is_held_for_a_client_that_ends_its_side_is_looked_after(client, monkeypatch):
    closed, close = [], GatheringTransport.close
    monkeypatch.setattr(GatheringTransport, "close", lambda self: closed.append(self.is_closing()) or close(self))
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert closed[0] is False  # not by the event loop, past what looks after what is held


def test_very_many_requests_with_upgrades_at_once(client):
    upgrade = LIVE.replace(b"host: x", b"connection: upgrade\r\nupgrade: h2c\r\nhost: x")
    assert statuses(asked(client, upgrade * 700 + NOISE)) == [b"200"] * 700 + [b"400"]


def test_headers_count_that_ask_for_an_upgrade(client):
    lines = b"".join(b"upgrade: %d\r\n" % i for i in range(200))
    upgrade = b"connection: upgrade\r\n"
    assert statuses(asked(client, b"GET /livez HTTP/1.1\r\nhost: x\r\n" + upgrade + lines + b"\r\n")) == [b"431"]


@pytest.mark.parametrize("target", [b"a:1", b"/livez"])
def test_a_tunnel_is_refused(client, target):
    assert statuses(asked(client, b"CONNECT " + target + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"hello"))[0][:1] == b"4"
