"""The endpoint of the verbs: the same answers, errors, metrics and limits however and how often a request comes."""

from __future__ import annotations

import time

import pytest

from service.api import middleware
from service.server.limits import LimitedProtocol
from tests.service.http import assert_problem, npy, send_raw
from tests.service.requests import (
    BODIES,
    JSON,
    LATENTS,
    LEVELS,
    NPY,
    OCTETS,
    PAIRS,
    PNG,
    REFUSED,
    ROW,
    answers,
    chunked,
    connected,
    exchanged,
    metric,
    post,
    raw,
    sample,
    turn,
    under_way,
    until,
)

HEADERS = ("content-type", "content-length", "cache-control", "x-content-type-options", "content-security-policy")


def fields(answer):
    """What an answer says beside its request's id and the time."""
    return answer.status_code, answer.content, {*answer.headers}, [answer.headers.get(name) for name in HEADERS]


@pytest.mark.parametrize(
    "verb", ["encode", "reconstruct", "score", "score?map=true", "score?also=all", "encode?samples=2"]
)
@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("accept", [JSON, NPY])
def test_a_request_has_the_same_answer_however_it_comes(client, resolved, verb, name, accept):
    verb, _, query = verb.partition("?")
    content_type, body = BODIES[name]
    ask = lambda query, sent=body: post(client, verb, query, content_type, sent, accept)  # noqa: E731
    first = ask(f"{query}&seed=0")
    assert first.status_code == 200, first.text
    later = [
        ask(f"{query}&seed=0"),
        ask(f"{query}&seed=0", iter([body])),
        ask(f"{query}&seed=0", iter([body[:9], body[9:]])),
    ]
    assert [fields(answer) for answer in later] == [fields(first)] * 3
    assert fields(ask(f"{query}&")) == fields(first)
    assert resolved == [False, True, True, True, False]


@pytest.mark.parametrize("accept", [JSON, NPY, PNG])
def test_latents_are_decoded_alike(client, resolved, accept):
    body = npy(LATENTS)
    first, *later = [post(client, "decode", "", NPY, sent, accept) for sent in (body, body, iter([body]))]
    later.append(post(client, "decode", "seed=0&", NPY, body, accept))
    assert first.status_code == 200
    assert [fields(answer) for answer in later] == [fields(first)] * 3
    assert resolved == [False, True, True, False]


@pytest.mark.parametrize("accept", [NPY, JSON, PNG])
@pytest.mark.parametrize("query", ["n=3&seed=0&temperature=0.7", "n=65&seed=0", "n=2&seed=0&draw=true"])
def test_samples_are_drawn_alike(client, resolved, query, accept):
    drawn = [
        sample(client, query, accept),
        sample(client, query, accept),
        sample(client, query, accept, **{"content-length": "0"}),
        sample(client, f"{query}&", accept),
        client.post(f"/v1/models/ppca/sample?{query}", headers={"accept": accept}),
        client.request(
            "GET", "/v1/models/ppca/sample", content=as_json(query), headers={"accept": accept, "content-type": JSON}
        ),
    ]
    assert [fields(answer) for answer in drawn] == [fields(drawn[0])] * 6
    assert drawn[0].status_code == 200
    assert resolved == [False, True, True, False, False, False]


def as_json(query):
    """The parameters as a JSON object."""
    pairs = (pair.split("=") for pair in query.split("&"))
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in pairs) + "}").encode()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("accept", [JSON, NPY, PNG, "image/gif"])
@pytest.mark.parametrize("query", ["steps=5&mode=slerp&seed=0", "steps=3&draw=true&seed=0"])
def test_paths_are_drawn_alike(client, resolved, name, accept, query):
    first, *later = [post(client, "interpolate", query, *PAIRS[name], accept) for _ in range(2)]
    later.append(post(client, "interpolate", f"{query}&", *PAIRS[name], accept))
    assert first.status_code == 200, first.text
    assert first.headers["content-type"] == accept
    assert [fields(answer) for answer in later] == [fields(first)] * 2
    assert resolved == [False, True, False]


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_is_refused_in_the_same_words_however_it_comes(client, name):
    verb, query, content_type, body, status = REFUSED[name]
    post(client, verb, "", *BODIES["octets"])  # a request that is answered, and may be remembered
    asked = [(query, body), (query, body), (query, iter([body])), (f"{query}&", body)]
    problems = [assert_problem(post(client, verb, text, content_type, sent), status) for text, sent in asked]
    for problem in problems:
        problem.pop("request_id")
    assert problems == [problems[0]] * 4


