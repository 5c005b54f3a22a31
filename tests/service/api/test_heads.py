"""A head that was parsed once is looked up the next time, and asks for what the parser would find in it."""

import asyncio
import gc
import io
import re
import socket
from itertools import compress

import numpy as np
import pytest
from PIL import Image

from service.api import heads
from service.api.context import Call
from service.api.direct import Direct
from service.api.heads import MOST_BYTES, MOST_KNOWN, Heads
from service.inference.batcher import Batcher
from service.inference.jobs import Again
from service.server import limits as protocol
from tests.ppca_bundle import LATENT_DIM
from tests.service.api.test_direct import ROW, answers, raw
from tests.service.api.test_express import JSON, NPY
from tests.service.http import APPS, npy, serving

HEAD = b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n"


def known(*requests, size=3):
    found = Heads()
    for request in requests:
        found.remember(request, "plan", size)
    return found


def test_the_same_head_with_a_whole_body_is_found():
    assert known(HEAD + b"abc").find(HEAD + b"xyz") == (("plan", 3, None), b"xyz")
    assert known(HEAD, size=0).find(HEAD) == (("plan", 0, None), b"")


@pytest.mark.parametrize(
    "data",
    [
        HEAD,
        HEAD[:-1],
        HEAD + b"ab",
        HEAD + b"abcd",
        HEAD.replace(b"host", b"Host") + b"abc",
        b"\r\n" + HEAD + b"abc",
        b"abc",
        b"",
    ],
)
def test_all_else_is_for_the_parser(data):
    assert known(HEAD + b"abc").find(data) is None


@pytest.mark.parametrize(
    "request_",
    [
        b"\r\n" + HEAD + b"abc",  # what stands before the request is none of it
        HEAD.replace(b"x\r\n", b"x\n") + b"abc",  # a line end that another parser may read otherwise
        HEAD.replace(b"\r\n", b"\n") + b"\r\n\r\nabc",
        HEAD.replace(b"host", b"X-Request-ID") + b"abc",
        HEAD.replace(b"x\r", b"x" * MOST_BYTES + b"\r") + b"abc",
        HEAD.replace(b"POST", b"PUT") + b"abc",
    ],
)
def test_what_may_be_read_in_two_ways_is_not_remembered(request_):
    found = Heads()
    for size in range(len(request_)):
        found.remember(request_, "plan", size)
    assert not found._known


@pytest.mark.parametrize("more", [b"\r\n", b"\r\n\r\n", b"P", HEAD])
def test_what_stands_behind_a_request_is_none_of_it(more):
    assert not known(HEAD + b"abc" + more)._known


def test_the_oldest_heads_are_forgotten():
    numbered = [HEAD.replace(b"/a", b"/%d" % i) + b"abc" for i in range(MOST_KNOWN + 1)]
    found = known(*numbered)
    assert found.find(numbered[0]) is None
    assert found.find(numbered[1]) == found.find(numbered[-1]) == (("plan", 3, None), b"abc")


def test_a_head_that_is_used_stays():
    first, *others = [HEAD.replace(b"/a", b"/%d" % i) + b"abc" for i in range(2 * MOST_KNOWN)]
    found = known(first)
    for each in others:
        assert found.find(first) is not None
        found.remember(each, "plan", 3)
    assert found.find(others[0]) is None


@pytest.fixture(autouse=True)
def all_are_short(monkeypatch):
    """However slow this machine is."""
    monkeypatch.setattr(Batcher, "is_short", lambda self, key, rows: True)


@pytest.fixture
def looked_up(monkeypatch):
    """Bodies of the requests that were answered by a head that was known."""
    bodies, kept = [], protocol.GuardedProtocol._take_known

    def told(self, data):
        taken = kept(self, data)
        if taken:
            bodies.append(data.partition(b"\r\n\r\n")[2])
        return taken

    monkeypatch.setattr(protocol.GuardedProtocol, "_take_known", told)
    return bodies


