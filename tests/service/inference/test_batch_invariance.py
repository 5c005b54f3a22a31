"""Rows are independent, bitwise: measured on graphs of the kinds that bundles hold, and on one made to fail."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from service.inference import batch_invariance as rows
from service.inference.batch_invariance import BatchInvariantRunner, random_rows
from tests.ppca_bundle import GraphBuilder

BATCHES = (2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 40, 47, 64)
random = np.random.RandomState(0)


def weights(*shape: int) -> np.ndarray:
    return (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def gated_mlp(operator: str) -> tuple[bytes, tuple[int, ...]]:
    """784 -> 300 -> 300 -> 40, h ⊙ σ(g) a layer, as Gemm or as MatMul + Add; float64 sums at the end."""
    g = GraphBuilder()

    def linear(x: str, inputs: int, outputs: int, **name: str) -> str:
        weight, bias = weights(outputs, inputs), weights(outputs, 1)[:, 0]
        if operator == "Gemm":
            return g.add("Gemm", x, weight, bias, transB=1, **name)
        return g.add("Add", g.add("MatMul", x, np.ascontiguousarray(weight.T)), bias, **name)

    def gated(x: str, inputs: int, outputs: int) -> str:
        return g.add("Mul", linear(x, inputs, outputs), g.add("Sigmoid", linear(x, inputs, outputs)))

    hidden = gated(gated("x", 784, 300), 300, 300)
    linear(hidden, 300, 40, output="loc")
    g.add("Exp", linear(hidden, 300, 40), output="scale")
    log = g.double(g.add("Log", g.add("Softplus", "loc")))
    g.add("ReduceSum", log, np.array([1]), keepdims=0, output="total")
    shapes = {"loc": (["N", 40], TensorProto.FLOAT), "scale": (["N", 40], TensorProto.FLOAT)}
    return g.build({"x": ["N", 784]}, shapes | {"total": (["N"], TensorProto.DOUBLE)}), (784,)


def small_conv() -> tuple[bytes, tuple[int, ...]]:
    """1×28×28 -> conv, conv of stride 2 -> 10 latents -> transposed conv: what an encoder and decoder are made of."""
    g = GraphBuilder()
    x = g.add("Relu", g.add("Conv", "x", weights(16, 1, 3, 3), kernel_shape=[3, 3], pads=[1] * 4))
    x = g.add("Relu", g.add("Conv", x, weights(24, 16, 3, 3), kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2]))
    flat = g.add("Flatten", x)
    g.add("Gemm", flat, weights(10, 24 * 14 * 14), transB=1, output="loc")
    x = g.add("ConvTranspose", x, weights(24, 1, 4, 4), kernel_shape=[4, 4], pads=[1] * 4, strides=[2, 2])
    g.add("Sigmoid", x, output="mean")
    return g.build(
        {"x": ["N", 1, 28, 28]},
        {"loc": (["N", 10], TensorProto.FLOAT), "mean": (["N", 1, 28, 28], TensorProto.FLOAT)},
    ), (1, 28, 28)


def awkward(width: int) -> tuple[bytes, tuple[int, ...]]:
    """Softplus, logarithms and float64 sums of rows of an odd width: ONNX Runtime's answers depend on the batch."""
    g = GraphBuilder()
    log = g.add("Log", g.add("Softplus", "x"), output="log")
    g.add("ReduceSum", g.add("Exp", g.double(log)), np.array([1]), keepdims=0, output="total")
    return g.build(
        {"x": ["N", width]}, {"log": (["N", width], TensorProto.FLOAT), "total": (["N"], TensorProto.DOUBLE)}
    ), (width,)


GRAPHS = {
    "gated MLP of Gemm": gated_mlp("Gemm"),
    "gated MLP of MatMul": gated_mlp("MatMul"),
    "convolutions": small_conv(),
    **{f"awkward, {width} wide": awkward(width) for width in (1, 3, 7, 10, 49, 63, 783, 784)},
}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("name", GRAPHS)
def test_rows_together_are_bitwise_rows_alone(runtime, name):
    model, shape = GRAPHS[name]
    runner = BatchInvariantRunner(runtime.session(model), random_rows({"x": shape}, frozenset({"x"})))
    x = random.random_sample((64, *shape)).astype(np.float32)
    alone = [runner.run({"x": x[i : i + 1]}) for i in range(64)]
    for n in BATCHES:
        start = 64 - n  # another alignment of the caller's array each time
        together = runner.run({"x": x[start:]})
        assert same(together, {key: np.concatenate([row[key] for row in alone[start:]]) for key in together}), n


