"""The shortest way, past ASGI: the same answers, errors, metrics and limits, on connections of every kind."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from service.api import direct, express
from service.api.direct import MOST_KNOWN, Direct, Exchange
from service.errors import InvalidInput
from service.inference.batcher import Batcher
from service.inference.model import Model
from service.logs import get_logger
from service.server import limits as protocol
from tests.ppca_bundle import LATENT_DIM
from tests.service.api.test_express import BODIES, FASTAPI, JSON, LEVELS, NPY, OCTETS, REFUSED, counted
from tests.service.http import APPS, assert_problem, npy, send_raw, serving

ROW = LEVELS[0].tobytes()


@pytest.fixture(autouse=True)
def all_are_short(monkeypatch):
    """However slow this machine is."""
    monkeypatch.setattr(Batcher, "is_short", lambda self, key, rows: True)


@pytest.fixture(scope="module")
def client(ppca_root):
    with serving(ppca_root, max_batch=8) as client:
        yield client


@pytest.fixture
def ways(monkeypatch):
    """Names of the ways that requests took."""
    taken, enter, asked = [], Direct._enter, express.Express._asked

    def told_taken(self, *given):
        exchange = enter(self, *given)
        if exchange is not None:
            taken.append("direct")
        return exchange

    def told_asked(self, scope):
        if scope["type"] == "http" and (scope["method"] == "POST" or scope["path"].endswith("/sample")):
            taken.append("asgi")
        return asked(self, scope)

    monkeypatch.setattr(Direct, "_enter", told_taken)
    monkeypatch.setattr(express.Express, "_asked", told_asked)
    return taken


def post(client, verb, query, kind, body, accept=JSON, **headers):
    address = f"/v1/models/ppca/{verb}?{query}" if query else f"/v1/models/ppca/{verb}"
    return client.post(address, content=body, headers={"content-type": kind, "accept": accept, **headers})


def raw(body=ROW, verb="encode", version="1.1", **headers):
    """The bytes of a request, for a socket of one's own."""
    named = {"host": "x", "content-type": OCTETS, "accept": NPY, "content-length": len(body), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items())
    return f"POST /v1/models/ppca/{verb} HTTP/{version}\r\n{lines}\r\n".encode() + body


@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score"])
@pytest.mark.parametrize("name", BODIES)
def test_all_ways_lead_to_the_same_bytes(client, ways, verb, name):
    kind, body = BODIES[name]
    for accept in (JSON, NPY):
        plain = post(client, verb, "seed=0", kind, body, accept)
        others = [
            post(client, verb, "seed=0", kind, iter([body]), accept),
            post(client, verb, FASTAPI, kind, body, accept),
        ]
        for other in others:
            assert plain.status_code == other.status_code == 200, plain.text
            assert plain.content == other.content
            assert {*plain.headers} == {*other.headers}
            for header in ("content-type", "content-length", "cache-control", "x-content-type-options"):
                assert plain.headers[header] == other.headers[header]
    assert ways == ["direct", "asgi", "asgi"] * 2


def test_latents_are_decoded_alike(client, ways):
    body = npy(np.random.RandomState(0).standard_normal((3, LATENT_DIM)).astype(np.float32))
    plain, other = post(client, "decode", "", NPY, body, NPY), post(client, "decode", "", NPY, iter([body]), NPY)
    assert plain.content == other.content
    assert ways == ["direct", "asgi"]


def drawn(client, query, accept=NPY, *more):
    headers = [("accept", accept), *(("x-more", each) for each in more)]
    return client.get(f"/v1/models/ppca/sample?{query}", headers=headers)


@pytest.mark.parametrize("accept", [NPY, JSON, "image/png"])
def test_samples_are_drawn_alike(client, ways, accept):
    query = "n=3&seed=0&temperature=0.7"
    found = [
        drawn(client, query, accept),
        client.get(f"/v1/models/ppca/sample?{query}", headers={"accept": accept, "content-length": "0"}),
        drawn(client, query, accept, "a", "b"),  # a header that is said twice goes by ASGI
        drawn(client, f"{query}&{FASTAPI}", accept),
    ]
    assert {answer.status_code for answer in found} == {200}
    assert len({answer.content for answer in found}) == 1
    assert {*found[0].headers} == {*found[2].headers} == {*found[3].headers}
    assert ways == ["direct", "direct", "asgi", "asgi"]