@pytest.mark.parametrize("query", ["n=0", "n=257", "n=1&temperature=11", "n=2&seed=-1", "what=1"])
def test_samples_are_refused_in_the_same_words(client, query):
    problems = [assert_problem(sample(client, query, JSON), 422) for _ in range(3)]
    for problem in problems:
        problem.pop("request_id")
    assert problems == [problems[0]] * 3


def test_a_model_that_is_not_there_and_an_answer_that_cannot_be(client):
    octets = BODIES["octets"]
    for _ in range(2):
        assert_problem(post(client, "encode", "", *octets, at="/v1/models/nobody"), 404)
        assert_problem(post(client, "encode", "", *octets, at="/v1/models/ppca/versions/9"), 404)
        assert_problem(post(client, "encode", "", *octets, accept="image/gif"), 406)
        assert_problem(client.get("/v1/models/ppca/encode"), 405)


@pytest.mark.parametrize(
    ("headers", "status"), [({"content-encoding": "gzip"}, 415), ({"expect": "100-continue"}, 200)]
)
def test_headers_that_say_more_count_for_repeated_requests_too(client, headers, status):
    for _ in range(2):
        assert post(client, "encode", "", *BODIES["octets"]).status_code == 200
        assert post(client, "encode", "", *BODIES["octets"], **headers).status_code == status


@pytest.mark.parametrize(
    ("lines", "media_type"),
    [
        (["application/json", NPY], JSON),
        (["text/html", NPY], NPY),
        (["application/json;q=0.5", "text/html, application/x-npy;q=0.6"], NPY),
    ],
)
def test_lines_of_accept_are_one_list(client, lines, media_type):
    for _ in range(2):
        accept = "".join(f"accept: {line}\r\n" for line in lines).encode()
        request = raw(connection="close").replace(f"accept: {NPY}\r\n".encode(), accept)
        status, head, _ = send_raw(client, request)
        assert (status, f"content-type: {media_type}".encode() in head) == (200, True)
    assert send_raw(client, raw(connection="close").replace(NPY.encode(), b"text/html\r\naccept: image/x"))[0] == 406


def test_an_encoding_of_the_body_is_seen_in_any_line(client):
    lines = b"content-encoding: identity\r\ncontent-encoding: gzip\r\naccept: "
    assert send_raw(client, raw(connection="close").replace(b"accept: ", lines))[0] == 415


