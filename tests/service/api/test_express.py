"""The short way beside FastAPI's: the same answers, errors, metrics and limits; only the way is another."""

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
from service.api.asked import MOST_KNOWN, Addresses
from service.api.light import MOST_BYTES

from service.api import express
from service.api.context import Call
from service.inference.batcher import Batcher
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.repository.model_repository import load_bundle
from service.repository.resolving import resolve_scores
from service.repository.score_parameters import ScoreParameters
from tests.hostile import npy_raw
from tests.ppca_bundle import LATENT_DIM, images
from tests.service.http import APPS, assert_problem, npy, serving

OCTETS, NPY, JSON, PNG = "application/octet-stream", "application/x-npy", "application/json", "image/png"
FASTAPI = "seed=0&seed=0"  # a name said twice is left to FastAPI, which takes the last
X = images(6)
LEVELS = np.round(X * 255).astype(np.uint8)


def png(levels):
    buffer = io.BytesIO()
    Image.fromarray(levels.squeeze()).save(buffer, "PNG")
    return buffer.getvalue()


BODIES = {
    "octets": (OCTETS, LEVELS.tobytes()),
    "npy uint8": (NPY, npy(LEVELS)),
    "npy float32": (NPY, npy(X)),
    "json": (JSON, json.dumps({"images": X.tolist()}).encode()),
    "png": (PNG, png(LEVELS[0])),
}


@pytest.fixture(scope="module")
def client(ppca_root):
    with serving(ppca_root, max_batch=8) as client:
        yield client


@pytest.fixture
def ways(monkeypatch):
    """Names of the ways that requests took."""
    taken, asked = [], express.Express._asked

    def told(self, scope):
        found = asked(self, scope)
        taken.append("fastapi" if found is None else "express")
        return found

    monkeypatch.setattr(express.Express, "_asked", told)
    return taken


def post(client, verb, query, kind, body, accept=JSON, at="/v1/models/ppca"):
    """In chunks, which service.api.direct leaves alone."""
    address = f"{at}/{verb}?{query}" if query else f"{at}/{verb}"
    return client.post(address, content=iter([body]), headers={"content-type": kind, "accept": accept})


@pytest.mark.parametrize(
    "verb", ["encode", "reconstruct", "score", "score?map=true", "score?also=all", "encode?samples=2"]
)
@pytest.mark.parametrize("name", BODIES)
def test_both_ways_lead_to_the_same_bytes(client, ways, verb, name):
    verb, _, more = verb.partition("?")
    kind, body = BODIES[name]
    for accept in (JSON, NPY):
        short = post(client, verb, f"{more}&seed=0" if more else "seed=0", kind, body, accept)
        long = post(client, verb, f"{more}&{FASTAPI}" if more else FASTAPI, kind, body, accept)
        assert short.status_code == long.status_code == 200, short.text
        assert short.content == long.content
        assert {*short.headers} == {*long.headers}
        assert short.headers["content-type"] == long.headers["content-type"]
    assert ways == ["express", "fastapi"] * 2


def test_latents_are_decoded_both_ways_alike(client, ways):
    body = npy(np.random.RandomState(0).standard_normal((3, LATENT_DIM)).astype(np.float32))
    short, long = (post(client, "decode", query, NPY, body, NPY) for query in ("draw=false&seed=0", FASTAPI))
    assert short.content == long.content
    assert ways == ["express", "fastapi"]


