"""The serving benchmark: its arithmetic, the loads, the references, the table, and one run of the command."""

import asyncio
import json
import math
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import orjson
import pytest

from bench import models
from bench.bodies import COMMON, FORMATS, ONE_IMAGE
from bench.compare import Arena, Group, Row, Subject, summarise
from bench.crew import Block, Crew, Layout, RawRuntime, measure
from bench.curve import point
from bench.figure import draw
from bench.growth import points
from bench.limit import Yardstick, limit
from bench.load import Load, LoadError, Target, drive, http_request
from bench.memory import pss, rss
from bench.open_loop import OpenLoad, arrivals, drive_open
from bench.raw import RawModel, bound, needed_passes, reference_pixels
from bench.requests import Case, cases, check_answers, hello_request
from bench.rivals.environments import PACKAGES, installed_version, requirements
from bench.rivals.measure import OURS, rivals
from bench.rivals.peers import NAIVE, PEERS
from bench.rivals.wires import inference_binary, inference_json, ours, plain_json, side_by_side
from bench.run import noted, parse, selection
from bench.servers import Command, Server, ServerFailedError, hello_server, vae_server
from bench.serving import FULL
from bench.stage import Effort, Stage, find_bundle
from bench.table import ROWS, judged
from bench.timer import Timer
from service.bundle.files import open_bundle
from service.formats.codecs import Limits, Reader
from service.formats.images import ImageLimits
from tests.service.corruption_bundles import log_odds, write_corruption
from tests.service.processes import until
from training.config import load_config
from training.models.registry import build_model

ROOT = Path(__file__).parents[1]


class Echo(BaseHTTPRequestHandler):
    """POST: the body comes back. GET: 404. PUT: an answer, and the connection ends. DELETE: 429."""

    protocol_version = "HTTP/1.1"

    def _answer(self, status, body, close=False):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = close

    def do_POST(self):
        self._answer(200, self.rfile.read(int(self.headers["content-length"])))

    def do_GET(self):
        self._answer(404, b"no")

    def do_PUT(self):
        self._answer(200, b"bye", close=True)

    def do_DELETE(self):
        self._answer(429, b"later")

    def log_message(self, *arguments):
        pass


@contextmanager
def echo():
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address
        finally:
            server.shutdown()
            thread.join()


def yardstick(connections, batch=8):
    best, one = Block(4000.0, 0.0002, Layout(2, 1), 64), Block(1000.0, 0.0005, Layout(1, 1), batch)
    return Yardstick(http=400.0, best=best, one=one, batch=batch, connections=connections)


def test_times_of_http_and_of_the_graphs_add_up():
    assert limit(http=100.0, raw=100.0, batch=1) == pytest.approx(50)
    assert limit(http=400.0, raw=4000.0, batch=8) == pytest.approx(1 / (1 / 400 + 8 / 4000))
    assert limit(http=1e12, raw=640.0, batch=64) == pytest.approx(10)


def test_one_connection_is_held_against_one_request_at_a_time_and_many_against_the_best():
    many, one = yardstick(16), yardstick(1)
    assert many.limit == many.of_best == one.of_best == pytest.approx(1 / (1 / 400 + 8 / 4000))
    assert one.limit == one.of_one == many.of_one == pytest.approx(1 / (1 / 400 + 8 / 1000))
    assert many.raw_cpu == pytest.approx(8 * 0.0002)
    assert one.raw_cpu == pytest.approx(8 * 0.0005)


def test_ratios_are_those_of_their_definitions():
    row = Row(Load(requests=50, seconds=0.5), server_cpu=0.1, beside=yardstick(16))
    assert row.images_per_second == 800
    assert row.of_raw == pytest.approx(0.2)
    assert row.of_limit == pytest.approx(100 / yardstick(16).of_best)
    assert row.of_cpu == pytest.approx(50 * 8 * 0.0002 / 0.1)