@pytest.fixture
def connect(ppca_root):
    """A function that opens a connection to a server of its own: (socket, stream)."""
    opened = []
    with serving(ppca_root, header_timeout=0.5) as client:

        def connected():
            made = socket.create_connection((client.base_url.host, client.base_url.port), 10)
            opened.append(made)
            return made, made.makefile("rb")

        connected.client = client
        yield connected
        for made in opened:
            made.close()


def asked(connect, *requests):
    """The answers (head, body) to requests that are sent one after the other over one connection."""
    connection, stream = connect()
    found = []
    for request in requests:
        connection.sendall(request)
        found += answers(stream, 1)
    return found


def test_a_known_head_is_answered_as_an_unknown_one(connect, looked_up):
    other = bytes(range(len(ROW)))
    first, again, third = asked(connect, raw(), raw(), raw(other))
    assert looked_up == [ROW, other]
    assert first[1] == again[1] != third[1]
    assert asked(connect, raw(other, accept_encoding="identity"))[0][1] == third[1]
    heads_ = [re.sub(rb"(?<=x-request-id: )\w+|date: [^\r]*", b"", head) for head, _ in (first, again)]
    assert heads_[0] == heads_[1]
    ids = [re.search(rb"x-request-id: (\w+)", head)[1] for head, _ in (first, again, third)]
    assert len({*ids}) == 3
    text = connect.client.get("/metrics").text
    assert 'route="/v1/models/{model}/encode",status="200"} 4.0' in text


def test_heads_are_known_to_all_connections(connect, looked_up):
    asked(connect, raw())
    assert asked(connect, raw())[0][0].startswith(b"HTTP/1.1 200")
    assert looked_up == [ROW]


def test_a_known_head_that_asks_for_a_wrong_body_is_refused_in_words(connect, looked_up):
    good, bad = raw(accept="application/json"), raw(bytes(7), accept="application/json")
    assert asked(connect, good, bad, bad)[1][0].startswith(b"HTTP/1.1 422")
    (_, first), (_, second) = asked(connect, bad, bad)
    assert first.partition(b"request_id")[0] == second.partition(b"request_id")[0]
    assert b"a multiple of" in first
    assert looked_up == []


@pytest.mark.parametrize("cut", [1, 30, -len(ROW), -1])
def test_a_known_head_that_comes_in_pieces_is_read_by_the_parser(connect, looked_up, cut):
    first = asked(connect, raw())[0]
    connection, stream = connect()
    for _ in range(2):
        connection.sendall(raw()[:cut])
        assert connect.client.get("/livez").status_code == 200  # it has been read
        connection.sendall(raw()[cut:])
        assert answers(stream, 1)[0][1] == first[1]
    assert looked_up == []
    connection.sendall(raw())
    assert answers(stream, 1)[0][1] == first[1]
    assert looked_up == [ROW]


def test_several_known_requests_at_once_are_answered_in_their_order(connect, looked_up):
    other = bytes(range(len(ROW)))
    first, second = asked(connect, raw(), raw(other))
    connection, stream = connect()
    connection.sendall(raw() + raw(other) + raw())
    assert [body for _, body in answers(stream, 3)] == [first[1], second[1], first[1]]
    connection.sendall(raw(other))
    assert answers(stream, 1)[0][1] == second[1]


def test_a_known_head_inside_a_body_is_a_body(connect, looked_up):
    """The parser waits for the rest of a request: what comes is none of its own, whatever it looks like."""
    (_, expected), *_ = asked(connect, raw())
    connection, stream = connect()
    request = raw(ROW * 20)
    connection.sendall(request[: -len(raw())])
    assert connect.client.get("/livez").status_code == 200
    connection.sendall(raw())
    (head, body), *_ = answers(stream, 1)
    assert head.startswith(b"HTTP/1.1 200")
    assert len(body) > len(expected)
    assert looked_up == []


def test_a_request_that_closes_its_connection_is_never_remembered(connect, looked_up):
    for _ in range(2):
        connection, stream = connect()
        connection.sendall(raw(connection="close"))
        assert b"connection: close" in stream.read()
    assert looked_up == []