PAIRS = {
    "octets": (OCTETS, LEVELS[:2].tobytes()),
    "json": (JSON, json.dumps({"images": LEVELS[:2].tolist(), "dtype": "uint8"}).encode()),
    "latents": (NPY, npy(np.random.RandomState(0).standard_normal((2, LATENT_DIM)).astype(np.float32))),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("accept", [JSON, NPY, PNG, "image/gif"])
@pytest.mark.parametrize("query", ["steps=5&mode=slerp", "steps=3&draw=true"])
def test_both_ways_lead_from_one_to_the_other(client, ways, name, accept, query):
    short, long = (post(client, "interpolate", f"{query}&{more}", *PAIRS[name], accept) for more in ("seed=0", FASTAPI))
    assert short.status_code == long.status_code == 200, short.text
    assert short.content == long.content
    assert short.headers["content-type"] == long.headers["content-type"] == accept
    assert ways == ["express", "fastapi"]


@pytest.mark.parametrize(
    ("steps", "accept", "light"),
    [(64, NPY, True), (64, PNG, True), (65, NPY, False), (3, "image/gif", False), (3, "image/WebP, */*", False)],
)
def test_only_short_paths_are_answered_on_the_event_loop(client, monkeypatch, steps, accept, light):
    """And no moving pictures, which take long to write."""
    threads, kept = [], Model.decode
    monkeypatch.setattr(Batcher, "is_short", lambda self, key, rows: True)
    monkeypatch.setattr(
        Model, "decode", lambda self, *given: threads.append(threading.current_thread().name) or kept(self, *given)
    )
    assert post(client, "interpolate", f"steps={steps}", *PAIRS["octets"], accept).status_code == 200
    assert [name.startswith("vaeserve") for name in threads] == [not light]


def test_paths_at_the_same_time_are_decoded_together(client):
    bodies = [LEVELS[[i, 1 + i % 5]].tobytes() for i in range(5)] * 8
    alone = [post(client, "interpolate", "steps=3", OCTETS, body, NPY).content for body in bodies]
    runs, rows = counted(client, "vaeserve_run_rows_count"), counted(client, "vaeserve_run_rows_sum")
    limits = httpx.Limits(max_connections=40)
    with httpx.Client(base_url=client.base_url, limits=limits, timeout=60) as many, ThreadPoolExecutor(20) as threads:
        answers = threads.map(lambda body: post(many, "interpolate", "steps=3", OCTETS, body, NPY).content, bodies)
        assert list(answers) == alone
    assert counted(client, "vaeserve_run_rows_sum") - rows == 40 * (2 + 3)
    assert counted(client, "vaeserve_run_rows_count") - runs < 80


def test_a_path_has_one_deadline_for_all_its_jobs(ppca_root, monkeypatch):
    """Each of the two takes less than that."""
    kept, encode = Model.decode, Model.encode
    monkeypatch.setattr(Model, "decode", lambda self, *given: time.sleep(0.6) or kept(self, *given))
    monkeypatch.setattr(Model, "encode", lambda self, *given, **more: time.sleep(0.6) or encode(self, *given, **more))
    with serving(ppca_root, request_timeout=1.0) as client:
        problem = assert_problem(post(client, "interpolate", "steps=3", *PAIRS["octets"]), 503)
        assert problem["detail"] == "no answer within 1 s (setting request_timeout)"


@pytest.mark.parametrize("at", ["/v1/models/ppca", "/v1/models/ppca/versions/1", "/v1"])
def test_every_address_is_known_and_counted_under_its_own_route(client, ways, at):
    kind, body = BODIES["octets"]
    route = at.replace("ppca", "{model}").replace("versions/1", "versions/{version}") + "/encode"
    line = f'vaeserve_requests_total{{method="POST",route="{route}",status="200"}}'
    before = counted(client, line)
    assert post(client, "encode", "", kind, body, at=at).status_code == 200
    assert counted(client, line) == before + 1
    assert ways[1] == "express"


def counted(client, start):
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start)), 0.0)


REFUSED = {
    "an unknown parameter": ("score", "what=1", *BODIES["octets"], 422),
    "a parameter out of range": ("score", "k=0", *BODIES["octets"], 422),
    "an unknown score": ("score", "score=nothing", *BODIES["octets"], 422),
    "another size": ("encode", "", OCTETS, b"123", 422),
    "nothing": ("encode", "", OCTETS, b"", 422),
    "too many": ("encode", "", OCTETS, LEVELS.tobytes() * 2, 422),
    "no picture": ("encode", "", PNG, b"\x89PNG\r\n\x1a\n", 422),
    "text": ("encode", "", "text/plain", b"hello", 415),
    "broken JSON": ("score", "", JSON, b"{", 422),
    "latents of another width": ("decode", "", NPY, npy(np.zeros((1, LATENT_DIM + 1), np.float32)), 422),
    "what the model has not": ("encode", "array=what", *BODIES["octets"], 422),
}


@pytest.mark.parametrize("name", REFUSED)
def test_both_ways_refuse_alike(client, name):
    verb, query, kind, body, status = REFUSED[name]
    short, long = (post(client, verb, more, kind, body) for more in (query, f"{query}&{FASTAPI}".strip("&")))
    problems = [assert_problem(answer, status) for answer in (short, long)]
    for problem in problems:
        problem.pop("request_id")
    assert problems[0] == problems[1]


def test_a_model_that_is_not_there_and_an_answer_that_cannot_be(client):
    kind, body = BODIES["octets"]
    assert_problem(post(client, "encode", "", kind, body, at="/v1/models/nobody"), 404)
    assert_problem(post(client, "encode", "", kind, body, at="/v1/models/ppca/versions/9"), 404)
    assert_problem(post(client, "encode", "", kind, body, accept="image/gif"), 406)
    assert_problem(client.get("/v1/models/ppca/encode"), 405)


def test_requests_at_the_same_time_are_computed_together_and_answered_apart(client):
    each = [LEVELS[i].tobytes() for i in range(len(LEVELS))] * 10
    alone = [post(client, "score", "", OCTETS, body).json()["results"] for body in each[: len(LEVELS)]]
    runs, rows = counted(client, "vaeserve_run_rows_count"), counted(client, "vaeserve_run_rows_sum")
    limits = httpx.Limits(max_connections=60)
    with httpx.Client(base_url=client.base_url, limits=limits, timeout=60) as many, ThreadPoolExecutor(30) as threads:
        found = list(threads.map(lambda body: post(many, "score", "", OCTETS, body).json()["results"], each))
    assert found == alone * 10
    rows, runs = counted(client, "vaeserve_run_rows_sum") - rows, counted(client, "vaeserve_run_rows_count") - runs
    assert rows == 60
    assert runs < 60