def test_a_result_is_the_median_of_its_rounds_and_holds_both_limits():
    loads = [Load(requests=n, seconds=1.0, latencies=[0.001 * n] * n) for n in (10, 30, 20)]
    group = Group("encode", 8, 16, [], Target("", 0, b""))
    found = summarise(group, Subject({"request": "png"}, None, None), [Row(load, 0.1, yardstick(16)) for load in loads])
    assert found["request"] == "png"
    assert found["images_per_second"] == 160
    assert found["requests"] == 60
    assert found["p50_ms"] == pytest.approx(25)
    assert found["server_cpu_ms"] == pytest.approx(5)
    assert found["limit_of_best"] > found["limit_of_one"]
    assert found["raw_best"] == {"images_per_second": 4000, "cpu_ms_an_image": 0.2, "layout": "2 × 1", "batch": 64}
    assert found["rounds"]["images_per_second"] == [80, 240, 160]


def test_what_the_plan_is_about_has_more_rounds(monkeypatch):
    order = []
    monkeypatch.setattr(Arena, "_warm_up", lambda *_: None)
    monkeypatch.setattr(Arena, "_round", lambda _, group: order.append(group.verb) or [])
    groups = [Group(verb, 1, 1, [], Target("", 0, b""), often) for verb, often in (("a", 1), ("b", 3), ("c", 1))]
    assert Arena(None, None, 0.1, 2).measure(groups, lambda steps, _: steps) == []
    assert "".join(order) == "abcbbabcbb"


@pytest.mark.parametrize("size", [0, 784, 3_000_000])
def test_every_answer_is_counted_once_on_every_connection(size):
    with hello_server() as server:
        before = server.cpu_seconds()
        load = drive(Target(server.host, server.port, hello_request(size)), connections=5, seconds=0)
        assert load.requests == len(load.latencies) == 10
        assert 0 < max(load.latencies) <= load.seconds
        assert server.cpu_seconds() > before
        memory = server.memory()
        assert 2**20 < memory["first"]["pss"] <= memory["first"]["rss"]
        assert memory["others"] == []


def test_an_answer_that_is_not_200_or_a_lost_connection_is_no_result():
    with echo() as address:
        for run in (lambda target: drive(target, 3, 0), lambda target: drive_open(target, 3, [0.0] * 9)):
            with pytest.raises(LoadError, match="status 404"):
                run(Target(*address, http_request("GET", "/", {})))
            with pytest.raises(LoadError, match="closed the connection"):
                run(Target(*address, http_request("PUT", "/", {})))


def test_arrivals_are_a_poisson_process():
    moments = arrivals(rate=1000.0, seconds=5.0, seed=1)
    assert np.all(np.diff(moments) > 0)
    assert moments[0] > 0
    assert moments[-1] < 5
    assert abs(len(moments) - 5000) < 5 * math.sqrt(5000)
    gaps = np.diff(moments)
    assert np.mean(gaps > 0.001) == pytest.approx(math.exp(-1), abs=0.03)  # exponential: P(gap > mean) = 1/e
    np.testing.assert_array_equal(moments, arrivals(1000.0, 5.0, 1))
    assert not np.array_equal(moments[:10], arrivals(1000.0, 5.0, 2)[:10])


def test_there_is_an_arrival_in_the_shortest_time():
    assert len(arrivals(rate=1.0, seconds=0.0, seed=0)) == 1


def test_a_latency_counts_from_the_moment_at_which_the_request_was_due():
    with echo() as address:
        target = Target(*address, http_request("POST", "/", {}, b"1"))
        load = drive_open(target, 1, [0.0] * 40)
    # One connection, all due at once: each waits for those before it. Counted from when they left, all would be alike.
    assert load.latencies == sorted(load.latencies)
    assert load.latencies[-1] <= load.seconds
    assert len(load.latencies) == 40