def test_a_known_request_ends_the_wait_for_headers_and_an_unfinished_one_begins_it(connect, looked_up):
    asked(connect, raw())
    connection, stream = connect()
    connection.sendall(raw())
    answers(stream, 1)
    assert looked_up == [ROW]
    connection.sendall(raw()[:20])
    assert stream.read().startswith(b"HTTP/1.1 408")


def test_a_connection_whose_first_head_is_known_stays_open_until_it_is_idle_for_long(connect, looked_up):
    """It is not ended when its headers would have had to be there: what is read is no 408."""
    asked(connect, raw())
    connection, stream = connect()
    connection.sendall(raw())
    answers(stream, 1)
    assert looked_up == [ROW]
    assert stream.read() == b""


@pytest.fixture
def hurried(monkeypatch):
    """Connections, once for each request that was taken; they are idle for long after 0.2 s."""
    connections, enter = [], Direct._enter

    def told(self, connection, *given):
        connection.timeout_keep_alive = 0.2
        connections.append(connection)
        return enter(self, connection, *given)

    monkeypatch.setattr(Direct, "_enter", told)
    return connections


def test_a_connection_is_not_idle_while_a_known_request_is_under_way(connect, looked_up, hurried, monkeypatch, caplog):
    held, go_on = [], Batcher._go_on
    connection, stream = connect()
    connection.sendall(raw())
    answers(stream, 1)
    monkeypatch.setattr(Batcher, "_go_on", lambda *given: held.append((asyncio.get_running_loop(), given)))
    connection.sendall(raw())
    while not looked_up or hurried[-1].timeout_keep_alive_task is not None:  # it has been looked at
        assert connect.client.get("/livez").status_code == 200
    monkeypatch.setattr(Batcher, "_go_on", go_on)
    loop, given = held[-1]
    loop.call_soon_threadsafe(go_on, *given)
    answers(stream, 1)
    assert stream.read() == b""
    assert hurried[-1].timeout_keep_alive_task is None
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_connection_is_idle_from_its_last_answer_on(connect, hurried):
    connection, stream = connect()
    connection.sendall(raw())
    answers(stream, 1)
    first = hurried[0].timeout_keep_alive_task
    hurried[0]._idle_since += 10.0  # as if it had been answered later
    while first is hurried[0].timeout_keep_alive_task:
        assert connect.client.get("/livez").status_code == 200
    assert hurried[0].timeout_keep_alive_task is not None
    hurried[0].timeout_keep_alive_task.cancel()
    hurried[0].timeout_keep_alive_task = None
    connection.sendall(raw())
    assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 200")
    assert stream.read() == b""