@pytest.mark.parametrize("query", ["n=65", "n=2&draw=true"])
def test_many_samples_and_draws_of_x_go_by_asgi(client, ways, query):
    assert drawn(client, query).status_code == 200
    assert ways == ["asgi"]


@pytest.mark.parametrize("query", ["n=0", "n=257", "n=1&temperature=11", "n=2&seed=-1", "what=1"])
def test_samples_are_refused_alike(client, query):
    problems = [assert_problem(drawn(client, query, JSON, *more), 422) for more in ("", "ab")]
    for problem in problems:
        problem.pop("request_id")
    assert problems[0] == problems[1]


def test_a_sample_with_a_body_goes_by_asgi(client, ways):
    """Which may hold parameters."""
    body = {"content": b'{"n": 2}', "headers": {"accept": NPY, "content-type": JSON}}
    answer = client.request("GET", "/v1/models/ppca/sample", **body)
    assert answer.content == drawn(client, "n=2").content
    assert ways == ["asgi", "direct"]


def test_samples_at_the_same_time_are_computed_together_and_each_gets_its_own(client, ways):
    queries = [f"n={1 + i % 3}&seed={i % 20}&temperature={1 + i % 2}" for i in range(60)]
    alone = [drawn(client, query).content for query in queries]
    runs, rows = counted(client, "vaeserve_run_rows_count"), counted(client, "vaeserve_run_rows_sum")
    limits = httpx.Limits(max_connections=60)
    with httpx.Client(base_url=client.base_url, limits=limits, timeout=60) as many, ThreadPoolExecutor(30) as threads:
        found = list(threads.map(lambda query: drawn(many, query).content, queries))
    assert found == alone
    assert ways == ["direct"] * 120
    assert counted(client, "vaeserve_run_rows_sum") - rows == 120
    assert counted(client, "vaeserve_run_rows_count") - runs < 60


def test_samples_are_counted_under_their_own_method_and_route(client, ways):
    line = 'vaeserve_requests_total{method="GET",route="/v1/models/{model}/sample",status="200"}'
    before = [counted(client, each) for each in (line, 'vaeserve_batch_size_sum{verb="sample"}')]
    drawn(client, "n=3")
    after = [counted(client, each) for each in (line, 'vaeserve_batch_size_sum{verb="sample"}')]
    assert [after[0] - before[0], after[1] - before[1]] == [1, 3]
    assert ways == ["direct"]


def test_a_path_between_two_images_goes_by_asgi(client, ways):
    """It is encoded, then decoded."""
    assert post(client, "interpolate", "steps=3", OCTETS, LEVELS[:2].tobytes(), NPY).status_code == 200
    assert ways == ["asgi"]


@pytest.mark.parametrize("name", REFUSED)
def test_all_ways_refuse_alike(client, name):
    verb, query, kind, body, status = REFUSED[name]
    problems = [assert_problem(post(client, verb, query, kind, sent), status) for sent in (body, iter([body]))]
    for problem in problems:
        problem.pop("request_id")
    assert problems[0] == problems[1]


@pytest.mark.parametrize("much", ["samples=2", "samples=2&seed=1"])
def test_what_asks_for_much_goes_by_asgi(client, ways, much):
    assert post(client, "encode", much, *BODIES["octets"]).status_code == 200
    assert ways == ["asgi"]


@pytest.fixture
def all_are_long(monkeypatch):
    """They are computed on the pool."""
    monkeypatch.setattr(Batcher, "is_short", lambda self, key, rows: False)


class Stuck:
    """An encoder that waits on threads of the pool: ``rows`` of each run that has begun; ``release`` lets all go on."""

    def __init__(self, monkeypatch):
        self.rows, self._go_on, encode = [], threading.Event(), Model.encode
        self.release = self._go_on.set

        def waiting(model, x, *given):
            if threading.current_thread().name.startswith("vaeserve"):
                self.rows.append(len(x))
                assert self._go_on.wait(60)
            return encode(model, x, *given)

        monkeypatch.setattr(Model, "encode", waiting)


