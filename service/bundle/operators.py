"""Checks of what a graph of a bundle contains, read from the ONNX file itself before ONNX Runtime sees it.

A graph is a pure function of its inputs, whole in its file: only the operators below, all of the standard domain; no
control flow (a loop could run for ever), no random numbers (noise is an input), no functions, and no external data
(which names files elsewhere). Field numbers are those of onnx.proto; one that is not known here is refused, since it
might hold what this reader looks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnxruntime as ort

from service.bundle.graph_specs import TensorSpec, graph_spec
from service.bundle.manifest import Graph, Manifest
from service.bundle.protobuf import BYTES, VARINT, Field, MalformedMessageError, fields
from service.errors import BundleGraphError

OPERATOR_GROUPS = {
    "arithmetic": "Abs Add Ceil Clip CumSum Div Exp Floor Log Max Mean Min Mod Mul Neg Pow Reciprocal Round Sign Sqrt "
    "Sub Sum",
    "nonlinearities": "Celu Elu Erf Gelu HardSigmoid HardSwish LeakyRelu LogSoftmax Mish PRelu Relu Selu Sigmoid "
    "Softmax Softplus Softsign Swish Tanh ThresholdedRelu",
    "trigonometry": "Acos Acosh Asin Asinh Atan Atanh Cos Cosh Sin Sinh Tan",
    "linear algebra": "Conv ConvTranspose Det Einsum Gemm MatMul",
    "normalisation and pooling": "AveragePool BatchNormalization GlobalAveragePool GlobalMaxPool GroupNormalization "
    "InstanceNormalization LayerNormalization LRN LpNormalization MaxPool MeanVarianceNormalization RMSNormalization",
    "reductions": "ArgMax ArgMin ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
    "ReduceProd ReduceSum ReduceSumSquare TopK",
    "logic": "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Where Xor",
    "shapes": "Cast CastLike Concat Constant ConstantOfShape DepthToSpace Expand EyeLike Flatten Gather GatherElements "
    "GatherND Identity OneHot Pad Range Reshape Resize ScatterElements ScatterND Shape Size Slice SpaceToDepth Split "
    "Squeeze Tile Transpose Trilu Unsqueeze",
}
OPERATORS = frozenset(operator for group in OPERATOR_GROUPS.values() for operator in group.split())

MAX_GRAPH_DEPTH = 8
MAX_NODES = 200_000

# The fields of each message of onnx.proto: number -> name of a nested message that is looked into, or "" for a value.
MESSAGES: dict[str, dict[int, str]] = {
    "Model": {1: "", 2: "", 3: "", 4: "", 5: "", 6: "", 7: "Graph", 8: "Opset", 14: "", 20: "Refused", 25: "Refused"},
    "Opset": {1: "Domain", 2: ""},
    "Graph": {1: "Node", 2: "", 5: "Tensor", 10: "", 11: "", 12: "", 13: "", 15: "SparseTensor", 16: ""},
    "Node": {1: "", 2: "", 3: "", 4: "Operator", 5: "Attribute", 6: "", 7: "Domain", 8: "", 9: ""},
    "Attribute": {1: "", 2: "", 3: "", 4: "", 5: "Tensor", 6: "Graph", 7: "", 8: "", 9: "", 10: "Tensor", 11: "Graph"}
    | {13: "", 14: "", 15: "", 20: "", 21: "", 22: "SparseTensor", 23: "SparseTensor"},
    "Tensor": {1: "", 2: "", 3: "", 4: "", 5: "", 6: "", 7: "", 8: "", 9: "", 10: "", 11: "", 12: "", 16: ""}
    | {13: "ExternalData", 14: "DataLocation"},
    "SparseTensor": {1: "Tensor", 2: "Tensor", 3: ""},
}
TENSOR_TYPES = {"float32": "tensor(float)", "float64": "tensor(double)"}


def check_operators(model: bytes) -> Counter[str]:
    """Count the operators of a serialised ONNX model.

    Raises BundleGraphError where the model breaks one of the rules that this module's docstring states.
    """
    try:
        operators: Counter[str] = Counter()
        graphs = 0
        for name, field in _visit("Model", memoryview(model), 0):
            _check(name, field)
            if name == "Operator":
                operators[_text(field)] += 1
            graphs += name == "Graph"
            if operators.total() > MAX_NODES:
                raise BundleGraphError(f"the graph has more than {MAX_NODES} nodes")
    except MalformedMessageError as error:
        raise BundleGraphError(f"the file is not a serialised ONNX model: {error}") from error
    if not graphs:
        raise BundleGraphError("the file is not a serialised ONNX model: it holds no graph")
    return operators


def _visit(message: str, content: memoryview, depth: int) -> Iterator[tuple[str, Field]]:
    """Yield every field of the message, and of those nested in it, that MESSAGES names, with that name."""
    names = MESSAGES[message]
    for field in fields(content):
        if field.number not in names:
            raise BundleGraphError(f"field {field.number} of ONNX's {message}Proto is not known to this vaeserve")
        name = names[field.number]
        if not name:
            continue
        yield name, field
        if name in MESSAGES:
            if field.wire_type != BYTES:
                raise MalformedMessageError(f"field {field.number} of {message} is no message")
            deeper = depth + (name == "Graph")
            if deeper > MAX_GRAPH_DEPTH:
                raise BundleGraphError(f"graphs are nested more than {MAX_GRAPH_DEPTH} deep")
            yield from _visit(name, field.payload, deeper)


def _check(name: str, field: Field) -> None:
    """Check one field.

    Raises BundleGraphError for an operator or a domain outside the list, external data, functions and training
    information.
    """
    if name == "Operator":
        operator = _text(field)
        if operator not in OPERATORS:
            raise BundleGraphError(f"operator {operator!r} is not among the allowed ones of ai.onnx; export without it")
    elif name == "Domain":
        domain = _text(field)
        if domain not in ("", "ai.onnx"):
            raise BundleGraphError(f"operator domain {domain!r} is not ai.onnx; export with standard operators only")
    elif name == "ExternalData" or (name == "DataLocation" and (field.wire_type != VARINT or field.integer != 0)):
        raise BundleGraphError("a tensor's data lies outside the graph's file; export with external_data=False")
    elif name == "Refused":
        raise BundleGraphError("the model holds local functions or training information; inline them at export")


def _text(field: Field) -> str:
    return bytes(field.payload[:128]).decode("utf-8", "replace")


def check_signature(session: ort.InferenceSession, manifest: Manifest, role: Graph) -> None:
    """Check that a graph's inputs and outputs are the contract's for this manifest. Raises BundleGraphError."""
    spec = graph_spec(manifest, role)
    for kind, tensors, arguments in (
        ("inputs", spec.inputs, session.get_inputs()),
        ("outputs", spec.outputs, session.get_outputs()),
    ):
        by_name = {argument.name: argument for argument in arguments}
        if set(by_name) != {tensor.name for tensor in tensors}:
            names = [tensor.name for tensor in tensors]
            raise BundleGraphError(f"{role} has {kind} {sorted(by_name)}, the manifest's signature wants {names}")
        for tensor in tensors:
            _check_tensor(role, tensor, by_name[tensor.name], kind == "inputs")


def _check_tensor(role: str, tensor: TensorSpec, argument: ort.NodeArg, is_input: bool) -> None:
    """Check one tensor's type and shape. Output sizes that ONNX did not infer (symbols) are left to the replay.

    Raises BundleGraphError.
    """
    sizes = argument.shape
    fits = len(sizes) == len(tensor.shape) and all(
        not isinstance(size, int)
        if isinstance(expected, str)
        else size == expected or (not is_input and not isinstance(size, int))
        for expected, size in zip(tensor.shape, sizes, strict=True)
    )
    if argument.type != TENSOR_TYPES[tensor.dtype] or not fits:
        raise BundleGraphError(
            f"{role}'s {tensor.name} is {argument.type} {sizes}, the manifest's signature wants "
            f"{TENSOR_TYPES[tensor.dtype]} {list(tensor.shape)}"
        )
