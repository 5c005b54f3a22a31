"""A user's ONNX feature extractor made into a bundle's backbone.onnx: one input, one output, what normalises inside.

The file may come from anywhere. What is taken of it is the part that leads from its one image input to the chosen
tensor, as standard operators without external data (service.bundle.operators); the rest, classifier heads say, is cut
off. It is then run on noise, to find out what its features are and how many rows it takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, inliner, numpy_helper
from pydantic import ValidationError

from service.bundle.input_rules import Backbone, InputRule
from service.bundle.operators import check_operators
from service.errors import BundleGraphError
from service.inference.sessions import Runtime
from training.config import BackboneConfig, Config
from training.errors import BackboneError
from training.onnx_messages import MAX_GRAPH_BYTES, strip

Dim = int | str
Shape = tuple[int, int, int]
OLDEST_OPSET = 7  # from it on Sub and Div broadcast
PREFIX = "backbone/"
"""Before every name of the user's graph, lest one be called x or features."""


class Imported(NamedTuple):
    """A serialised backbone.onnx, what it is, and the shape (C, H, W) of its images."""

    graph: bytes
    backbone: Backbone
    image: Shape


def read_backbone(path: Path) -> tuple[onnx.ModelProto, str]:
    """The ONNX model in that file, and the file's SHA-256. Raises BackboneError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BackboneError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise BackboneError(f"{path}: is no ONNX model ({error})") from error
    if not model.graph.node:
        raise BackboneError(f"{path}: is no ONNX model, or one without a node")
    return model, hashlib.sha256(data).hexdigest()


def settled(config: Config) -> Config:
    """The configuration with what the backbone's file decides: its hash, and the size and mode of the images.

    Raises BackboneError, also where the configuration asks for other images than the backbone takes.
    """
    if config.backbone is None:
        return config
    path = Path(config.backbone.path).expanduser()
    model, sha256 = read_backbone(path)
    _, channels, height, width = _image_dims(_only_input(model, path), path)
    data = config.data
    if isinstance(height, int) and isinstance(width, int):
        if data.shape is not None and data.shape != (height, width):
            raise BackboneError(
                f"{path} takes images of {height}×{width} pixels, data.size asks for {data.shape[0]}×{data.shape[1]}"
            )
        data = data.model_copy(update={"size": (height, width)})
    if isinstance(channels, int):
        mode = "L" if channels == 1 else "RGB"
        if data.mode not in ("auto", mode):
            raise BackboneError(f"{path} takes {channels} channels (mode {mode}), data.mode asks for {data.mode}")
        data = data.model_copy(update={"mode": mode})
    backbone = config.backbone.model_copy(update={"path": str(path.resolve()), "sha256": sha256})
    return config.model_copy(update={"data": data, "backbone": backbone})


def import_backbone(config: BackboneConfig, rule: InputRule) -> Imported:
    """The user's file as a bundle's graph for images of that rule. Raises BackboneError: each mismatch in words."""
    path = Path(config.path)
    model, sha256 = read_backbone(path)
    if config.sha256 and sha256 != config.sha256:
        raise BackboneError(
            f"{path} has changed: its sha256 is {sha256[:12]}…, the run began with {config.sha256[:12]}…"
        )
    if rule.kind != "image":
        raise BackboneError(f"{path}: a backbone is for images, these rows are {rule.kind}s")
    model = _inlined(model, path)
    source = _only_input(model, path)
    batch = _image_dims(source, path)[0]
    _check_image(source, rule.shape, path)
    _check_normalisation(config, rule.shape[0])
    output = _chosen_output(model, config.output, path)
    wrapped = _wrapped(model, source.name, output, config, rule.shape, batch)
    found, graph = _tried(wrapped, rule.shape, isinstance(batch, int), f"{path}, output {output!r}")
    described = {"output": output, "sha256": sha256, "mean": config.mean or None, "std": config.std or None}
    return Imported(graph, found.model_copy(update=described), rule.shape)


def _inlined(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """The model without functions of its own, training information and weights among its inputs."""
    if model.functions:
        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:  # the C++ checker raises RuntimeError and others for functions that call themselves
            raise BackboneError(f"{path}: its local functions cannot be inlined ({_first_line(error)})") from error
    del model.training_info[:]
    weights = {tensor.name for tensor in (*model.graph.initializer, *model.graph.sparse_initializer)}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)  # before, weights had to be inputs
    return model


def _only_input(model: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    weights = {tensor.name for tensor in (*model.graph.initializer, *model.graph.sparse_initializer)}
    found = [value for value in model.graph.input if value.name not in weights]
    if len(found) != 1:
        names = ", ".join(value.name for value in found) or "none"
        raise BackboneError(f"{path} has {len(found)} inputs ({names}): one expected, the images")
    return found[0]


def _image_dims(source: onnx.ValueInfoProto, path: Path) -> tuple[Dim, Dim, Dim, Dim]:
    """Sizes N, C, H, W of the input, a name or "" where one is open. Raises BackboneError: not float32 N×C×H×W."""
    tensor = source.type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        raise BackboneError(f"{path}: input {source.name!r} is {_type_name(tensor.elem_type)}, float32 expected")
    dims: list[Dim] = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim]
    shown = "×".join(str(d or "?") for d in dims)
    if len(dims) != 4:
        raise BackboneError(f"{path}: input {source.name!r} is {shown or 'of no known shape'}, N×C×H×W expected")
    batch, channels, height, width = dims
    if isinstance(channels, int) and channels not in (1, 3):
        hint = "; transpose N×H×W×C to N×C×H×W at export" if width in (1, 3) else ""
        raise BackboneError(f"{path}: input {source.name!r} is {shown}: C of 1 or 3 expected{hint}")
    if isinstance(batch, int) and batch != 1:
        raise BackboneError(f"{path}: input {source.name!r} is {shown}: export with a batch of 1, or an open one")
    return batch, channels, height, width


def _check_image(source: onnx.ValueInfoProto, image: Shape, path: Path) -> None:
    dims = _image_dims(source, path)[1:]
    if any(isinstance(dim, int) and dim != size for dim, size in zip(dims, image, strict=True)):
        wanted, found = ("×".join(str(d or "?") for d in sizes) for sizes in (dims, image))
        raise BackboneError(f"{path} takes images of {wanted}, the data's are {found}")


def _check_normalisation(config: BackboneConfig, channels: int) -> None:
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values and len(values) not in (1, channels):
            raise BackboneError(f"backbone.{name} has {len(values)} numbers, 1 or one for each of {channels} channels")


def _chosen_output(model: onnx.ModelProto, asked: str, path: Path) -> str:
    """The asked tensor, an output or one on the way to it, or else the only output. Raises BackboneError."""
    outputs = [value.name for value in model.graph.output]
    if not asked:
        if len(outputs) != 1:
            raise BackboneError(f"{path} has outputs {', '.join(outputs)}: say which with --backbone-output")
        return outputs[0]
    between = {name for node in model.graph.node for name in node.output if name}
    if asked not in between:
        shown = ", ".join(outputs[:10])
        raise BackboneError(f"{path} has no tensor {asked!r}; its outputs are {shown}, any tensor between may be named")
    return asked


def _needed(model: onnx.ModelProto, output: str) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that the tensor depends on, in their order, and every name that they read."""
    wanted, kept = {output}, []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= {name for name in node.input if name}
    return kept[::-1], wanted