def test_what_an_overloaded_server_refuses_is_counted_apart():
    with echo() as address:
        load = drive_open(Target(*address, http_request("DELETE", "/", {})), 2, [0.0, 0.001, 0.002])
    assert load.refused == 3
    assert load.latencies == []
    found = point(0.5, 100.0, [load])
    assert (found["requests"], found["refused"]) == (0, 3)
    assert math.isnan(found["p99_ms"])


def test_a_timer_fires_once_for_each_moment_it_is_set_to():
    fired = []

    async def run():
        loop = asyncio.get_running_loop()
        done = loop.create_future()

        def due():
            fired.append(len(fired))
            timer.at(0.0) if len(fired) < 3 else done.set_result(None)

        timer = Timer(due)
        timer.at(0.0)
        await asyncio.wait_for(done, 60)
        timer.close()

    asyncio.run(run())
    assert fired == [0, 1, 2]


def test_a_point_of_the_curve_is_the_median_of_its_rounds():
    blocks = [OpenLoad(latencies=[ms / 1e3] * 10, seconds=1.0, late=0.001) for ms in (1, 9, 2)]
    found = point(0.5, 1000.0, blocks)
    assert found["p99_ms"] == pytest.approx(2)
    assert found["offered_per_second"] == 500
    assert found["answered_per_second"] == pytest.approx(10)
    assert found["client_late_p99_ms"] == pytest.approx(1)


