"""Rewriting exported graphs where the exporter leaves a detour that costs the service, or room."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MIN_WEIGHTS = 256  # of a tensor that is worth a Cast


def without_logs_of_exponentials(graph: onnx.GraphProto) -> None:
    """log(exp(a)) becomes a, in place.

    A diagonal Gaussian's log scale is such a one. ONNX Runtime's Log has two code paths, and because of it
    service.inference.batch_invariance would run a single row as four. A graph that has others inside is left as it is.
    """
    if any(attribute.type == onnx.AttributeProto.GRAPH for node in graph.node for attribute in node.attribute):
        return
    exponents = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Exp"}
    outputs = {output.name for output in graph.output}
    logs = [
        node
        for node in graph.node
        if node.op_type == "Log" and node.input[0] in exponents and node.output[0] not in outputs
    ]
    instead = {node.output[0]: exponents[node.input[0]] for node in logs}
    for output, name in instead.items():
        while name in instead:  # the logarithm of another such one
            name = instead[name]
        instead[output] = name
    for node in logs:
        graph.node.remove(node)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = instead.get(name, name)
    _drop_unused(graph, [node.input[0] for node in logs])


def _drop_unused(graph: onnx.GraphProto, names: list[str]) -> None:
    """Remove nodes that give one of these and nothing that is still read."""
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    for node in [node for node in graph.node if set(node.output) <= set(names) - read]:
        graph.node.remove(node)


def with_weights_in_half(graph: onnx.GraphProto) -> None:
    """Store float32 weights that float16 holds exactly as such, in place, with a Cast before them.

    It halves the file and changes no number: ONNX Runtime undoes it once, as it loads the graph.
    """
    casts = []
    for weight in graph.initializer:
        if weight.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(weight)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.size < MIN_WEIGHTS or not np.array_equal(half, values):
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
