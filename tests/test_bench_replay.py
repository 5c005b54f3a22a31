"""The replay of random requests: that they are drawn from their number alone, and that no difference goes unseen."""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench.random_bodies import Model, read_models
from bench.random_requests import PARAMETERS, VERBS, Request, draw_request
from bench.replay import CLOSED, Answer, Client, Outcome, differences, main, replay
from bench.servers import ROOT

IMAGES = Model("grey", "1", "image", (1, 8, 8), (1, 8, 8), 5, ("elbo", "rate"), (), False)
NEWER = Model("grey", "2", "image", (3, 8, 8), (3, 8, 8), 5, ("elbo",), (), False)
TABLE = Model("table", "1", "vector", (1, 1, 4), (4,), 2, ("elbo",), ("a", "b", "c", "d"), False)
MODELS = [IMAGES, NEWER, TABLE]
PROBLEM = "application/problem+json"
ASKED = Request(0, ("score", "npy"), "POST", "/v1/score", (("accept", "*/*"),))
OK = Answer(200, (("content-type", "application/json"), ("x-request-id", "1" * 32)), b'{"score": 1}')


def drawn(count, seed=0):
    return [draw_request(seed, number, MODELS, "grey") for number in range(count)]


def test_a_request_is_drawn_from_seed_and_number_alone():
    some = drawn(40)
    assert some == drawn(40)
    assert draw_request(0, 33, MODELS, "grey") == some[33]
    assert sum(one == other for one, other in zip(some, drawn(40, seed=1), strict=True)) < 4


def test_the_requests_cover_verbs_methods_formats_addresses_and_parameters():
    some = drawn(1500)
    kinds = {request.kind for request in some}
    formats = {"octets", "npy", "json numbers", "json base64", "png", "jpeg", "webp", "multipart", "hostile", "odd"}
    rows = {"json rows", "json objects", "csv", "table"}
    for verb in ("encode", "score", "reconstruct"):
        assert {(verb, form) for form in formats | rows} <= kinds
    assert {("decode", form) for form in ("npy", "json latents", "octets", "hostile")} <= kinds
    assert {request.method for request in some if request.kind[0] == "sample"} == {"GET", "POST"}
    assert {verb for verb, _ in kinds} == {*VERBS, "other", "drift", "astray"}
    for part in ("/v1/score", "/v1/models/grey/score", "/v1/models/grey/versions/2/score", "/v1/models/table/encode"):
        assert any(request.path.partition("?")[0] == part for request in some), part
    queries = " ".join(request.path.partition("?")[2] for request in some)
    for name in {name for choices in PARAMETERS.values() for name in choices}:
        assert f"{name}=" in queries, name
    assert any(request.is_chunked for request in some)


def test_a_twin_has_another_body_of_the_same_length_under_the_same_head():
    some = drawn(600)
    twins = [
        (before, after)
        for before, after in pairwise(some)
        if (before.path, before.headers, len(before.body)) == (after.path, after.headers, len(after.body))
        and after.body
    ]
    assert any(before.body != after.body for before, after in twins)
    assert any(before.body == after.body for before, after in twins)


def test_models_are_read_from_their_manifests():
    shipped = {model.name: model for model in read_models(ROOT / "exported")}
    assert shipped["mnist"].shape == (1, 28, 28)
    assert "combined" in shipped["mnist"].scores


def answer(status=200, body=b'{"score": 1}', **headers):
    pairs = {"content-type": "application/json", "x-request-id": "2" * 32, "date": "later"} | headers
    return Answer(status, tuple(sorted(pairs.items())), body)


def test_every_difference_is_told_in_kind():
    assert differences(ASKED, OK, answer()) == ()
    assert differences(ASKED, OK, answer(status=422)) == ("status 200 → 422",)
    assert differences(ASKED, OK, Answer(CLOSED))[0] == "status 200 → closed"
    assert differences(ASKED, OK, answer(body=b'{"score":1}')) == ("body",)
    assert differences(ASKED, OK, answer(**{"content-type": "text/json"})) == ("media type",)
    assert differences(ASKED, OK, answer(allow="GET", etag="1")) == ("header allow", "header etag")