def test_the_curve_becomes_a_picture(tmp_path):
    latencies = {"p50_ms": 1.0, "p90_ms": 2.0, "p99_ms": 3.0, "p99.9_ms": 4.0}
    points_ = [{"offered_per_second": rate, "requests": rate, **latencies} for rate in (10, 50, 0)]
    draw({"request": "encode", "peak_requests_per_second": 100.0, "points": points_}, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_different_answers_to_the_same_images_are_no_result():
    with echo() as address:
        same = [Case(name, "json", Target(*address, http_request("POST", "/", {}, b"1"))) for name in "ab"]
        check_answers(same)
        other = Case("c", "json", Target(*address, http_request("POST", "/", {}, b"2")))
        with pytest.raises(LoadError, match="c and a got different answers"):
            check_answers([*same, other])


def test_every_format_holds_the_same_pixels(model):
    pixels = reference_pixels(model.bundle, 5)
    reader = Reader(model.manifest.preprocessing, Limits(8, ImageLimits(2**20, 2**20), 2**20, 2**20))
    for name, make in FORMATS.items():
        expected = pixels[:1] if name in ONE_IMAGE else pixels
        content_type, body = make(expected)
        found = reader.read(content_type, body, lambda body=body: orjson.loads(body))
        np.testing.assert_array_equal(found, expected / np.float32(255), err_msg=name)


def asked(model, verb, batch, formats):
    made = cases("ppca", verb, reference_pixels(model.bundle, batch), 5, ("127.0.0.1", 1), formats)
    return {(case.format, case.answer) for case in made}


def test_an_image_is_asked_for_in_every_format_and_kind_of_answer(model):
    full = asked(model, "reconstruct", 1, list(FORMATS))
    assert full == {(name, "npy") for name in FORMATS} | {("octet-stream", "json"), ("octet-stream", "png")}
    assert {name for name, _ in asked(model, "encode", 64, list(FORMATS))} == set(FORMATS) - ONE_IMAGE
    assert asked(model, "decode", 2, COMMON) == {
        ("npy float32", "npy"),
        ("npy float32", "json"),
        ("json numbers", "npy"),
    }
    assert asked(model, "sample", 2, COMMON) == {("n", "npy"), ("n", "json"), ("n", "png")}


def test_png_is_one_file_of_one_image_and_a_part_of_many(model):
    assert ("png", "json") in asked(model, "encode", 1, COMMON)
    assert ("multipart png", "json") not in asked(model, "encode", 1, COMMON)
    assert ("multipart png", "json") in asked(model, "encode", 64, COMMON)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_raw_reference_computes_what_the_service_answers(model, ppca, threads):
    raw, x = RawModel(model.bundle, threads), reference_pixels(model.bundle, 6) / np.float32(255)
    loc, scale = raw.verb("encode", x)()
    np.testing.assert_allclose(loc, model.encode(x).loc, atol=1e-5)
    np.testing.assert_allclose(scale, model.encode(x).scale, atol=1e-5)
    np.testing.assert_allclose(raw.verb("reconstruct", x)()[0], model.reconstruct(x), atol=1e-5)
    [(log_w, at_loc)] = raw.verb("score", x)()
    np.testing.assert_allclose(log_w, ppca.log_likelihood(x), atol=1e-4)
    assert at_loc == []
    np.testing.assert_allclose(raw.verb(bound(3), x)()[0], ppca.log_likelihood(x), atol=1e-4)
    for verb in ("sample", "decode"):
        assert raw.verb(verb, x)()[0].shape == x.shape


def test_the_raw_reference_runs_the_corruption_graph_where_the_default_score_has_it(tmp_path):
    def by_default(manifest, _files):
        manifest["default_score"] = "corruption"

    for change, passes in ((None, 1), (by_default, 2)):
        bundle = open_bundle(write_corruption(tmp_path / str(passes), *([change] if change else [])))
        x = reference_pixels(bundle, 6) / np.float32(255)
        found = RawModel(bundle, 1).verb("score", x)()
        assert len(found) == passes
        if change:
            np.testing.assert_allclose(found[1][0], log_odds(x), atol=1e-5)


def test_a_score_is_compared_with_the_passes_that_its_parts_need():
    manifest = find_bundle(ROOT / "exported", "mnist").manifest
    combined = manifest.scores["combined"]
    assert needed_passes(manifest) == [(16, True)]
    stretched = manifest.model_copy(
        update={"scores": manifest.scores | {"combined": combined.model_copy(update={"of": ["elbo", "debiased"]})}}
    )
    assert needed_passes(stretched) == [(16, True), (16, True)]  # debiased looks at other images
    assert needed_passes(manifest.model_copy(update={"default_score": "elbo"})) == [(16, False)]


def test_work_is_called_at_least_twice_and_counted_in_images():
    calls = []
    images, seconds, cpu = measure(lambda: calls.append(sum(range(10_000))), batch=8, seconds=0)
    assert len(calls) == 2
    assert images == 16
    assert seconds > 0
    assert cpu > 0


def test_a_crew_runs_in_processes_of_its_own(ppca_path):
    crew = Crew(ppca_path, Layout(2, 1))
    try:
        block = crew.block("encode", 4, 0)
    finally:
        crew.stop()
    assert block.layout == Layout(2, 1)
    assert block.batch == 4
    assert block.images_per_second > 0
    assert block.cpu_per_image > 0


def test_the_best_layout_is_looked_for_once(monkeypatch):
    runtime, asked_for = RawRuntime.__new__(RawRuntime), []

    class Counted:
        def __init__(self, layout, rate):
            self.layout, self.rate = layout, rate

        def block(self, verb, batch, seconds):
            asked_for.append((self.layout, batch))
            return Block(self.rate * min(batch, 32), 0.001, self.layout, batch)

    alone, two, threaded = Layout(1, 1), Layout(2, 1), Layout(1, 2)
    runtime._crews = {layout: Counted(layout, rate) for layout, rate in ((alone, 100), (two, 190), (threaded, 110))}
    runtime._best, runtime.tried = {}, {}
    assert runtime.best("encode", 0)[2:] == (two, 32)
    assert runtime.one("encode", 1, 0)[2:] == (threaded, 1)  # two processes are two callers
    asked_for.clear()
    runtime.best("encode", 0)
    runtime.one("encode", 1, 0)
    assert asked_for == [(two, 32), (alone, 1), (threaded, 1)]
    assert len(runtime.tried["encode"]) == 18


def test_memory_that_is_shared_counts_in_parts():
    assert 2**20 < pss(os.getpid()) <= rss(os.getpid())


def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(ServerFailedError, match="no bundle under"):
        vae_server(tmp_path)


def test_a_stopped_server_leaves_no_process(ppca_root):
    with vae_server(ppca_root, workers=2) as server:
        until(lambda: len(server.processes()) == 3)  # it answers as soon as one worker listens
        started = server.processes()
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]