@pytest.mark.parametrize("request_", [raw(), b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_an_empty_line_is_no_request_that_is_waited_for(connect, monkeypatch, request_):
    monkeypatch.setattr(protocol.GuardedProtocol, "_look_later", quickly(protocol.GuardedProtocol._look_later))
    connection, stream = connect()
    connection.sendall(request_)
    answers(stream, 1)
    connection.sendall(b"\r\n")
    assert stream.read() == b""


def quickly(look_later):
    """A connection is idle for long after 0.2 s."""

    def told(connection, seconds):
        connection.timeout_keep_alive = 0.2
        look_later(connection, min(seconds, 0.2))

    return told


def test_a_connection_is_not_idle_while_a_request_arrives(connect, hurried, monkeypatch):
    """It has begun before the answer to the one before was there."""
    held, go_on = [], Batcher._go_on
    monkeypatch.setattr(Batcher, "_go_on", lambda *given: held.append((asyncio.get_running_loop(), given)))
    connection, stream = connect()
    connection.sendall(raw() + raw()[:20])
    while not held or not hurried[-1]._in_message:
        assert connect.client.get("/livez").status_code == 200
    monkeypatch.setattr(Batcher, "_go_on", go_on)
    loop, given = held[-1]
    loop.call_soon_threadsafe(go_on, *given)
    answers(stream, 1)
    assert hurried[-1]._idle_since is None
    connection.sendall(raw()[20:])
    answers(stream, 1)
    assert stream.read() == b""


def test_a_known_request_waits_for_the_answer_before_it(connect, looked_up, monkeypatch):
    (_, expected), *_ = asked(connect, raw())
    held, go_on = [], Batcher._go_on
    monkeypatch.setattr(Batcher, "_go_on", lambda *given: held.append((asyncio.get_running_loop(), given)))
    connection, stream = connect()
    for _ in range(2):
        connection.sendall(raw())
        while not looked_up:
            assert connect.client.get("/livez").status_code == 200
    assert connect.client.get("/livez").status_code == 200
    monkeypatch.setattr(Batcher, "_go_on", go_on)
    loop, given = held[-1]  # there may be one of the first request, which has nothing to go on with
    loop.call_soon_threadsafe(go_on, *given)
    assert [body for _, body in answers(stream, 2)] == [expected] * 2
    assert looked_up == [ROW]


def test_a_full_store_forgets_and_answers_all_the_same(connect, looked_up, monkeypatch):
    monkeypatch.setattr(heads, "MOST_KNOWN", 1)
    asked(connect, raw(), raw(host="y"), raw(), raw(host="y"), raw(host="y"))
    assert looked_up == [ROW]


@pytest.fixture
def repeated(monkeypatch):
    """Bodies of the requests whose heads said all."""
    bodies, kept = [], Direct.repeat

    def told(self, connection, plan, again, body):
        exchange = kept(self, connection, plan, again, body)
        if exchange is not None:
            bodies.append(body)
        return exchange

    monkeypatch.setattr(Direct, "repeat", told)
    return bodies


def pictured(grey, level):
    """As PNG."""
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


def odd(request):
    """The same request by ASGI."""
    return request.replace(b"content-type", b"expect: \r\ncontent-type")


@pytest.mark.parametrize("accept", [NPY, JSON])
@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score"])
def test_a_head_that_says_all_is_answered_as_by_asgi(connect, repeated, verb, accept):
    bodies = [bytes(range(len(ROW))), ROW[::-1]]
    found = asked(connect, raw(verb=verb, accept=accept), *(raw(body, verb, accept=accept) for body in bodies))
    assert repeated == bodies
    expected = asked(connect, *(odd(raw(body, verb, accept=accept)) for body in (ROW, *bodies)))
    assert [body for _, body in found] == [body for _, body in expected]
    assert repeated == bodies


def test_latents_of_a_known_head_are_decoded_as_by_asgi(connect, repeated):
    """Of as many bytes: other latents, fewer of more bytes each, some that are no numbers, no array at all."""
    random = np.random.RandomState(0)
    rows = [random.standard_normal((4, LATENT_DIM)).astype(np.float32) for _ in range(3)]
    rows += [random.standard_normal((2, LATENT_DIM)), rows[0], rows[1], np.full_like(rows[0], np.nan)]
    bodies = [*map(npy, rows), b"x" * len(npy(rows[0]))]
    assert len({*map(len, bodies)}) == 1
    requests = [raw(body, "decode", **{"content-type": NPY}) for body in bodies]
    found, expected = asked(connect, *requests), asked(connect, *map(odd, requests))
    said = [re.sub(rb'"request_id":"[^"]*"', b"", body) for _, body in found]
    assert said == [re.sub(rb'"request_id":"[^"]*"', b"", body) for _, body in expected]
    assert [head[9:12] for head, _ in found] == [b"200"] * 6 + [b"422"] * 2
    assert repeated == [bodies[1], bodies[2], bodies[5]]


def drawing(query, accept=NPY, **headers):
    """The bytes of a request for samples."""
    named = {"host": "x", "accept": accept, **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items())
    return f"GET /v1/models/ppca/sample?{query} HTTP/1.1\r\n{lines}\r\n".encode()


@pytest.mark.parametrize("accept", [NPY, JSON, "image/png"])
def test_samples_of_a_known_head_are_drawn_as_by_asgi(connect, looked_up, repeated, accept):
    queries = ["n=3&seed=1", "n=3&seed=2", "n=3&seed=1", "n=3&seed=1&temperature=0.5", "n=3&seed=2", "n=3&seed=1"]
    found = [body for _, body in asked(connect, *(drawing(query, accept) for query in queries))]
    assert looked_up == repeated == [b""] * 3
    assert found == [body for _, body in asked(connect, *(drawing(query, accept, expect="") for query in queries))]
    assert len({*found}) == 3
    assert looked_up == [b""] * 3


GREY = [np.full((8, 8), value, np.uint8) for value in (0, 3, 77)]


@pytest.mark.parametrize("level", [0, 9])
@pytest.mark.parametrize("accept", [NPY, JSON])
def test_pictures_of_the_models_size_go_the_same_way(connect, repeated, accept, level):
    bodies = [pictured(grey, level) for grey in GREY]
    requests = [raw(body, accept=accept, **{"content-type": "image/png"}) for body in bodies]
    found = asked(connect, *requests)
    known = [len(body) in {len(before) for before in bodies[:index]} for index, body in enumerate(bodies)]
    assert repeated == list(compress(bodies, known))
    assert level or len(repeated) == 2
    expected = asked(connect, *map(odd, requests))
    assert [body for _, body in found] == [body for _, body in expected]


def test_what_the_head_does_not_tell_is_looked_at_in_each_body(connect, repeated):
    """Of a body as long another may be no array, one of other rows, or hold numbers that are no pixels."""
    rows = [
        np.full((2, 8, 8), 0.5, np.float32),
        np.full((2, 1, 8, 8), 0.5, np.float32),
        np.full((2, 8, 8), 2.0, np.float32),
    ]
    good, alike, bad = map(npy, rows)
    assert len(good) == len(alike) == len(bad)
    bodies = [good, good, alike, bad, good[:-300] + bytes(300), b"x" * len(good), good]
    requests = [raw(body, accept=JSON, **{"content-type": NPY}) for body in bodies]
    found, expected = asked(connect, *requests), asked(connect, *map(odd, requests))
    said = [re.sub(rb'"request_id":"[^"]*"', b"", body) for _, body in found]
    assert said == [re.sub(rb'"request_id":"[^"]*"', b"", body) for _, body in expected]
    assert [head[9:12] for head, _ in found] == [head[9:12] for head, _ in expected]
    assert {head[9:12] for head, _ in found} == {b"200", b"422"}
    assert b"pixels as float32 from 0 to 1" in found[3][1]
    assert repeated == [good, alike]


def test_what_would_be_resized_is_not_read_on_the_event_loop(connect, repeated):
    natural, large = npy(np.full((2, 8, 8), 0.5, np.float32)), npy(np.full((2, 16, 16), 7, np.uint8))
    assert len(large) == len(natural)
    requests = [raw(body, **{"content-type": NPY}) for body in (natural, natural, large)]
    found, expected = asked(connect, *requests), asked(connect, *map(odd, requests))
    assert [body for _, body in found] == [body for _, body in expected]
    assert repeated == [natural]


def test_a_head_does_not_tell_how_many_rows_an_array_has(ppca_root, repeated):
    """Arrays of as many bytes: two rows of float32, and eight of uint8, which are more than may be answered."""
    two, eight = npy(np.full((2, 8, 8), 0.5, np.float32)), npy(np.zeros((8, 8, 8), np.uint8))
    assert len(two) == len(eight)
    with (
        serving(ppca_root, max_numbers_out=60) as client,
        socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection,
    ):
        stream = connection.makefile("rb")
        for body, status in ((two, b"200"), (two, b"200"), (eight, b"422")):
            connection.sendall(raw(body, **{"content-type": NPY}))
            assert answers(stream, 1)[0][0][9:12] == status
    assert repeated == [two]


def test_a_picture_that_only_looks_like_the_one_before_is_read_as_any_other(connect, repeated):
    """Damaged, of another size, or not of the plain kind: of as many bytes as the first."""
    # Stored, not compressed: a line takes a byte more than its pixels, and 8·9 = 4·18.
    first, wide = (pictured(np.arange(h * w, dtype=np.uint8).reshape(h, w), 0) for h, w in ((8, 8), (4, 17)))
    bodies = [first, wide, first[:-20] + bytes(20), first]
    assert len(first) == len(wide)
    requests = [raw(body, accept=JSON, **{"content-type": "image/png"}) for body in bodies]
    found, expected = asked(connect, *requests), asked(connect, *map(odd, requests))
    assert [head[9:12] for head, _ in found] == [head[9:12] for head, _ in expected] == [b"200", b"200", b"422", b"200"]
    assert found[0][1] == found[3][1] != found[1][1]
    assert found[1][1] == expected[1][1]
    assert repeated == []


def test_a_picture_beyond_the_limit_is_refused_whatever_came_before(ppca_root, repeated):
    """Of as many bytes as one that is within it, stored as it is: 8·9 = 24·3."""
    small, large = (pictured(np.zeros((h, w), np.uint8), 0) for h, w in ((24, 2), (8, 8)))
    assert len(small) == len(large)
    with serving(ppca_root, max_image_pixels=50) as client:
        for body, status in ((large, 413), (small, 200), (small, 200), (large, 413)):
            asked_for = {"content": body, "headers": {"content-type": "image/png"}}
            assert client.post("/v1/models/ppca/encode", **asked_for).status_code == status
    assert repeated == []


def test_rows_are_counted_as_those_of_unknown_heads(connect, repeated):
    asked(connect, raw(verb="score"), raw(verb="score"), raw(verb="score"))
    assert len(repeated) == 2
    text = connect.client.get("/metrics").text
    assert 'vaeserve_images_scored_total{model="ppca"} 3.0' in text
    assert 'vaeserve_batch_size_sum{verb="score"} 3.0' in text
    assert 'vaeserve_p_value_count{model="ppca"} 3.0' in text
    assert connect.client.get("/v1/models/ppca/drift").json()["seen"] == 3


def test_they_are_refused_as_others_are(connect, repeated, monkeypatch):
    house = APPS[connect.client].state.house
    connection, stream = connect()
    connection.sendall(raw())
    answers(stream, 1)
    with monkeypatch.context() as full:
        full.setattr(house.pool, "capacity", 0)
        connection.sendall(raw())
        ((head, body),) = answers(stream, 1)
    assert head.startswith(b"HTTP/1.1 429")
    assert b"try again later" in body
    assert repeated == []
    connection.sendall(raw())
    assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 200")


def test_bodies_of_known_heads_count_into_the_memory_of_all(ppca_root, repeated, monkeypatch):
    held, kept = [], Batcher.take

    def told(self, ticket):
        held.append(ticket.direct.bodies.held)
        return kept(self, ticket)

    monkeypatch.setattr(Batcher, "take", told)
    with (
        serving(ppca_root, max_buffered_bytes=1024) as client,
        socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection,
    ):
        stream = connection.makefile("rb")
        for _ in range(40):
            connection.sendall(raw())
            assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 200")
    assert len(repeated) == 39
    assert held == [0] * 40  # given back each time


def held_by(function):
    """What a closure or a partial function keeps."""
    closure = getattr(function, "__closure__", None) or ()
    return [*getattr(function, "args", ()), *(cell.cell_contents for cell in closure)]


def test_nothing_of_a_body_is_kept_with_its_head(connect, repeated):
    for verb in ("encode", "reconstruct", "score"):
        asked(connect, raw(verb=verb), raw(verb=verb))
    latents = raw(npy(np.zeros((3, LATENT_DIM), np.float32)), "decode", **{"content-type": NPY})
    asked(connect, latents, latents, drawing("n=3"), drawing("n=3"))
    assert len(repeated) == 5
    gc.collect()
    house = APPS[connect.client].state.house  # other tests' may have been left with requests under way
    assert [each for each in gc.get_objects() if type(each) is Call and each.house is house and each.body] == []
    kept = [each for each in gc.get_objects() if type(each) is Again]
    assert len(kept) >= 5
    for each in kept:
        found = [*held_by(each.run), *held_by(each.read), *held_by(each.answer)]
        assert not any(isinstance(one, np.ndarray | bytes) for one in found)