@pytest.fixture
def stuck(monkeypatch):
    encoder = Stuck(monkeypatch)
    yield encoder
    encoder.release()


def asking(client, *requests):
    """A connection over which these have been sent, and the stream of its answers."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), 10)
    for request in requests:
        connection.sendall(request)
    return connection, connection.makefile("rb")


def until(client, condition):
    while not condition():
        assert client.get("/livez").status_code == 200


def test_what_takes_long_is_taken_too_and_computed_on_the_pool(client, ways, all_are_long, stuck):
    stuck.release()
    plain = post(client, "encode", "seed=3", *BODIES["octets"])
    assert plain.content == post(client, "encode", "seed=3", OCTETS, iter([BODIES["octets"][1]])).content
    assert ways == ["direct", "asgi"]
    assert stuck.rows == [len(LEVELS)] * 2


def test_a_deadline_that_passes_is_answered_once(ppca_root, ways, all_are_long, stuck, monkeypatch):
    faults = []
    monkeypatch.setattr(direct, "get_logger", lambda: faults.append("told") or get_logger())
    with serving(ppca_root, request_timeout=0.3, concurrency=1) as client:
        connection, stream = asking(client, raw())
        ((head, body),) = answers(stream, 1)
        assert head.startswith(b"HTTP/1.1 503")
        assert b"no answer within 0.3 s (setting request_timeout)" in body
        assert under_way(client)[1] == 1  # the computation cannot be ended: its slot is taken
        stuck.release()
        until(client, lambda: under_way(client)[1] == 0)
        connection.sendall(raw())
        ((head, _),) = answers(stream, 1)
        assert head.startswith(b"HTTP/1.1 200")
        assert under_way(client) == (0, 0, 1.0)
        connection.close()
    assert ways == ["direct"] * 2
    assert faults == []


def test_what_waits_when_its_client_leaves_is_never_computed(ppca_root, ways, all_are_long, stuck):
    with serving(ppca_root, concurrency=1) as client:
        first, stream = asking(client, raw())
        until(client, lambda: stuck.rows)
        left, _ = asking(client, raw(x_request_id="left"))
        stays, answer = asking(client, raw())
        until(client, lambda: len(ways) == 3)
        _.close()
        left.close()
        assert client.get("/livez").status_code == 200  # that it has left was read before
        stuck.release()
        assert len(answers(stream, 1) + answers(answer, 1)) == 2
        until(client, lambda: under_way(client) == (0, 0, 1.0))
        assert stuck.rows == [1, 1]
        assert 'route="/v1/models/{model}/encode",status="400"} 1.0' in "".join(text(client))
        first.close()
        stays.close()


def test_a_client_that_leaves_while_it_is_computed_for_leaves_nothing_behind(ppca_root, ways, all_are_long, stuck):
    with serving(ppca_root, concurrency=1) as client:
        left, stream = asking(client, raw())
        until(client, lambda: stuck.rows)
        stream.close()
        left.close()
        assert client.get("/livez").status_code == 200
        stuck.release()
        until(client, lambda: under_way(client) == (0, 0, 1.0))
        assert 'route="/v1/models/{model}/encode",status="400"} 1.0' in "".join(text(client))
        assert post(client, "encode", "", OCTETS, ROW).status_code == 200


def test_a_server_that_stops_waits_for_what_takes_long(ppca_root, ways, all_are_long, stuck):
    with serving(ppca_root) as client:
        connection, stream = asking(client, raw())
        until(client, lambda: stuck.rows)
        threading.Timer(0.3, stuck.release).start()
    with connection, stream:
        ((head, _),) = answers(stream, 1)
        assert head.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in head


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-encoding": "gzip"}, 415),
        ({"expect": "100-continue"}, 200),
    ],
)
def test_headers_that_ask_for_more_go_by_asgi(client, ways, headers, status):
    assert post(client, "encode", "", *BODIES["octets"], **headers).status_code == status
    assert "direct" not in ways


def test_a_header_that_is_said_twice_goes_by_asgi(client, ways):
    request = raw(connection="close").replace(b"accept: ", b"accept: application/json\r\naccept: ")
    assert send_raw(client, request)[0] == 200
    assert ways == ["asgi"]


def test_request_ids(client, ways):
    assert (
        post(client, "encode", "", *BODIES["octets"], **{"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    )
    made = [post(client, "encode", "", *BODIES["octets"], **{"x-request-id": "not harmless!"}) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in made}
    assert len(ids) == 2
    assert all(len(each) == 32 for each in ids)
    assert ways == ["direct"] * 3


def test_a_connection_is_closed_where_that_is_asked(client, ways, monkeypatch):
    monkeypatch.setattr(protocol.GuardedProtocol, "timeout_keep_alive_handler", lambda self: None)  # not by that
    status, head, body = send_raw(client, raw(connection="close"))  # returns when the server has closed
    assert (status, body[:6]) == (200, b"\x93NUMPY")
    assert b"connection: close" in head
    assert ways == ["direct"]
    assert send_raw(client, raw(version="1.0"))[0] == 200
    assert ways == ["direct", "asgi"]


def answers(stream, count):
    """(headers, body) of so many answers on one connection, in their order."""
    found = []
    for _ in range(count):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += stream.read(1)
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        found.append((head, stream.read(length)))
    return found


def test_requests_that_come_at_once_are_answered_in_their_order(client, ways):
    """Pipelined: the second comes while the first is under way."""
    rows = [LEVELS[i].tobytes() for i in range(4)]
    alone = [post(client, "encode", "", OCTETS, row, NPY).content for row in rows]
    ways.clear()
    requests = b"".join(raw(row, x_request_id=f"id-{i}") for i, row in enumerate(rows))
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
        connection.sendall(requests)
        with connection.makefile("rb") as stream:
            found = answers(stream, len(rows))
    assert [body for _, body in found] == alone
    assert [f"x-request-id: id-{i}".encode() in head for i, (head, _) in enumerate(found)] == [True] * 4
    assert ways[0] == "direct"
    assert set(ways[1:]) <= {"direct", "asgi"}


def test_a_request_by_the_way_keeps_its_place_behind_one_by_asgi(client, ways):
    everything = post(client, "encode", "samples=2", OCTETS, LEVELS.tobytes(), NPY).content
    alone = post(client, "encode", "", OCTETS, ROW, NPY).content
    ways.clear()
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
        connection.sendall(raw(LEVELS.tobytes(), verb="encode?samples=2") + raw())
        with connection.makefile("rb") as stream:
            found = [body for _, body in answers(stream, 2)]
    assert found == [everything, alone]
    assert ways == ["asgi", "asgi"]


def test_nothing_is_answered_after_the_last_request_of_a_connection(client, ways):
    _, head, body = send_raw(client, raw(connection="close") + raw())
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    assert len(body) == length
    assert ways == ["direct"]


@pytest.mark.parametrize("cut", [20, -200, -1])
@pytest.mark.parametrize("patience", [60.0, 0.0])
def test_a_request_in_pieces_is_answered_all_the_same(client, ways, monkeypatch, cut, patience):
    """One whose body is long in coming goes by ASGI, as far as it has come."""
    alone, all_rows = (post(client, "encode", "", OCTETS, body, NPY).content for body in (ROW, LEVELS.tobytes()))
    monkeypatch.setattr(protocol, "HELD_SECONDS", patience)
    ways.clear()
    request = raw(LEVELS.tobytes())
    connection = socket.create_connection((client.base_url.host, client.base_url.port), 10)
    with connection, connection.makefile("rb") as stream:
        connection.sendall(request[:cut])
        assert client.get("/livez").status_code == 200  # the first piece has been read by then
        while patience == 0 and cut < 0 and not ways:
            assert client.get("/livez").status_code == 200
        connection.sendall(request[cut:])
        assert answers(stream, 1)[0][1] == all_rows
        connection.sendall(raw())
        assert answers(stream, 1)[0][1] == alone
    assert ways == ["asgi" if patience == 0 and cut < 0 else "direct", "direct"]


def test_a_server_that_stops_waits_for_the_body_of_a_request_that_has_begun(ppca_root, ways, monkeypatch):
    monkeypatch.setattr(protocol, "HELD_SECONDS", 60.0)
    with serving(ppca_root, receive_timeout=0.2) as client:
        connection = socket.create_connection((client.base_url.host, client.base_url.port), 10)
        connection.sendall(raw()[:-10])
        assert client.get("/livez").status_code == 200
    with connection, connection.makefile("rb") as stream:
        assert stream.read().startswith(b"HTTP/1.1 408")
    assert ways == ["asgi"]


def under_way(client):
    """The state of the way after a turn of the event loop: bytes of bodies held, requests in the house and counted."""
    values = {line.split(" ")[0]: float(line.rsplit(" ", 1)[1]) for line in text(client) if line.startswith("vaeserve")}
    state = APPS[client].state
    return state.direct.bodies.held, state.house.pool.pending, values["vaeserve_requests_in_flight"]


def text(client):
    return client.get("/metrics").text.splitlines()


@pytest.mark.parametrize(
    ("error", "status"), [(InvalidInput("x, row 0: expected better"), 422), (RuntimeError("a bug"), 500)]
)
def test_a_job_that_fails_is_answered_and_the_next_one_is_not_hurt(ppca_root, ways, monkeypatch, error, status):
    with serving(ppca_root) as client:
        kept = Model.encode
        monkeypatch.setattr(Model, "encode", lambda *given: (_ for _ in ()).throw(error))
        problem = assert_problem(post(client, "encode", "", *BODIES["octets"], **{"x-request-id": "known"}), status)
        assert problem["request_id"] == "known"
        assert ("better" in problem["detail"]) == (status == 422)
        monkeypatch.setattr(Model, "encode", kept)
        assert post(client, "encode", "", *BODIES["octets"]).status_code == 200
        assert ways == ["direct", "direct"]
        assert under_way(client) == (0, 0, 1.0)  # the question itself


def test_work_that_fails_on_its_answer_is_answered(ppca_root, ways, monkeypatch):
    with serving(ppca_root) as client:
        monkeypatch.setattr("service.formats.codecs.encode_npy", lambda array: 1 / 0)
        assert_problem(post(client, "encode", "", *BODIES["octets"], accept=NPY), 500)
        assert ways == ["direct"]
        assert under_way(client) == (0, 0, 1.0)


def test_a_fault_before_the_job_is_a_500_and_no_broken_request(ppca_root, ways, monkeypatch):
    with serving(ppca_root) as client:
        monkeypatch.setattr("service.api.routes.latents.read_x", lambda *given: 1 / 0)
        assert_problem(post(client, "encode", "", *BODIES["octets"]), 500)
        assert ways == ["asgi"]
        assert under_way(client) == (0, 0, 1.0)


def test_an_idle_connection_keeps_no_body(ppca_root, ways, monkeypatch):
    rows, enter = [], Exchange.enter
    monkeypatch.setattr(
        Exchange, "enter", lambda self, *given: rows.append(weakref.ref(self.job.rows)) or enter(self, *given)
    )
    gc.collect()
    gc.disable()
    try:
        with serving(ppca_root) as client:
            connection = socket.create_connection((client.base_url.host, client.base_url.port), 10)
            with connection, connection.makefile("rb") as stream:
                for _ in range(2):  # the head of the second is known
                    connection.sendall(raw())
                    answers(stream, 1)
                assert client.get("/livez").status_code == 200
                assert ways == ["direct"] * 2
                assert [each() for each in rows] == [None] * 2
    finally:
        gc.enable()


def test_a_client_that_hangs_up_leaves_nothing_behind(ppca_root, ways):
    with serving(ppca_root) as client:
        for _ in range(5):
            with socket.create_connection((client.base_url.host, client.base_url.port), 10) as connection:
                connection.sendall(raw())
        while len(ways) < 5:
            assert client.get("/livez").status_code == 200
        assert under_way(client) == (0, 0, 1.0)


def test_bodies_count_into_the_memory_of_all(ppca_root, ways):
    with serving(ppca_root, max_buffered_bytes=1024) as client:
        assert post(client, "encode", "", OCTETS, ROW).status_code == 200
        assert ways == ["direct"]
        assert_problem(post(client, "encode", "", OCTETS, ROW * 20), 429)
        assert under_way(client) == (0, 0, 1.0)
    with serving(ppca_root, max_body_bytes=1024) as client:
        assert_problem(post(client, "encode", "", OCTETS, ROW * 20), 413)


def test_a_full_house_refuses(ppca_root, ways, monkeypatch):
    monkeypatch.setattr(Batcher, "_go_on", lambda self, queue: None)  # nothing is ever computed
    with serving(ppca_root, concurrency=1, queue=1) as client:
        held = [socket.create_connection((client.base_url.host, client.base_url.port), 10) for _ in range(2)]
        for connection in held:
            connection.sendall(raw())
        while len(ways) < 2:
            assert client.get("/livez").status_code == 200
        refused = assert_problem(post(client, "encode", "", OCTETS, ROW), 429)
        assert "try again later" in refused["detail"]
        assert ways == ["direct", "direct", "asgi"]
        for connection in held:
            connection.close()


def test_they_are_counted_as_others_are(client, ways):
    route = "/v1/models/{model}/encode"
    lines = [
        f'vaeserve_requests_total{{method="POST",route="{route}",status="200"}}',
        f'vaeserve_request_seconds_count{{route="{route}"}}',
        'vaeserve_batch_size_count{verb="encode"}',
        'vaeserve_batch_size_sum{verb="encode"}',
    ]
    before = [counted(client, line) for line in lines]
    for _ in range(3):
        assert post(client, "encode", "", *BODIES["octets"]).status_code == 200
    assert [counted(client, line) - start for line, start in zip(lines, before, strict=True)] == [3, 3, 3, 18]
    assert ways == ["direct"] * 3


def test_logged_as_others_are(client, capsys, ways):
    """The same fields; ``milliseconds`` and the time are each one's own."""
    seen = []
    for body in (BODIES["octets"][1], iter([BODIES["octets"][1]])):
        kept = direct.report.__globals__["log_request"]
        lines = []
        direct.report.__globals__["log_request"] = lambda lines=lines, **about: lines.append(about)
        try:
            post(client, "encode", "seed=0", OCTETS, body, **{"x-request-id": "logged"})
            deadline = time.monotonic() + 10
            while not lines and time.monotonic() < deadline:
                client.get("/livez")
        finally:
            direct.report.__globals__["log_request"] = kept
        seen.append({name: value for name, value in lines[0].items() if name != "milliseconds"})
    assert seen[0] == seen[1]
    assert seen[0]["path"] == "/v1/models/ppca/encode"
    assert ways[:1] == ["direct"]