def _wrapped(
    model: onnx.ModelProto, source: str, output: str, config: BackboneConfig, image: Shape, batch: Dim
) -> onnx.ModelProto:
    """x -> (x − mean)/std -> the user's nodes -> features, whose shape is left open."""
    nodes, wanted = _needed(model, output)
    part = onnx.ModelProto()
    part.ir_version = model.ir_version
    part.opset_import.extend(_opsets(model, nodes, config.path))
    part.graph.name = "backbone"
    before, constants = _normalisation(config, PREFIX + source)
    after = helper.make_node("Identity", [PREFIX + output], ["features"])
    part.graph.node.extend([*before, *_without_dropout(nodes, wanted), after])
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in wanted)
    part.graph.sparse_initializer.extend(t for t in model.graph.sparse_initializer if t.values.name in wanted)
    _prefix(part.graph, len(before))
    part.graph.initializer.extend(constants)
    part.graph.input.append(
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch if isinstance(batch, int) else "N", *image])
    )
    part.graph.output.append(helper.make_empty_tensor_value_info("features"))
    strip(part)
    _check_operators(part, config.path)
    if source not in wanted:  # only now, for a loop may read it inside
        raise BackboneError(f"{config.path}: {output!r} does not depend on the images {source!r}")
    return part


def _prefix(graph: onnx.GraphProto, before: int) -> None:
    """Put PREFIX before the user's names: those of all weights, and of all nodes but the first and the last ones."""
    for node in graph.node[before:-1]:
        for names in (node.input, node.output):
            names[:] = [name and PREFIX + name for name in names]
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        tensor.name = PREFIX + tensor.name


def _check_operators(model: onnx.ModelProto, where: str) -> None:
    """Raises BackboneError for what no bundle may hold."""
    try:
        check_operators(_serialised(model, where))
    except BundleGraphError as error:
        raise BackboneError(f"{where}: {error}") from error


