"""Bound runs give bitwise what plain ones give. Bound to the CPU: the very code that a GPU would run, on no GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto

from service.bundle.files import open_bundle
from service.bundle.input_rules import Backbone
from service.inference import batch_invariance as rows
from service.inference.backbone import FeatureExtractor
from service.inference.batch_invariance import DEVICE_SIZES, SIZES, BatchInvariantRunner, random_rows, sizes_in
from service.inference.device_binding import BoundSession
from service.inference.model import Model
from service.inference.sessions import CUDA, IDENTITY, Runtime
from tests.ppca_bundle import GraphBuilder, images, write_ppca_bundle
from tests.service.corruption_bundles import with_corruption
from tests.service.fitted import write_fitted
from tests.service.inference.test_batch_invariance import BATCHES, GRAPHS, awkward, same

random = np.random.RandomState(0)
X = random.standard_normal((140, 12)).astype(np.float32)
WEIGHT = random.standard_normal((12, 6)).astype(np.float32)
SHAPES = {"x": (12,), "noise": (6,)}


def sampler() -> bytes:
    """x, noise → loc = xW, z = loc + exp(loc) ⊙ noise, log_q = Σ z in float64: an encoder in small."""
    g = GraphBuilder()
    g.add("MatMul", "x", WEIGHT, output="loc")
    z = g.add("Add", "loc", g.add("Mul", g.add("Exp", "loc"), "noise"), output="z")
    g.add("ReduceSum", g.double(z), np.array([1]), keepdims=0, output="log_q")
    outputs = {name: (["N", 6], TensorProto.FLOAT) for name in ("loc", "z")}
    return g.build({"x": ["N", 12], "noise": ["N", 6]}, outputs | {"log_q": (["N"], TensorProto.DOUBLE)})


@pytest.fixture(scope="module")
def session():
    return Runtime("cpu", threads=1).session(sampler())


def noise(seed):
    return np.random.RandomState(seed).standard_normal(6).astype(np.float32)


def runner(session, memory, **options):
    return BatchInvariantRunner(session, random_rows(SHAPES), memory=memory, **options)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_bound_run_is_bitwise_a_plain_one(runtime, name):
    graph, shape = GRAPHS[name]
    session = runtime.session(graph)
    bound, names = BoundSession(session, "cpu"), [output.name for output in session.get_outputs()]
    for n in (1, *BATCHES):
        x = random.random_sample((n, *shape)).astype(np.float32)
        plain = session.run(names, {"x": x})
        for feeds in ({"x": x}, {"x": bound.keep(x)}):
            found = bound.run(names, feeds)
            assert [(a.dtype, a.shape, a.tobytes()) for a in found] == [(a.dtype, a.shape, a.tobytes()) for a in plain]


@pytest.mark.parametrize("names", [["z"], ["log_q", "loc"], ["loc", "z", "log_q"]])
def test_only_what_is_asked_for_is_fetched_in_that_order(session, names):
    feeds = {"x": X[:5], "noise": np.tile(noise(1), (5, 1))}
    plain, found = session.run(names, feeds), BoundSession(session, "cpu").run(names, feeds)
    assert [a.tobytes() for a in found] == [a.tobytes() for a in plain]
    asked = runner(session, "cpu").run({"x": X[:5]}, {"noise": noise(1)}, names)
    assert list(asked) == names
    assert all(asked[name].tobytes() == a.tobytes() for name, a in zip(names, plain, strict=True))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 33, 64, 65, 100, 128, 140])
def test_any_number_of_rows_beside_what_is_the_same_for_all(session, n):
    bound, plain = runner(session, "cpu"), runner(session, None)
    for seed in (0, 1, 0):
        found = bound.run({"x": X[:n]}, {"noise": noise(seed)})
        assert same(found, plain.run({"x": X[:n]}, {"noise": noise(seed)}))
    z = X[:n] @ WEIGHT
    np.testing.assert_allclose(found["z"], z + np.exp(z) * noise(0), rtol=1e-4, atol=1e-5)


def test_what_is_the_same_for_all_rows_is_placed_once_for_each_batch_size(session, monkeypatch):
    placed = []
    keep = BoundSession.keep
    monkeypatch.setattr(BoundSession, "keep", lambda self, value: (placed.append(value.shape), keep(self, value))[1])
    bound, first, second = runner(session, "cpu", sizes=(1, 8)), noise(0), noise(1)
    for _ in range(3):
        bound.run({"x": X[:9]}, {"noise": first})
    assert placed == [(8, 6), (1, 6)]
    for _ in range(2):
        bound.run({"x": X[:8]}, {"noise": second})
    assert placed == [(8, 6), (1, 6), (8, 6)]
    monkeypatch.setattr(rows, "MAX_KEPT_BYTES", 0)
    third = bound.run({"x": X[:8]}, {"noise": noise(2)})
    assert len(placed) == 3
    assert same(third, runner(session, None, sizes=(1, 8)).run({"x": X[:8]}, {"noise": noise(2)}))


def test_what_is_kept_of_the_same_is_bounded(session, monkeypatch):
    monkeypatch.setattr(rows, "MAX_KEPT", 2)
    bound, drawn = runner(session, "cpu", sizes=(1,)), [noise(seed) for seed in range(5)]
    for each in drawn:
        bound.run({"x": X[:1]}, {"noise": each})
    assert [value is each for (value, _), each in zip(bound._same.values(), drawn[-2:], strict=True)] == [True, True]


def test_an_answer_is_its_callers_own(session):
    bound, x = BoundSession(session, "cpu"), X[:4].copy()
    kept = bound.keep(np.tile(noise(0), (4, 1)))
    first = bound.run(["z"], {"x": x, "noise": kept})[0]
    before = first.copy()
    x[:] = 7
    second = bound.run(["z"], {"x": x, "noise": kept})[0]
    assert first.tobytes() == before.tobytes() != second.tobytes()
    second[:] = 0
    assert bound.run(["z"], {"x": X[:4], "noise": kept})[0].tobytes() == before.tobytes()


def test_runs_at_the_same_time_do_not_meet(session):
    """Threads that share a runner, with other rows, other noise and other outputs each."""
    bound, plain = runner(session, "cpu"), runner(session, None)
    drawn = [noise(seed) for seed in range(8)]

    def job(i):
        part, names = X[i : i + 9 + 13 * (i % 8)], ["z"] if i % 2 else ["log_q", "z"]
        return part, drawn[i % 8], names

    def done(i):
        part, shared, names = job(i)
        return bound.run({"x": part}, {"noise": shared}, names)

    with ThreadPoolExecutor(8) as threads:
        for i, found in enumerate(threads.map(done, [i % 40 for i in range(400)])):
            part, shared, names = job(i % 40)
            assert same(found, plain.run({"x": part}, {"noise": shared}, names))


def test_a_device_takes_larger_batches_and_trials_decide_there_too(runtime, session):
    assert sizes_in(None) == SIZES == (1, 2, 4, 8, 16, 32)
    assert sizes_in("cuda") == DEVICE_SIZES == (1, 2, 4, 8, 16, 32, 64, 128)
    assert max(runner(session, "cpu").sizes) == 128
    assert max(runner(session, None).sizes) == 32
    graph, shape = awkward(7)
    assert BatchInvariantRunner(runtime.session(graph), random_rows({"x": shape}), memory="cpu").sizes == (1,)


def test_only_sessions_on_cuda_are_bound(monkeypatch):
    runtime = Runtime("cpu", threads=1)
    assert runtime.memory is None
    monkeypatch.setattr(runtime, "provider", CUDA)
    assert runtime.memory == "cuda"
    plain = runner(Runtime("cpu", threads=1).session(sampler()), None)
    plain.run({"x": X[:3]}, {"noise": noise(0)})
    assert all(isinstance(kept, np.ndarray) for _, kept in plain._same.values())


def test_a_device_that_is_not_there_is_an_error_and_no_fallback():
    """On a machine with a GPU the array is placed there, and comes back."""
    bound = BoundSession(Runtime("cpu", threads=1).session(IDENTITY), "cuda")
    if CUDA in ort.get_available_providers() and Runtime("auto").provider == CUDA:
        assert bound.keep(X).device_name() == "cuda"
        assert bound.keep(X).numpy().tobytes() == X.tobytes()
        return
    with pytest.raises(RuntimeError, match=r"CUDA|on the device"):
        bound.keep(X)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    root = tmp_path_factory.mktemp("fitted")
    draft, _ = write_ppca_bundle(root / ".draft", "corrupted", change=with_corruption)
    write_fitted(root, draft)
    return open_bundle(root / "corrupted" / "2")


class Bound(Runtime):
    """A CPU runtime whose sessions are bound as those of a device are."""

    memory = "cpu"


def test_a_bound_model_answers_bitwise_what_a_plain_one_answers(fitted):
    plain, bound = (Model.load(fitted, kind("cpu", threads=1)) for kind in (Runtime, Bound))
    x = images(150, seed=3)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(plain.encode(x, 3, 1), bound.encode(x, 3, 1), strict=True))
    assert plain.reconstruct(x).tobytes() == bound.reconstruct(x).tobytes()
    assert plain.sample_latents(70, 2).tobytes() == bound.sample_latents(70, 2).tobytes()
    assert plain.corruption(x).tobytes() == bound.corruption(x).tobytes()
    a, b = (model.score(x, maps=True, latents=True, also=fitted.manifest.scores) for model in (plain, bound))
    for one, other in ((a._asdict(), b._asdict()), (a.also, b.also)):
        arrays = {name: value for name, value in one.items() if isinstance(value, np.ndarray)}
        assert arrays
        assert all(value.tobytes() == other[name].tobytes() for name, value in arrays.items())
    assert max(bound.batch_sizes["decoder"]) == 128
    assert max(plain.batch_sizes["decoder"]) == 32


def test_a_bound_backbone_gives_the_same_features():
    g = GraphBuilder()
    g.add("MatMul", g.add("Flatten", "x"), random.standard_normal((48, 5)).astype(np.float32), output="features")
    graph = g.build({"x": ["N", 3, 4, 4]}, {"features": (["N", 5], TensorProto.FLOAT)})
    x, backbone = random.random_sample((11, 3, 4, 4)).astype(np.float32), Backbone(kind="vector", natural=(5,))
    plain, bound = (
        FeatureExtractor.load(graph, backbone, (3, 4, 4), kind("cpu", threads=1)) for kind in (Runtime, Bound)
    )
    assert plain.run(x).tobytes() == bound.run(x).tobytes()
    assert bound._rows._run_session.__func__ is BoundSession.run