def cell(**labels):
    return {"verb": "encode", "request": "octet-stream", "answer": "npy", "connections": 64, "batch": 1, **labels}


def rounds(*rates):
    return {"rounds": {"images_per_second": rates}}


def rival(server, rate):
    return {"server": server, "wire": "JSON", "batch": 1, "connections": 64, **rounds(rate, rate)}


def test_every_row_of_the_plan_is_judged_by_its_own_number():
    report = {
        "cells": [
            cell(of_limit=0.75),
            cell(connections=1, of_limit=0.5),
            cell(batch=64, connections=4, of_raw=1.0),
            cell(answer="json", **rounds(1000.0, 10.0, 500.0)),
            cell(answer="json", request="png", **rounds(700.0, 1.0, 400.0)),
            cell(verb="score", answer="json", connections=16, of_limit=0.9),
        ],
        "big": [cell(batch=64, connections=4, of_raw=0.91)],
        "rivals": [{"name": NAIVE.name, "results": [rival(OURS, 900.0), rival(NAIVE.name, 100.0)]}],
        "curve": {"points": [{"fraction": 0.5, "p99_ms": 3.0}, {"fraction": 0.9, "p99_ms": 99.0}]},
        "memory": {"after": {"workers": 2, "first": {"pss": 40 * 2**20}, "others": [{"pss": 110 * 2**20}] * 2}},
        "start": {"shipped": {"ready_seconds": 0.9}},
    }
    rows = [(row["measured"], row["verdict"]) for row in judged(report)]
    assert rows == [
        ("0.75", "floor passed"),
        ("0.50", "missed"),
        ("1.00", "aim passed"),
        ("0.70", "floor passed"),
        ("9.0×", "floor passed"),
        ("0.90", "aim passed"),
        ("0.91", "floor passed"),
        ("3.0 ms", "aim passed"),
        ("130 MiB", "missed"),
        ("0.9 s", "floor passed"),
    ]


def test_what_was_not_measured_is_no_zero():
    assert {(row["measured"], row["verdict"]) for row in judged({})} == {("", "not measured")}
    left_out = {"rivals": [{"name": NAIVE.name, "left_out": "…"}]}
    assert len(judged(left_out)) == len(ROWS)


def test_floors_and_aims_are_those_of_the_plan():
    goals = [(row["floor"], row["aim"]) for row in judged({})]
    ratios = [("0.70", "0.90"), ("0.87", "0.95"), ("0.95", "1.00"), ("0.65", "0.80"), ("8.0×", "12.0×")]
    others = [("0.70", "0.90"), ("0.90", "1.00"), ("10.0 ms", "4.0 ms"), ("120 MiB", "90 MiB"), ("1.0 s", "0.5 s")]
    assert goals == ratios + others


LOC = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)


def test_every_wire_finds_loc_in_its_answer():
    both = {"loc": LOC.tolist(), "scale": [[0, 0], [0, 0]]}
    outputs = [{"name": name, "data": np.ravel(value).tolist()} for name, value in reversed(both.items())]
    head = {"outputs": [{"name": name, "parameters": {"binary_data_size": 16}} for name in ("scale", "loc")]}
    answers = [
        (plain_json("/"), orjson.dumps(both)),
        (side_by_side("/"), orjson.dumps([[1, 2, 0, 0], [3, 4, 0, 0]])),
        (inference_json("/"), orjson.dumps({"outputs": outputs})),
        (inference_binary("/"), orjson.dumps(head) + bytes(16) + LOC.tobytes()),
        (ours("m")[0], orjson.dumps(both)),
    ]
    for wire, body in answers:
        np.testing.assert_array_equal(wire.loc(body, 2), LOC)