def test_onnxruntime_itself_does_not_keep_the_promise(runtime):
    """Why service.inference.batch_invariance exists. If this fails, ONNX Runtime has become better and the trials could
    go."""
    model, _ = awkward(7)
    session, x = runtime.session(model), random.random_sample((16, 7)).astype(np.float32)
    together = session.run(["log"], {"x": x})[0]
    alone = np.concatenate([session.run(["log"], {"x": x[i : i + 1]})[0] for i in range(16)])
    assert together.tobytes() != alone.tobytes()


@pytest.mark.parametrize("name", ["gated MLP of Gemm", "convolutions"])
def test_networks_run_in_large_batches(runtime, name):
    """The promise must not cost the throughput of the networks that bundles hold."""
    model, shape = GRAPHS[name]
    assert max(BatchInvariantRunner(runtime.session(model), random_rows({"x": shape}, frozenset({"x"}))).sizes) == 32


@pytest.mark.parametrize("width", [6, 10, 49, 50])
def test_whole_vectors_on_one_thread_are_exact_for_operators_of_two_paths(runtime, width):
    """Thousands of rows, since the two paths may differ rarely: what a trial could miss must not be there at all."""
    g = GraphBuilder()
    for operator in ("Softplus", "Sin", "Cos", "Atan", "Elu", "Celu", "Selu", "Mish"):
        g.add(operator, "x", output=operator)
    g.add("Log", g.add("Abs", "x"), output="Log")
    operators = [node.output[0] for node in g.nodes if node.op_type in rows.TWO_PATHS]
    outputs = {name: (["N", width], TensorProto.FLOAT) for name in operators}
    session = runtime.session(g.build({"x": ["N", width]}, outputs), threads=1)
    runner = BatchInvariantRunner(session, random_rows({"x": (width,)}), vectors=True, threads=runtime.row_threads)
    assert runner.sizes == (4, 8, 16, 32)
    x = random.standard_normal((3001, width)).astype(np.float32)
    together = runner.run({"x": x})
    for i in range(0, 3001, 3):
        assert same({key: value[i : i + 1] for key, value in together.items()}, runner.run({"x": x[i : i + 1]}))


def test_awkward_graphs_run_a_row_at_a_time(runtime):
    model, shape = awkward(7)
    assert BatchInvariantRunner(runtime.session(model), random_rows({"x": shape})).sizes == (1,)


def test_a_row_does_not_see_its_neighbours_infinity(runtime):
    model, shape = gated_mlp("Gemm")
    runner = BatchInvariantRunner(runtime.session(model), random_rows({"x": shape}, frozenset({"x"})))
    x = random.random_sample((8, 784)).astype(np.float32)
    alone = runner.run({"x": x[:1]})
    x[1:] = np.nan
    together = runner.run({"x": x})
    assert same(alone, {key: value[:1] for key, value in together.items()})


def test_large_rows_take_small_batches(runtime, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ELEMENTS", 784 * 8)
    model, shape = gated_mlp("Gemm")
    assert max(BatchInvariantRunner(runtime.session(model), random_rows({"x": shape})).sizes) <= 8


@pytest.mark.parametrize(
    ("sizes", "count", "wanted"),
    [
        ((1,), 3, (1, 1, 1)),
        (rows.SIZES, 1, (1,)),
        (rows.SIZES, 2, (2,)),
        (rows.SIZES, 3, (4,)),
        (rows.SIZES, 7, (8,)),
        (rows.SIZES, 9, (8, 1)),
        (rows.SIZES, 12, (8, 4)),
        (rows.SIZES, 13, (16,)),
        (rows.SIZES, 25, (16, 8, 1)),
        (rows.SIZES, 26, (16, 8, 2)),
        (rows.SIZES, 27, (32,)),
        (rows.SIZES, 100, (32, 32, 32, 4)),
        ((4, 32), 3, (4,)),
        ((4, 32), 5, (4, 4)),
        ((2, 8), 3, (2, 2)),
        ((2, 8), 5, (8,)),
    ],
)
def test_rows_run_in_the_batches_that_cost_least(sizes, count, wanted):
    assert rows.batch_sizes(sizes, count) == wanted


@pytest.mark.parametrize("sizes", [(1,), (4, 8), (1, 8, 32), rows.SIZES, rows.DEVICE_SIZES])
def test_every_row_runs_and_only_the_last_batch_is_filled_up(sizes):
    for count in range(1, 300):
        found = rows.batch_sizes(sizes, count)
        assert set(found) <= set(sizes)
        assert sum(found[:-1]) < count <= sum(found)