def _opsets(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], path: str) -> list[onnx.OperatorSetIdProto]:
    """The operator sets that these nodes are of."""
    domains = {node.domain or "" for node in nodes} - {"ai.onnx"} | {""}
    standard = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not standard or not OLDEST_OPSET <= standard[0] <= newest or model.ir_version > onnx.IR_VERSION:
        raise BackboneError(
            f"{path} is of opset {standard[0] if standard else 'none'}, IR version {model.ir_version}: opset "
            f"{OLDEST_OPSET} to {newest}, IR version up to {onnx.IR_VERSION} expected; export with an older opset"
        )
    return [helper.make_opsetid("", standard[0])] + [
        entry for entry in model.opset_import if entry.domain in domains - {""}
    ]


def _without_dropout(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Dropout, which does nothing outside a training, as Identity."""
    return [
        helper.make_node("Identity", node.input[:1], node.output[:1])
        if node.op_type == "Dropout" and len(node.input) < 3 and not wanted & set(node.output[1:])
        else node
        for node in nodes
    ]


def _normalisation(config: BackboneConfig, to: str) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes x -> ``to``, and their constants [1,C,1,1]."""
    nodes, constants, last = [], [], "x"
    for operator, name, values in (("Sub", "mean", config.mean), ("Div", "std", config.std)):
        if values:
            column = np.array(values, np.float32).reshape(1, -1, 1, 1)
            constants.append(numpy_helper.from_array(column, name))
            nodes.append(helper.make_node(operator, [last, name], [f"normalised_by_{name}"]))
            last = f"normalised_by_{name}"
    return [*nodes, helper.make_node("Identity", [last], [to])], constants


def _tried(model: onnx.ModelProto, image: Shape, fixed: bool, where: str) -> tuple[Backbone, bytes]:
    """What the features are, found by running the graph on one row and, unless its batch is fixed, on two."""
    try:
        one = _features(model, image, 1, where)
        batch = "one" if fixed or not _takes_two(model, image, one.shape[1:], where) else "any"
    except BundleGraphError as error:
        raise BackboneError(f"{where}: {error}") from error
    if one.ndim == 4 and one.shape[2:] == (1, 1):  # pooled, and not yet flattened
        model.graph.node[-1].CopyFrom(helper.make_node("Flatten", model.graph.node[-1].input, ["features"], axis=1))
        one = one.reshape(1, -1)
    if one.ndim not in (2, 4) or one.size == 0:
        shape = "×".join(map(str, one.shape))
        raise BackboneError(f"{where} is {shape} of one image: 1×F (pooled) or 1×F×h×w (a map) expected; name another")
    if not np.isfinite(one).all():
        raise BackboneError(f"{where}: its features of an image of noise are not finite")
    rows: Dim = "N" if batch == "any" else 1
    _set_dims(model.graph.input[0], [rows, *image])
    _set_dims(model.graph.output[0], [rows, *one.shape[1:]])
    found: dict[str, Any] = {"kind": "vector" if one.ndim == 2 else "map", "natural": one.shape[1:], "batch": batch}
    try:
        onnx.checker.check_model(model, full_check=True)
        return Backbone.model_validate(found), _serialised(model, where)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValidationError) as error:
        raise BackboneError(f"{where}: no bundle can hold it: {_first_line(error)}") from error


def _features(model: onnx.ModelProto, image: Shape, rows: int, where: str) -> np.ndarray:
    """The graph's output for so many images of noise. Raises BundleGraphError, BackboneError."""
    session = Runtime("cpu", threads=1).session(_serialised(model, where))
    x = np.random.RandomState(0).random_sample((rows, *image)).astype(np.float32)
    try:
        features: np.ndarray = session.run(["features"], {"x": x})[0]
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own but Exception
        raise BackboneError(
            f"{where}: ONNX Runtime cannot run it on {rows} of {image}: {_first_line(error)}"
        ) from error
    if features.dtype != np.float32:
        raise BackboneError(f"{where} is {features.dtype}, float32 expected")
    if features.ndim == 0 or len(features) != rows:
        raise BackboneError(f"{where} is of shape {features.shape} for {rows} rows: the rows first expected")
    return features


def _takes_two(model: onnx.ModelProto, image: Shape, shape: tuple[int, ...], where: str) -> bool:
    """Whether the batch is as open as the graph says: a fixed one may hide in a Reshape."""
    try:
        return _features(model, image, 2, where).shape[1:] == shape
    except BackboneError:
        return False


def _set_dims(value: onnx.ValueInfoProto, dims: Sequence[Dim]) -> None:
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, list(dims)))


def _serialised(model: onnx.ModelProto, where: str) -> bytes:
    if model.ByteSize() > MAX_GRAPH_BYTES:
        raise BackboneError(f"{where}: {model.ByteSize()} bytes do not fit into one ONNX file")
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _type_name(elem_type: int) -> str:
    return TensorProto.DataType.Name(elem_type).lower() if elem_type else "no tensor"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
