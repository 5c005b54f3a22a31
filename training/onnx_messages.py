"""What every ONNX message that ends in a bundle has to satisfy: its size, and no notes of the machine that wrote it."""

from __future__ import annotations

import onnx

MAX_GRAPH_BYTES = 2**31 - 1  # of one protobuf message: beyond it weights would have to lie in other files


def strip(proto: onnx.ModelProto) -> None:
    """Remove what the exporter noted for debugging: stack traces with the paths of this machine among it."""
    graph = proto.graph
    for message in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        message.ClearField("metadata_props")
        message.ClearField("doc_string")
    graph.ClearField("value_info")  # shapes of intermediate tensors: the runtime infers them itself