def test_every_wire_sends_the_same_pixels():
    pixels = np.random.RandomState(0).randint(0, 256, (2, 1, 3, 4)).astype(np.uint8)
    unit = (pixels / np.float32(255)).astype(np.float32)
    bodies = [
        wire("/").ask(pixels).partition(b"\r\n\r\n")[2] for wire in (plain_json, inference_json, inference_binary)
    ]
    np.testing.assert_array_equal(np.asarray(json.loads(bodies[0])["images"], np.float32), unit)
    tensor = json.loads(bodies[1])["inputs"][0]
    np.testing.assert_array_equal(np.asarray(tensor["data"], np.float32).reshape(tensor["shape"]), unit)
    assert bodies[2].endswith(unit.tobytes())


def fake_stage(model):
    return Stage(model.bundle, None, None, None, Effort(0, 1, 1), None)


def test_a_server_that_is_not_there_or_fails_is_left_out_with_a_word(model, monkeypatch):
    monkeypatch.setattr("bench.rivals.peers.installed_version", lambda name: None)
    absent = next(peer for peer in PEERS if peer.environment)
    broken = replace(NAIVE, arguments=("-c", "raise SystemExit('no such thing')"))
    found = rivals(fake_stage(model), lambda steps, name: steps, [absent, broken])
    assert "python -m bench.rivals install" in found[0]["left_out"]
    assert found[1]["left_out"] == "ServerFailedError: no such thing"


def test_a_peer_is_told_port_workers_and_graph(tmp_path):
    command = replace(NAIVE, variables=(("OTHER", "{free}"),)).command(tmp_path / "encoder.onnx", 3)
    assert "3" in command.arguments
    found = dict(command.environment)
    assert found["BENCH_ENCODER"] == str(tmp_path / "encoder.onnx")
    assert (found["BENCH_WORKERS"], found["BENCH_PORT"]) == ("3", "{port}")
    assert found["OTHER"].isdigit()


