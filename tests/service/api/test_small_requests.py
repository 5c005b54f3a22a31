"""What is read and computed on the event loop, and what on threads; and what is computed together."""

from __future__ import annotations

import base64
import gc
import io
import json
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from service.api.context import Call
from service.api.small_requests import MAX_BODY_BYTES
from service.formats.codecs import Reader
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.repository.model_repository import load_bundle
from service.repository.resolving import resolve_scores
from service.repository.score_parameters import ScoreParameters
from tests.hostile import npy_raw
from tests.service.http import APPS, assert_problem, npy, serving
from tests.service.requests import (
    BODIES,
    JSON,
    LATENTS,
    LEVELS,
    NPY,
    OCTETS,
    PAIRS,
    PNG,
    X,
    metric,
    post,
    sample,
)


def noting_threads(monkeypatch, owner, name):
    """A list to which each call of that function adds whether it ran on a thread of the pool."""
    threads, function = [], getattr(owner, name)

    def noted(*given, **named):
        threads.append(threading.current_thread().name.startswith("vaeserve"))
        return function(*given, **named)

    monkeypatch.setattr(owner, name, noted)
    return threads


def png_of(width, height, data):
    """A PNG whose header claims a size, with any data."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_chunks(count):
    """zTXt chunks of which each inflates to 1 MiB."""
    content = b"note\0\0" + zlib.compress(bytes(2**20))
    checksum = struct.pack(">I", zlib.crc32(b"zTXt" + content))
    return (struct.pack(">I", len(content)) + b"zTXt" + content + checksum) * count


def webp(side):
    buffer = io.BytesIO()
    Image.new("L", (side, side)).convert("RGB").save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


SMALL_PNG = BODIES["png"][1]
HEAVY = {
    "a large PNG": (PNG, png_of(3000, 3000, zlib.compress((b"\0" + bytes(3000)) * 3000, 9))),
    "another format": (PNG, webp(2000)),
    "inflated text": (PNG, SMALL_PNG[:33] + text_chunks(3) + SMALL_PNG[33:]),
    "two headers": (PNG, SMALL_PNG[:33] + SMALL_PNG[8:33] + SMALL_PNG[33:]),
    "pictures in JSON": (JSON, json.dumps({"images": [base64.b64encode(webp(2000)).decode()] * 4}).encode()),
    "one picture in JSON": (JSON, json.dumps({"images": base64.b64encode(SMALL_PNG).decode()}).encode()),
    "many tiny rows": (JSON, json.dumps({"images": [[[0]]] * 100}).encode()),
    "tiny rows as npy": (NPY, npy(np.zeros((300, 3, 2), np.uint8))),
    "a shape that is said twice": (
        NPY,
        npy_raw("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 8, 8), 'shape': (300, 3, 2)}", bytes(1800)),
    ),
    "parameters beside": (JSON, json.dumps({"images": X.tolist(), "samples": 200}).encode()),
    "many bytes": (OCTETS, bytes(MAX_BODY_BYTES + 64)),
}


@pytest.mark.parametrize("name", HEAVY)
def test_what_may_take_long_to_read_is_not_read_on_the_event_loop(client, monkeypatch, name):
    """Few bytes may hold many pixels, or many rows to resize. Nor where a small request was read before."""
    content_type, heavy = HEAVY[name]
    small = {PNG: BODIES["png"], NPY: BODIES["npy uint8"], JSON: BODIES["json"], OCTETS: BODIES["octets"]}[content_type]
    on_pool = noting_threads(monkeypatch, Reader, "read_levels")
    pictures_on_pool = noting_threads(monkeypatch, Image, "open")
    for body in (heavy, small[1], small[1], heavy):
        on_pool.clear()
        status = post(client, "encode", "", content_type, body).status_code
        if body is heavy:
            assert status in (200, 413, 422)
            assert not on_pool.count(False)
        else:
            assert status == 200
    assert not pictures_on_pool.count(False)


@pytest.mark.parametrize("name", BODIES)
def test_what_is_read_in_a_moment_is_read_on_the_event_loop(client, monkeypatch, name):
    on_pool = noting_threads(monkeypatch, Reader, "read_levels")
    for _ in range(2):
        assert post(client, "encode", "", *BODIES[name]).status_code == 200
    assert on_pool
    assert set(on_pool) == {False}


@pytest.mark.parametrize(
    ("steps", "accept", "on_pool"),
    [(64, NPY, False), (64, PNG, False), (65, NPY, True), (3, "image/gif", True), (3, "image/WebP, */*", True)],
)
def test_only_short_paths_are_computed_on_the_event_loop(client, all_are_short, monkeypatch, steps, accept, on_pool):
    """And no moving pictures, which take long to write."""
    threads = noting_threads(monkeypatch, Model, "decode")
    for _ in range(2):
        assert post(client, "interpolate", f"steps={steps}", *PAIRS["octets"], accept).status_code == 200
    assert threads == [on_pool] * 2


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    ("query", "content_type", "body", "on_pool"),
    [
        ("n=64", JSON, b"", False),
        ("n=65", JSON, b"", True),
        ("n=2", JSON, b'{"seed": 3}', True),
        ("n=2", OCTETS, b"x", True),
        ("n=256", OCTETS, b"x", True),
        ("n=256", NPY, npy(LATENTS), True),
        ("n=2&draw=true", JSON, b"", True),
        ("n=256&draw=true", OCTETS, b"x", True),
    ],
)
def test_only_few_samples_are_drawn_on_the_event_loop(
    client, all_are_short, monkeypatch, method, query, content_type, body, on_pool
):
    """By what the query says: a body, which may say more, is not read there."""
    noises = noting_threads(monkeypatch, Model, "prior_noise")
    drawings = noting_threads(monkeypatch, Model, "latents_of")
    for _ in range(2):
        address, headers = f"/v1/models/ppca/sample?{query}", {"content-type": content_type}
        assert client.request(method, address, content=body, headers=headers).status_code == 200
    assert noises == drawings == [on_pool] * 2


@pytest.mark.parametrize("query", ["samples=2", "samples=2&seed=1"])
def test_what_asks_for_much_is_computed_on_threads(client, all_are_short, monkeypatch, query):
    threads = noting_threads(monkeypatch, Model, "encode")
    for _ in range(2):
        assert post(client, "encode", query, *BODIES["octets"]).status_code == 200
    assert threads == [True] * 2


@pytest.mark.parametrize(("kind", "on_pool"), [("all_are_short", False), ("all_are_long", True)])
def test_jobs_run_on_the_event_loop_where_they_are_known_to_be_short(client, request, monkeypatch, kind, on_pool):
    request.getfixturevalue(kind)
    threads = noting_threads(monkeypatch, Model, "encode")
    first, again = (post(client, "encode", "seed=3", *BODIES["octets"]) for _ in range(2))
    assert first.content == again.content
    assert threads == [on_pool] * 2


@pytest.mark.parametrize("kind", ["all_are_short", "all_are_long"])
def test_what_was_parsed_of_a_body_is_not_kept_while_it_is_computed(client, request, monkeypatch, kind):
    """Numbers of a JSON body take ten times as much memory as the arrays that are made of them."""
    request.getfixturevalue(kind)
    seen, encode = [], Model.encode
    context = APPS[client].state.context

    def noted(self, *given, **named):
        calls = [each for each in gc.get_objects() if type(each) is Call and each.context is context]
        seen.append([(call.body, "document" in vars(call)) for call in calls])
        return encode(self, *given, **named)

    monkeypatch.setattr(Model, "encode", noted)
    assert post(client, "encode", "seed=0", *BODIES["json"]).status_code == 200
    assert seen == [[(b"", False)]]


def at_once(client, ask, asked):
    """``ask(client, …)`` of each of ``asked``, by thirty threads at the same time."""
    limits = httpx.Limits(max_connections=60)
    with httpx.Client(base_url=client.base_url, limits=limits, timeout=60) as many, ThreadPoolExecutor(30) as threads:
        return list(threads.map(lambda each: ask(many, each), asked))


class Batches:
    """What was computed since: how many batches, of how many rows together."""

    def __init__(self, client):
        self.client, self.before = client, (0, 0)
        self.before = self.counted()

    def counted(self):
        totals = (metric(self.client, f"vaeserve_run_rows_{name}") for name in ("count", "sum"))
        return tuple(total - before for total, before in zip(totals, self.before, strict=True))


def test_samples_at_the_same_time_are_computed_together_and_each_gets_its_own(client):
    queries = [f"n={1 + i % 3}&seed={i % 20}&temperature={1 + i % 2}" for i in range(60)]
    alone = [sample(client, query).content for query in queries]
    batches = Batches(client)
    assert at_once(client, lambda many, query: sample(many, query).content, queries) == alone
    count, rows = batches.counted()
    assert rows == 120
    assert count < 60


def test_requests_at_the_same_time_are_computed_together_and_answered_apart(client):
    bodies = [LEVELS[i].tobytes() for i in range(len(LEVELS))]
    ask = lambda many, body: post(many, "score", "", OCTETS, body).json()["results"]  # noqa: E731
    alone = [ask(client, body) for body in bodies]
    batches = Batches(client)
    assert at_once(client, ask, bodies * 10) == alone * 10
    count, rows = batches.counted()
    assert rows == 60
    assert count < 60


def test_paths_at_the_same_time_are_decoded_together(client):
    bodies = [LEVELS[[i, 1 + i % 5]].tobytes() for i in range(5)]
    ask = lambda many, body: post(many, "interpolate", "steps=3", OCTETS, body, NPY).content  # noqa: E731
    alone = [ask(client, body) for body in bodies]
    batches = Batches(client)
    assert at_once(client, ask, bodies * 8) == alone * 8
    count, rows = batches.counted()
    assert rows == 40 * (2 + 3)
    assert count < 80


DIFFERENT = [
    *(("encode", query) for query in ("", "seed=1", "array=scale", "strict=true")),
    *(("reconstruct", query) for query in ("", "seed=1")),
    *(("score", query) for query in ("", "also=elbo", "also=iwae", "k=3", "k=5", "seed=1", "estimator=iwae")),
    *(("score", query) for query in ("score=elbo", "score=iwae", "false_positive_rate=0.2")),
]


@pytest.mark.parametrize("kind", ["all_are_short", "all_are_long"])
def test_what_differs_in_anything_is_answered_as_if_it_were_alone(client, request, kind):
    request.getfixturevalue(kind)
    asked = [(verb, query, accept) for verb, query in DIFFERENT for accept in (JSON, NPY)]
    ask = lambda many, one: post(many, one[0], one[1], OCTETS, LEVELS[0].tobytes(), one[2]).content  # noqa: E731
    alone = [ask(client, one) for one in asked]
    assert at_once(client, ask, asked * 5) == alone * 5


def test_scores_that_differ_in_anything_are_never_computed_together(ppca_path):
    served = load_bundle(ppca_path, Runtime("cpu", threads=1))
    parameters = [{}, {"also": "elbo"}, {"also": "iwae"}, {"map": True}, {"map": True, "map_kind": "distortion"}]
    parameters += [{"top_latents": 1}, {"k": 3}, {"seed": 1}, {"estimator": "iwae"}]
    keys = [resolve_scores(served, ScoreParameters(**named), 0.05).key for named in parameters]
    assert len(set(keys)) == len(keys)
    again = resolve_scores(served, ScoreParameters(false_positive_rate=0.2), 0.05).key
    assert again == keys[0]  # what is made of a score is each request's own


def test_a_path_has_one_deadline_for_all_its_jobs(ppca_root, monkeypatch):
    """Each of the two takes less than that."""
    decode, encode = Model.decode, Model.encode
    monkeypatch.setattr(Model, "decode", lambda self, *given: time.sleep(0.6) or decode(self, *given))
    monkeypatch.setattr(Model, "encode", lambda self, *given, **named: time.sleep(0.6) or encode(self, *given, **named))
    with serving(ppca_root, request_timeout=1.0) as client:
        problem = assert_problem(post(client, "interpolate", "steps=3", *PAIRS["octets"]), 503)
        assert problem["detail"] == "no answer within 1 s (setting request_timeout)"