def png_of(width, height, data):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_chunk(count):
    content = b"note\0\0" + zlib.compress(bytes(2**20))
    return (
        struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    ) * count


def webp(side):
    buffer = io.BytesIO()
    Image.new("L", (side, side)).convert("RGB").save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


SMALL_PNG = BODIES["png"][1]
HEAVY = {
    "a large PNG": (PNG, png_of(3000, 3000, zlib.compress((b"\0" + bytes(3000)) * 3000, 9))),
    "another format": (PNG, webp(2000)),
    "inflated text": (PNG, SMALL_PNG[:33] + text_chunk(3) + SMALL_PNG[33:]),
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
}


@pytest.mark.parametrize(("name", "light"), [*((name, False) for name in HEAVY), *((name, True) for name in BODIES)])
def test_only_what_is_read_in_a_moment_for_sure_is_read_on_the_event_loop(client, monkeypatch, name, light):
    """Few bytes may hold many pixels, or many rows to resize."""
    found, kept = [], express.is_light
    monkeypatch.setattr(express, "is_light", lambda *given: found.append(kept(*given)) or found[-1])
    kind, body = (BODIES if light else HEAVY)[name]
    assert len(body) < MOST_BYTES
    assert post(client, "encode", "", kind, body).status_code in ((200,) if light else (200, 422))
    assert found == [light]


@pytest.mark.parametrize(("n", "body", "light"), [(64, b"", True), (65, b"", False), (2, b'{"seed": 3}', False)])
def test_only_few_samples_are_drawn_on_the_event_loop(client, monkeypatch, n, body, light):
    """By what the query says: a body, which may say more, is not read there."""
    found, kept = [], express.is_light
    monkeypatch.setattr(express, "is_light", lambda *given: found.append(kept(*given)) or found[-1])
    headers = [
        ("content-type", JSON),
        ("x-more", "a"),
        ("x-more", "b"),
    ]  # said twice: service.api.direct leaves it alone
    answer = client.request("GET", f"/v1/models/ppca/sample?n={n}", content=body, headers=headers)
    assert answer.status_code == 200
    assert found == [light]


@pytest.mark.parametrize("query", ["seed=0", FASTAPI])
def test_what_was_parsed_of_a_body_is_not_kept_while_it_is_computed(client, monkeypatch, query):
    """Numbers of a JSON body take ten times as much memory as the arrays that are made of them."""
    found, kept = [], Model.encode
    house = APPS[client].state.house

    def told(self, *given, **named):
        calls = [each for each in gc.get_objects() if type(each) is Call and each.house is house]
        found.append([(each.body, "document" in vars(each)) for each in calls])
        return kept(self, *given, **named)

    monkeypatch.setattr(Model, "encode", told)
    assert post(client, "encode", query, *BODIES["json"]).status_code == 200
    assert found == [[(b"", False)]]


def test_draws_of_x_are_made_on_worker_threads(client, monkeypatch, ways):
    threads, kept = [], Model.observe
    monkeypatch.setattr(
        Model, "observe", lambda self, *given: threads.append(threading.current_thread().name) or kept(self, *given)
    )
    headers = [("x-more", "a"), ("x-more", "b")]
    assert client.get("/v1/models/ppca/sample?n=2&draw=true", headers=headers).status_code == 200
    assert ways == ["express"]
    assert [name.startswith("vaeserve") for name in threads] == [True]


def test_queries_are_remembered_within_bounds(client, ways):
    kind, body = BODIES["octets"]
    known = set()
    for seed in range(MOST_KNOWN + 5):
        known.add(post(client, "encode", f"seed={seed}", kind, body[: len(body) // 6]).status_code)
    assert known == {200}
    assert set(ways) == {"express"}
    remembered = [len(each._known) for each in gc.get_objects() if type(each) is Addresses]
    assert max(remembered) == MOST_KNOWN


def test_scores_that_differ_in_anything_are_never_computed_together(ppca_path):
    served = load_bundle(ppca_path, Runtime("cpu", threads=1))
    asked = [{}, {"also": "elbo"}, {"also": "iwae"}, {"map": True}, {"map": True, "map_kind": "distortion"}]
    asked += [{"top_latents": 1}, {"k": 3}, {"seed": 1}, {"estimator": "iwae"}]
    keys = [resolve_scores(served, ScoreParameters(**each), 0.05).key for each in asked]
    assert len(set(keys)) == len(keys)
    again = resolve_scores(served, ScoreParameters(false_positive_rate=0.2), 0.05).key
    assert again == keys[0]  # what is made of a score is each request's own