def test_random_request_ids_are_not_compared_and_given_ones_are():
    def problem(number, detail="no"):
        identity = str(number) * 32
        body = json.dumps({"detail": detail, "request_id": identity}).encode()
        return answer(422, body, **{"content-type": PROBLEM, "x-request-id": identity})

    assert differences(ASKED, problem(1), problem(2)) == ()
    assert differences(ASKED, problem(1), problem(2, "never")) == ("body",)
    named = Request(0, ("score", "npy"), "POST", "/v1/score", (("x-request-id", "mine"),))
    assert differences(named, OK, answer()) == ("header x-request-id",)


def test_only_the_intended_difference_passes():
    drift = Request(0, ("drift", "none"), "GET", "/v1/drift", ())
    before, after = {"seen": 3, "level": 0.001}, {"seen": 3, "level": 0.001, "worker": 1}
    outcome = Outcome()
    outcome.add(drift, answer(body=json.dumps(before).encode()), answer(body=json.dumps(after).encode()))
    assert (len(outcome.differing), sum(outcome.intended.values())) == (0, 1)
    outcome.add(drift, answer(body=json.dumps(before).encode()), answer(body=json.dumps(after | {"seen": 4}).encode()))
    outcome.add(ASKED, answer(body=json.dumps(before).encode()), answer(body=json.dumps(after).encode()))
    assert (len(outcome.differing), sum(outcome.intended.values())) == (2, 1)


class Service(BaseHTTPRequestHandler):
    """Answers with what it was sent, a newer one /odd with 404; closes on /shut, and on the first /kept."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.server.seen[self.path] += 1
        if self.path == "/shut" or (self.path == "/kept" and self.server.seen["/kept"] == 1):
            self.close_connection = True
            return
        length = self.headers.get("content-length")
        body = self.rfile.read(int(length)) if length else b"in chunks"
        self.send_response(404 if self.path == "/odd" and self.server.is_newer else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = self.headers.get("transfer-encoding") == "chunked"

    def log_message(self, *arguments):
        pass


@contextmanager
def client(is_newer=False):
    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.is_newer, server.seen = is_newer, Counter()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        made = Client(*server.server_address)
        try:
            yield made
        finally:
            made.close()
            server.shutdown()
            thread.join()


def to(path, body=b"abc", **more):
    return Request(0, ("score", "npy"), "POST", path, (), body, **more)


def test_a_closed_connection_is_an_answer_of_its_own_but_not_where_it_had_been_kept():
    with client() as one:
        assert one.ask(to("/shut")) == Answer(CLOSED)
        assert one.ask(to("/")).body == b"abc"
        assert one.ask(to("/kept")).body == b"abc"
        assert one.ask(to("/", is_chunked=True)).body == b"in chunks"


def test_what_differs_is_shown_by_kind_and_the_rest_is_counted():
    with client() as one, client(is_newer=True) as other:
        outcome = replay((one, other), [to("/"), to("/odd"), to("/odd", b"x"), to("/")])
    shown = "\n".join(outcome.shown())
    assert "4 requests: 4 score" in shown
    assert "2 × score: status 200 → 404" in shown
    assert "old: 200 , 3 bytes: b'abc'" in shown
    assert shown.endswith("2 answers differ")


def test_the_same_answers_are_no_difference():
    with client() as one, client() as other:
        outcome = replay((one, other), [to("/"), to("/odd")])
    assert list(outcome.shown())[-1] == "no answer differs"


@pytest.mark.slow
def test_this_service_answers_as_itself(capsys, monkeypatch):
    assert main(["--base", str(ROOT), "--requests", "200"]) == 0
    assert "no answer differs" in capsys.readouterr().out
    monkeypatch.setattr("bench.replay.masked", lambda answer: answer.body + np.random.RandomState().bytes(8))
    assert main(["--base", str(ROOT), "--only", "3", "5"]) == 1
    assert "2 answers differ" in capsys.readouterr().out


def test_a_folder_without_manifests_has_no_models():
    assert read_models(Path("none")) == []
