"""Sums over rows that are no whole vectors: ONNX Runtime's depend on the row's place, and a served row's do not."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from service.bundle.files import open_bundle
from service.bundle.operators import check_operators
from service.errors import BundleGraphError
from service.inference.model import Model
from service.inference.row_sums import samples_of_aligned_rows
from service.inference.sessions import Runtime
from tests.ppca_bundle import GraphBuilder
from tests.service.linear_bundles import PCA, draw, write_pca

F, D = TensorProto.FLOAT, TensorProto.DOUBLE
N_ROWS = 4096
random = np.random.RandomState(0)


def aligned(graph: bytes, runtime: Runtime, samples: tuple[int, ...] = (1,)) -> set[int]:
    return set(samples_of_aligned_rows(graph, check_operators(graph), runtime, samples))


def summing(operator: str, width: int, dtype: int) -> bytes:
    """The sum or mean of x², or x² normalised, over rows of ``width`` numbers."""
    g = GraphBuilder()
    x = g.double("x") if dtype == D else "x"
    squares = g.add("Mul", x, x)
    if operator == "Einsum":
        g.add(operator, squares, equation="nd->n", output="y")
    elif operator.startswith("Reduce"):
        g.add(operator, squares, np.array([1]), keepdims=0, output="y")
    else:
        ones = (np.ones(1, np.float32), np.ones(1, np.float32))
        g.add(operator, g.add("Unsqueeze", squares, np.array([1])), *ones, output="y", **NORMALISATIONS[operator])
    return g.build({"x": ["N", width]}, {"y": (None, dtype)})


NORMALISATIONS = {"InstanceNormalization": {}, "GroupNormalization": {"num_groups": 1}}
OPERATORS = ("ReduceSum", "ReduceMean", "Einsum", *NORMALISATIONS)


@pytest.mark.parametrize("width", [3, 4, 5, 6, 7, 12, 63, 64])
@pytest.mark.parametrize("operator", OPERATORS)
def test_sums_of_whole_vectors_alone_are_the_same_at_every_place(runtime, operator, width):
    """Judged by ONNX Runtime itself: rows of whole vectors never differ, and of others of 5 numbers or more some do."""
    graph = summing(operator, width, F)
    session = runtime.session(graph, threads=1)
    x = random.standard_normal((N_ROWS, width)).astype(np.float32)
    alone = np.concatenate([session.run(["y"], {"x": row[None]})[0] for row in x])
    is_same = session.run(["y"], {"x": x})[0].tobytes() == alone.tobytes()
    assert (aligned(graph, runtime) == {1}) == (width % 4 == 0)
    assert is_same or width % 4
    assert not is_same or width < 5 or width % 4 == 0


@pytest.mark.parametrize(("width", "dtype", "expected"), [(5, D, set()), (6, D, {1}), (6, F, set()), (12, F, {1})])
def test_bytes_count_and_not_numbers(runtime, width, dtype, expected):
    assert aligned(summing("ReduceSum", width, dtype), runtime) == expected


def test_constants_are_no_rows(runtime):
    """A log-determinant of weights is summed over them: the same address at every run."""
    g = GraphBuilder()
    total = g.add("ReduceSum", g.add("Log", np.array([1.0, 2.0, 3.0], np.float32)), np.array([0]), keepdims=0)
    g.add("Add", "x", total, output="y")
    assert aligned(g.build({"x": ["N", 5]}, {"y": (["N", 5], F)}), runtime) == {1}


def test_inputs_and_outputs_of_the_graph_may_be_summed(runtime):
    g = GraphBuilder()
    g.add("ReduceSum", "x", np.array([1]), output="total")
    g.add("ReduceMean", "total", np.array([1]), output="y")
    graph = g.build({"x": ["N", 4]}, {"total": (["N", 1], F), "y": (["N", 1], F)})
    assert aligned(graph, runtime) == set()  # x is aligned, the total is not


def test_eight_samples_of_an_odd_number_of_latents_are_whole_vectors(runtime):
    g = GraphBuilder()
    g.add("ReduceSum", g.double("noise"), np.array([2]), keepdims=0, output="log_q_z")
    graph = g.build({"noise": ["N", "K", 5]}, {"log_q_z": (["N", "K"], D)})
    assert aligned(graph, runtime, (1, 8, 32)) == {8, 32}


def test_a_graph_of_one_row_a_run_is_not_tried_on_two(runtime):
    g = GraphBuilder()
    g.add("ReduceSum", "x", np.array([1]), output="y")
    assert aligned(g.build({"x": [1, 4]}, {"y": ([1, 1], F)}), runtime) == set()


def test_a_graph_that_does_not_run_is_refused(runtime):
    g = GraphBuilder()
    g.add("ReduceSum", g.add("Reshape", "x", np.array([1, 4])), np.array([1]), output="y")  # two rows do not fit
    with pytest.raises(BundleGraphError, match="fails to run the graph on zeros"):
        aligned(g.build({"x": ["N", 4]}, {"y": (None, F)}), runtime)


def test_a_squared_error_is_the_same_at_an_odd_place(tmp_path, runtime):
    """Of 5 numbers in float64 one row in 256 gives another sum there: trials on 32 rows most likely miss them all."""
    model = Model.load(open_bundle(write_pca(tmp_path)), runtime)
    x = draw(PCA, N_ROWS, seed=5)
    alone = np.concatenate([model.forward_pass(x[i : i + 1], 1, 0).log_p_x_given_z for i in range(N_ROWS)])
    for shift in (0, 1):  # each row at an even place and at an odd one
        together = np.concatenate(
            [model.forward_pass(x[i : i + 8], 1, 0).log_p_x_given_z for i in range(shift, N_ROWS - 8, 8)]
        )
        assert together.tobytes() == alone[shift : shift + len(together)].tobytes()