def test_a_request_is_under_way_from_its_headers_on(client, ways, monkeypatch):
    began, told, plan, report = [], [], protocol.GuardedProtocol._plan, direct.report

    def planned(self):
        if self.url.endswith(b"/encode"):
            began.append(time.perf_counter())
        return plan(self)

    monkeypatch.setattr(protocol, "HELD_SECONDS", 10.0)
    monkeypatch.setattr(protocol.GuardedProtocol, "_plan", planned)
    monkeypatch.setattr(direct, "report", lambda *given: told.append(given) or report(*given))
    connection, stream = asking(client, raw()[: -len(ROW)])
    until(client, lambda: began)
    sent = time.perf_counter()
    connection.sendall(ROW)
    answers(stream, 1)
    connection.close()
    seconds = next(given[-1] for given in told if given[3].endswith("/encode"))
    assert seconds >= sent - began[0] > 0.0
    assert ways == ["direct"]


def test_plans_are_remembered_within_bounds(client, ways):
    for seed in range(MOST_KNOWN + 5):
        assert post(client, "encode", f"seed={seed}", OCTETS, ROW).status_code == 200
    assert set(ways) == {"direct"}
    remembered = [len(each._plans) for each in gc.get_objects() if type(each) is Direct]
    assert max(remembered) == MOST_KNOWN
