"""Sums over the numbers of a row: whether ONNX Runtime adds them up in the same order at every place of a batch.

The kernels of SUMS take vectors of VECTOR_BYTES from an aligned address on, and the numbers before that one by one.
Rows whose size is a multiple of VECTOR_BYTES are all aligned alike. Other rows are added up in another order at another
place, so that the sum may differ in its last bit. Measured with 1.31 on x86: the sums of 0.4% of rows of 5 squared
errors in float64 differ, and of up to 75% of longer rows in float32. Trials on a few rows miss the former, so the sizes
are read off a run of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnxruntime as ort

from service.bundle.protobuf import encoded, fields
from service.errors import BundleGraphError
from service.inference.sessions import Runtime

SUMS = frozenset(
    {"Einsum", "GroupNormalization", "InstanceNormalization", "MeanVarianceNormalization", "ReduceMean", "ReduceSum"}
)
VECTOR_BYTES = 16  # of SSE and NEON, for which ONNX Runtime's general kernels are compiled
PREFIX = "vaeserve.summed."  # of the outputs that are added to a graph

# Field numbers of onnx.proto.
GRAPH, NODE, GRAPH_OUTPUT, NODE_INPUT, NODE_OUTPUT, OPERATOR, VALUE_NAME = 7, 1, 12, 1, 2, 4, 1


def samples_of_aligned_rows(
    model: bytes, operators: Mapping[str, int], runtime: Runtime, samples: Iterable[int] = (1,)
) -> frozenset[int]:
    """Return those numbers of ``samples`` a row for which the graph's sums do not depend on a row's place in a batch.

    Args:
        model: a serialised ONNX model that ``check_operators`` accepts; the first axis of its inputs, which are
            float32, are rows, and other axes of unknown size are samples.
        operators: the model's operators.

    None of them if the graph sums and takes a fixed number of rows. A device's own kernels are taken not to depend on
    addresses, which was never measured.

    Raises:
        BundleGraphError: ONNX Runtime refuses the model, or fails to run it.
        DeviceUnavailable: the provider fails to start.
    """
    if runtime.memory is not None or not SUMS & operators.keys():
        return frozenset(samples)
    session = runtime.session(_with_outputs(model, _summed(model)), threads=1)
    if any(isinstance(value.shape[0], int) for value in session.get_inputs()):
        return frozenset()
    return frozenset(k for k in samples if not any(size % VECTOR_BYTES for size in _row_bytes(session, k)))


def _summed(model: bytes) -> list[bytes]:
    """Return the names of all inputs of the nodes that sum, once each."""
    names: dict[bytes, None] = {}
    for node in _nodes(model):
        parts = [
            (field.number, bytes(field.payload)) for field in fields(node) if field.number in (NODE_INPUT, OPERATOR)
        ]
        if any(number == OPERATOR and name.decode() in SUMS for number, name in parts):
            names |= {name: None for number, name in parts if number == NODE_INPUT and name}
    return list(names)


def _nodes(model: bytes) -> Iterator[memoryview]:
    """Yield the nodes of a serialised model, which has no control flow."""
    for part in fields(memoryview(model)):
        if part.number == GRAPH:
            yield from (field.payload for field in fields(part.payload) if field.number == NODE)


def _with_outputs(model: bytes, tensors: Iterable[bytes]) -> bytes:
    """Append copies of the tensors to the model's outputs: a second graph in a message is merged into the first."""
    added = b""
    for i, tensor in enumerate(tensors):
        name = f"{PREFIX}{i}".encode()
        node = encoded(NODE_INPUT, tensor) + encoded(NODE_OUTPUT, name) + encoded(OPERATOR, b"Identity")
        added += encoded(NODE, node) + encoded(GRAPH_OUTPUT, encoded(VALUE_NAME, name))
    return model + encoded(GRAPH, added)


def _row_bytes(session: ort.InferenceSession, samples: int) -> list[int]:
    """Return by how many bytes each added output grows with a row of so many samples: 0 for constants.

    Raises BundleGraphError.
    """
    names = [output.name for output in session.get_outputs() if output.name.startswith(PREFIX)]
    try:
        one, two = (session.run(names, _zeros(session, rows, samples)) for rows in (1, 2))
    except Exception as error:
        # ONNX Runtime's exceptions have no common base of their own but Exception.
        raise BundleGraphError(f"ONNX Runtime fails to run the graph on zeros: {str(error)[:300]}") from error
    return [large.nbytes - small.nbytes for small, large in zip(one, two, strict=True)]


def _zeros(session: ort.InferenceSession, rows: int, samples: int) -> dict[str, np.ndarray]:
    """Return inputs of zeros for a session."""
    shapes = {value.name: value.shape[1:] for value in session.get_inputs()}
    return {
        name: np.zeros((rows, *(size if isinstance(size, int) else samples for size in shape)), np.float32)
        for name, shape in shapes.items()
    }