@pytest.mark.parametrize("name", PACKAGES)
def test_an_environment_is_pinned_and_known_by_its_package(name, tmp_path, monkeypatch):
    lines = [line for line in requirements(name).read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert any(line.startswith(f"{PACKAGES[name]}==") for line in lines)
    assert "onnxruntime" in {line.partition("==")[0] for line in lines}
    monkeypatch.setattr("bench.rivals.environments.FOLDER", tmp_path)
    assert installed_version(name) is None


def test_the_models_are_of_the_sizes_that_the_plan_names():
    for name, expected in (("conv", 1.3e6), ("big", 10e6)):
        shape, overrides = models.SETS[name][name]
        rule = open_bundle(find_bundle(ROOT / "exported", "mnist").path).manifest.preprocessing
        rule = rule.model_copy(update={"mode": "L" if shape[0] == 1 else "RGB", "height": shape[1], "width": shape[2]})
        built = build_model(rule, load_config(None, overrides).model)
        assert sum(parameter.numel() for parameter in built.parameters()) == pytest.approx(expected, rel=0.05)
        assert not built.likelihood.dither


def test_growth_is_of_models_that_are_made():
    asked_for = list(points())
    assert {each.model for each in asked_for} == set(models.GROWTH)
    assert {each.grows for each in asked_for} == {each.grows for each in asked_for if each.value > 1}


def test_synthetic_images_are_the_same_every_time():
    images = models.synthetic_images((3, 20, 12), 5)
    assert images.shape == (5, 20, 12, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, models.synthetic_images((3, 20, 12), 5))
    assert images.min() == 0
    assert images.max() > 200
    assert models.synthetic_images((1, 8, 8), 2).shape == (2, 8, 8)


def test_a_model_is_made_by_the_pipeline_once(tmp_path, monkeypatch):
    tiny = ["model.network.hidden=[8]", "model.latent_dim=2", *models.BINARY]
    monkeypatch.setitem(models.SETS, "tiny", {"tiny": ((1, 8, 8), tiny)})
    monkeypatch.setitem(models.IMAGES, "tiny", 600)
    root = models.repository("tiny", tmp_path)
    bundle = find_bundle(root, "tiny")
    assert bundle.manifest.default_score == "combined"
    assert bundle.manifest.calibration.n == 24
    assert sorted(path.name for path in root.iterdir()) == ["recipe.json", "tiny"]
    monkeypatch.setattr(models, "_make", None)  # not called again
    assert models.repository("tiny", tmp_path) == root
    monkeypatch.setitem(models.IMAGES, "tiny", 601)
    with pytest.raises(TypeError):
        models.repository("tiny", tmp_path)


def test_the_default_selection_is_small_and_full_is_all():
    small, full = selection(parse([])), selection(parse(["--full"]))
    assert set(small.formats) < set(full.formats) == set(FORMATS)
    assert set(small.loads) < set(full.loads) == set(FULL.loads)
    chosen = selection(parse(["--connections", "2", "--batches", "1", "8", "--formats", "png", "--verbs", "score"]))
    assert chosen.loads == [(2, 1), (2, 8)]
    assert (chosen.formats, chosen.verbs) == (["png"], ["score"])


def test_the_command_measures_every_case_and_prints_the_plan_first(ppca_root, tmp_path):
    command = [sys.executable, "-m", "bench", "--repository", ppca_root, "--model", "ppca", "--seconds", "0"]
    tiny = ["--rounds", "1", "--starts", "1", "--batches", "1", "3", "--connections", "1", "2", "--workers", "2"]
    wanted = ["--sections", "cells", "curve", "--verbs", "encode", "score", "sample"]
    output = subprocess.check_output([*command, *tiny, *wanted, "--json", tmp_path / "all.json"], cwd=ROOT, text=True)
    report = json.loads((tmp_path / "all.json").read_text())
    cells = report["cells"]
    found = {tuple(each[key] for key in ("verb", "batch", "connections", "request", "answer")) for each in cells}
    assert len(found) == len(cells) == 2 * (5 + 5 + 3) + 2 * (5 + 5 + 3)
    for result in cells:
        numbers = [value for value in result.values() if isinstance(value, float)]
        assert all(math.isfinite(value) and value >= 0 for value in numbers)
        assert 0 < result["of_raw"] < result["images_per_second"]
        rounds = 3 if (result["verb"], result["connections"], result["batch"]) == ("encode", 1, 1) else 1
        assert result["requests"] == rounds * 2 * result["connections"]
        assert min(result["limit_of_best"], result["limit_of_one"]) > 0
    assert report["facts"]["model"] == "ppca/1"
    after = report["memory"]["after"]
    assert after["workers"] == 2
    assert len(after["others"]) >= 2
    assert all(process["pss"] > 2**20 for process in (after["first"], *after["others"]))
    assert {block["layout"] for block in report["tried"]["encode"]} >= {"1 × 1"}
    assert [each["fraction"] for each in report["curve"]["points"]] == sorted({0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0})
    parts = ["single image, uint8, 64 connections", "L is the limit", "What it is compared with", "p99 ms", "Open loop"]
    assert [output.index(part) for part in parts] == sorted(output.index(part) for part in parts)


def test_a_model_that_is_not_there_is_named(ppca_root):
    command = [sys.executable, "-m", "bench", "--repository", ppca_root, "--model", "none", "--sections", "cells"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no model 'none'" in done.stderr
    assert "ppca" in done.stderr


def test_a_command_without_a_server_is_refused_in_its_own_words():
    with pytest.raises(ServerFailedError, match="nothing to serve"):
        Server(Command(("-c", "raise SystemExit('nothing to serve')"), "/"))


def test_a_section_that_fails_does_not_take_the_others_along():
    report = {"cells": []}
    with noted(report, "curve"):
        raise LoadError("answer 3 had status 500, 200 expected")
    assert report == {"cells": [], "failed": {"curve": "LoadError: answer 3 had status 500, 200 expected"}}
