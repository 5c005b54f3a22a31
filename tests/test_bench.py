"""The benchmarks: their arithmetic, the load, the references, and one run of each command with tiny counts."""

import json
import math
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import orjson
import pytest

from bench.bodies import FORMATS, ONE_IMAGE
from bench.load import Load, LoadError, Target, drive, http_request
from bench.raw import Layout, RawModel, calls_per_second, cpu_per_call
from bench.requests import Case, cases, check_answers, hello_request
from bench.servers import ServerFailedError, hello_server, vae_server
from bench.serving import Row, reference_pixels
from bench.training_loop import BareLoop, Clock, WholeLoop, in_turn, measure, random_images, ratios, variants
from service.codecs import Limits, Reader
from service.images import ImageLimits
from training import fit
from training.config import load_config

ROOT = Path(__file__).parents[1]


class Echo(BaseHTTPRequestHandler):
    """POST: the body comes back. GET: 404. PUT: an answer, and the connection ends."""

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


def test_ratios_are_those_of_their_definitions():
    row = Row(Load(requests=50, seconds=0.5), server_cpu=0.1, raw=4000.0, raw_cpu=0.0005, http=400.0)
    assert row.images(8) == 800
    assert row.of_raw(8) == pytest.approx(0.2)
    assert row.of_limit(8) == pytest.approx(100 / (1 / (1 / 400 + 8 / 4000)))
    assert row.of_cpu() == pytest.approx(50 * 0.0005 / 0.1)


@pytest.mark.parametrize("size", [0, 784, 3_000_000])
def test_every_answer_is_counted_once_on_every_connection(size):
    with hello_server() as server:
        before = server.cpu_seconds()
        load = drive(Target(server.host, server.port, hello_request(size)), connections=5, seconds=0)
        assert load.requests == len(load.latencies) == 10
        assert 0 < max(load.latencies) <= load.seconds
        assert server.cpu_seconds() > before
        assert 2**20 < server.memory() <= server.memory("VmHWM")


def test_an_answer_that_is_not_200_or_a_lost_connection_is_no_result():
    with echo() as address:
        with pytest.raises(LoadError, match="status 404"):
            drive(Target(*address, http_request("GET", "/", {})), 3, 0)
        with pytest.raises(LoadError, match="closed the connection"):
            drive(Target(*address, http_request("PUT", "/", {})), 3, 0)


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


def test_an_image_of_one_is_asked_for_in_every_format_and_kind_of_answer(model):
    made = cases("ppca", "reconstruct", reference_pixels(model.bundle, 1), ("127.0.0.1", 1))
    assert [case.format for case in made if case.answer == "npy"] == list(FORMATS)
    assert {case.answer for case in made} == {"npy", "json", "png"}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_raw_reference_computes_what_the_service_answers(model, ppca, threads):
    raw, x = RawModel(model.bundle, threads), reference_pixels(model.bundle, 6) / np.float32(255)
    loc, scale = raw.verb("encode", x)()
    np.testing.assert_allclose(loc, model.encode(x).loc, atol=1e-5)
    np.testing.assert_allclose(scale, model.encode(x).scale, atol=1e-5)
    np.testing.assert_allclose(raw.verb("reconstruct", x)()[0], model.reconstruct(x), atol=1e-5)
    np.testing.assert_allclose(raw.verb("score", x)(), ppca.log_likelihood(x), atol=1e-4)
    assert raw.verb("sample", x)()[0].shape == x.shape


@pytest.mark.parametrize("callers", [1, 3])
def test_calls_of_all_callers_are_counted(callers):
    calls = []
    rate = calls_per_second(lambda: calls.append(1), callers, 0)
    assert len(calls) == 2 * callers
    assert rate > 0


def test_cpu_time_is_that_of_one_call():
    calls = []
    seconds = cpu_per_call(lambda: calls.append(sum(range(10_000))), 0)
    assert len(calls) == 2
    assert seconds > 0


def test_a_server_that_does_not_start_says_why(tmp_path):
    with pytest.raises(ServerFailedError, match="no bundle under"):
        vae_server(tmp_path)