def test_request_ids(client):
    octets = BODIES["octets"]
    for _ in range(2):
        assert post(client, "encode", "", *octets, **{"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = [post(client, "encode", "", *octets, **{"x-request-id": "not harmless!"}) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in made}
    assert len(ids) == 2
    assert all(len(request_id) == 32 for request_id in ids)


def test_a_connection_is_closed_where_that_is_asked(client, monkeypatch):
    monkeypatch.setattr(LimitedProtocol, "timeout_keep_alive_handler", lambda self: None)  # not by that
    for _ in range(2):
        status, head, body = send_raw(client, raw(connection="close"))  # returns when the server has closed
        assert (status, body[:6]) == (200, b"\x93NUMPY")
        assert b"connection: close" in head
    assert send_raw(client, raw(version="1.0"))[0] == 200


def test_requests_that_come_at_once_are_answered_in_their_order(client):
    """Pipelined: the second comes while the first is under way."""
    rows = [LEVELS[i].tobytes() for i in range(4)]
    alone = [post(client, "encode", "", OCTETS, row, NPY).content for row in rows]
    many = post(client, "encode", "samples=2", OCTETS, LEVELS.tobytes(), NPY).content
    requests = [raw(LEVELS.tobytes(), verb="encode?samples=2", x_request_id="many")]
    requests += [raw(row, x_request_id=f"id-{i}") for i, row in enumerate(rows)]
    with connected(client, b"".join(requests)) as (_, stream):
        pairs = answers(stream, 5)
    assert [body for _, body in pairs] == [many, *alone]
    for name, (head, _) in zip(["many", "id-0", "id-1", "id-2", "id-3"], pairs, strict=True):
        assert f"x-request-id: {name}\r\n".encode() in head


def test_nothing_is_answered_after_the_last_request_of_a_connection(client):
    for _ in range(2):
        _, head, body = send_raw(client, raw(connection="close") + raw())
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        assert len(body) == length


@pytest.mark.parametrize("cut", [1, 20, -200, -1])
def test_a_request_in_pieces_is_answered_all_the_same(client, cut):
    alone, all_rows = (post(client, "encode", "", OCTETS, body, NPY).content for body in (ROW, LEVELS.tobytes()))
    request = raw(LEVELS.tobytes())
    with connected(client, request[:cut]) as (connection, stream):
        turn(client)
        connection.sendall(request[cut:])
        assert answers(stream, 1)[0][1] == all_rows
        connection.sendall(raw())
        assert answers(stream, 1)[0][1] == alone
        connection.sendall(chunked(ROW, b"x-trailer: 1\r\n") + raw())
        assert [body for _, body in answers(stream, 2)] == [alone] * 2


def test_what_looks_like_a_request_inside_a_body_is_a_body(client):
    request = raw(ROW * 7)
    alone = exchanged(client, request)[0][1]
    inside = request[: -len(raw())] + raw()
    with connected(client, inside[: -len(raw())]) as (connection, stream):
        turn(client)
        connection.sendall(raw())
        ((head, body),) = answers(stream, 1)
        connection.sendall(raw())
        assert answers(stream, 1)[0][0].startswith(b"HTTP/1.1 200")
    assert head.startswith(b"HTTP/1.1 200")
    assert len(body) == len(alone)


def test_every_request_is_counted(client):
    route = "/v1/models/{model}/encode"
    starts = [
        f'vaeserve_requests_total{{method="POST",route="{route}",status="200"}}',
        f'vaeserve_request_seconds_count{{route="{route}"}}',
        'vaeserve_batch_size_count{verb="encode"}',
        'vaeserve_batch_size_sum{verb="encode"}',
    ]
    before = [metric(client, start) for start in starts]
    for _ in range(3):
        assert post(client, "encode", "", *BODIES["octets"]).status_code == 200
    assert [metric(client, start) - then for start, then in zip(starts, before, strict=True)] == [3, 3, 3, 18]


def test_samples_are_counted_under_their_own_method_and_route(client):
    starts = (
        'vaeserve_requests_total{method="GET",route="/v1/models/{model}/sample",status="200"}',
        'vaeserve_batch_size_sum{verb="sample"}',
    )
    before = [metric(client, start) for start in starts]
    for _ in range(2):
        sample(client, "n=3")
    assert [metric(client, start) - then for start, then in zip(starts, before, strict=True)] == [2, 6]


@pytest.mark.parametrize("at", ["/v1/models/ppca", "/v1/models/ppca/versions/1", "/v1"])
def test_every_address_is_remembered_and_counted_under_its_own_route(client, resolved, at):
    route = at.replace("ppca", "{model}").replace("versions/1", "versions/{version}") + "/encode"
    line = f'vaeserve_requests_total{{method="POST",route="{route}",status="200"}}'
    before = metric(client, line)
    for _ in range(2):
        assert post(client, "encode", "", *BODIES["octets"], at=at).status_code == 200
    assert metric(client, line) == before + 2
    assert resolved == [False, True]


def test_every_request_is_logged_alike(client, monkeypatch):
    """The same fields; ``milliseconds`` are each one's own."""
    lines = []
    monkeypatch.setattr(middleware, "log_request", lambda **fields: lines.append(fields))
    octets = BODIES["octets"]
    for body in (octets[1], octets[1], iter([octets[1]])):
        post(client, "encode", "seed=0", OCTETS, body, **{"x-request-id": "logged"})
    until(client, lambda: len([line for line in lines if line["path"].endswith("/encode")]) == 3)
    logged = [line for line in lines if line["path"].endswith("/encode")]
    assert all(line.pop("milliseconds") > 0 for line in logged)
    assert logged == [logged[0]] * 3
    assert logged[0] == {
        "request_id": "logged",
        "client": "127.0.0.1",
        "method": "POST",
        "route": "/v1/models/{model}/encode",
        "path": "/v1/models/ppca/encode",
        "status": 200,
    }


def test_a_request_is_under_way_from_its_headers_on(client, monkeypatch):
    lines = []
    monkeypatch.setattr(middleware, "log_request", lambda **fields: lines.append(fields))
    with connected(client, raw()[: -len(ROW)]) as (connection, stream):
        until(client, lambda: under_way(client)[2] == 2)
        began = time.perf_counter()
        turn(client)
        seconds = time.perf_counter() - began
        connection.sendall(ROW)
        answers(stream, 1)
    until(client, lambda: any(line["path"].endswith("/encode") for line in lines))
    assert next(line["milliseconds"] for line in lines if line["path"].endswith("/encode")) >= 1e3 * seconds