def test_the_command_measures_every_case_and_prints_ratios_first(ppca_root, tmp_path):
    command = [sys.executable, "-m", "bench", "--repository", ppca_root, "--model", "ppca", "--seconds", "0"]
    tiny = ["--rounds", "1", "--starts", "1", "--batches", "1", "3", "--connections", "1", "2", "--workers", "2"]
    output = subprocess.check_output([*command, *tiny, "--json", tmp_path / "all.json"], cwd=ROOT, text=True)
    report = json.loads((tmp_path / "all.json").read_text())
    found = {tuple(r[key] for key in ("verb", "batch", "connections", "request", "answer")) for r in report["results"]}
    assert len(found) == len(report["results"]) == 2 * (8 + 7 + 9 + 3) + 2 * (7 + 6 + 8 + 3)
    for result in report["results"]:
        numbers = [value for value in result.values() if isinstance(value, float)]
        assert all(math.isfinite(value) and value >= 0 for value in numbers)
        assert 0 < result["of_raw"] < result["of_limit"]
        assert result["of_cpu"] > 0
        assert result["requests"] == 2 * result["connections"]
        assert Layout(**result["raw_layout"]).callers <= result["connections"]
    assert report["model"] == "ppca/1"
    assert report["start"]["import_seconds"] > 0
    assert output.index("over raw ONNX Runtime") < output.index("What it is compared with") < output.index("p99 ms")


def test_a_model_that_is_not_there_is_named(ppca_root):
    command = [sys.executable, "-m", "bench", "--repository", ppca_root, "--model", "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no model 'none'" in done.stderr
    assert "ppca" in done.stderr


@pytest.fixture
def tiny():
    small = ["model.network.hidden=[8]", "model.latent_dim=2", "model.prior.hidden=8", "model.prior.steps=1"]
    return load_config("mnist", [*small, "optimiser.batch_size=4", "run.threads=1", "run.checkpoint_seconds=1e9"])


def test_a_loop_that_takes_twice_the_time_has_half_the_speed():
    assert ratios([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert ratios([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]) == {"median": 0.5, "low": 0.375, "high": 0.75}


def test_each_round_runs_every_loop_once_and_the_next_one_backwards():
    ran = []
    costs = in_turn({name: lambda name=name: ran.append(name) for name in "abc"}, 3)
    assert "".join(ran) == "abccbaabc"
    assert {name: len(found) for name, found in costs.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_clock_gives_time_to_the_innermost_part_and_leaves_nothing_behind():
    now = 0

    class Owner:
        def outer(self):
            nonlocal now
            now += 3
            self.inner()
            now += 2

        def inner(self):
            nonlocal now
            now += 5

    owner, inner = Owner(), Owner.inner
    clock = Clock(lambda: now)
    with clock.watch(owner, "outer", "outer"), clock.watch(Owner, "inner", "inner"), clock.part("rest"):
        now += 7
        owner.outer()
        owner.outer()
    assert clock.spent == {"outer": 10, "inner": 10, "rest": 7}
    assert vars(owner) == {}
    assert Owner.inner is inner


def test_the_whole_loop_takes_each_image_of_its_epoch_once(tiny, tmp_path, monkeypatch):
    data, seen = random_images(3, 4, 20), []
    whole = WholeLoop(tiny, data, tmp_path)
    step = whole.trainer.training_step
    monkeypatch.setattr(whole.trainer, "training_step", lambda pixels: seen.append(pixels) or step(pixels))
    whole.epoch()
    assert whole.trainer.state.step == len(BareLoop(tiny, data).batches) == 3
    expected = data.pixels(data.splits["train"])
    np.testing.assert_array_equal(np.unique(np.concatenate(seen), axis=0), np.unique(expected, axis=0))


def test_skipped_updates_are_no_result(tiny, tmp_path):
    whole = WholeLoop(tiny, random_images(2, 4, 20), tmp_path)
    whole.trainer.state.skipped = 1
    with pytest.raises(RuntimeError, match="1 updates"):
        whole.epoch()


def test_every_part_is_watched_in_the_loop_that_has_it(tiny):
    before = {name: getattr(fit, name) for name in ("to_unit", "derived_seed", "objective", "learning_rate")}
    result = measure(tiny, rounds=2, steps=20, clocked=1)
    for kind in ("wall", "cpu"):
        assert 0 < result[f"loop / bare, {kind}"]["median"] < 10
    parts = result["parts, CPU microseconds a step"]
    assert all(part["loop"] > 0 for part in parts.values()), parts
    ours = ("data indexing", "order of the epoch", "seeding", "learning rate and β", "Fabric", "skip accounting")
    ours = {*ours, "averaging", "sums of metrics", "journal", "pause"}
    assert {name for name, part in parts.items() if not part["bare"]} == ours
    assert before == {name: getattr(fit, name) for name in before}


def test_variants_are_compared_with_float32(tiny, monkeypatch):
    monkeypatch.setattr("bench.training_loop.compile_model", lambda model, config: None)
    found = variants(
        load_config("mnist", ["model.network.kind=conv", "model.network.channels=[2]"], tiny.model_dump()), 1, 1
    )
    assert found["float32"]["cpu"]["median"] == 1
    assert {name.split(", ")[-1] for name in found} == {"float32", "bf16-mixed", "compiled", "channels_last"}
