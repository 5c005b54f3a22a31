"""From torch to ONNX: the graphs of service.bundle.manifest's docstring, traced from the model that trained.

The inputs, outputs, dtypes and symbolic sizes are read from the contract itself
(``service.bundle.graph_specs.graph_spec``), so the two cannot drift apart.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, cast, get_args

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from service.bundle.graph_specs import TensorSpec, graph_spec
from service.bundle.manifest import Graph, Likelihood, Manifest, Posterior, Prior, Signature
from service.bundle.operators import check_operators
from service.errors import BundleGraphError
from training.errors import ExportError
from training.export.rewrites import with_weights_in_half, without_logs_of_exponentials
from training.models.base import LatentVariableModel
from training.onnx_messages import MAX_GRAPH_BYTES, strip
from training.progress import Advance

OPSET: Final = 18
"""The opset that torch's exporter writes natively: every later one is a conversion, which can only add faults."""

EXAMPLE_SIZES = {"N": 2, "K": 3, "M": 4}  # sizes to trace with; 0 and 1 would be taken for constants


class GraphModule(nn.Module):
    """One graph of a model. Its forward takes the inputs of the contract, in the contract's order."""

    def __init__(self, model: LatentVariableModel) -> None:
        super().__init__()
        self.model = model


class EncoderGraph(GraphModule):
    """x[, noise][, dither] -> target, loc, scale, z, log_q_z."""

    def forward(self, x: Tensor, *random: Tensor) -> tuple[Tensor, ...]:
        numbers = list(random)
        noise = numbers.pop(0) if self.model.noise_dim else x.new_zeros(x.shape[0], 1, 0)
        target = self.model.likelihood.target(x, numbers.pop(0) if self.model.likelihood.dither else None)
        return (target, *self.model.encode(target).with_moments(noise))


class DecoderGraph(GraphModule):
    """z -> mean and the likelihood's parameters."""

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        likelihood, p = self.model.likelihood, self.model.decode(z)
        return (likelihood.mean(p), *likelihood.parameters_of(p))


class JointGraph(GraphModule):
    """target, z, parameters… -> log p(x|z) or the negative error, the same for each number of x, and log p(z)."""

    def forward(self, target: Tensor, z: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.joint(target, z, self.model.likelihood.of_parameters(parameters)))


class ObservationGraph(GraphModule):
    """parameters…[, noise] -> sample."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        likelihood = self.model.likelihood
        count = len(likelihood.parameter_names)
        parameters, noise = inputs[:count], inputs[count:]
        return (likelihood.sample(likelihood.of_parameters(parameters), *noise),)


class PriorGraph(GraphModule):
    """noise[, choice] -> z."""

    def forward(self, noise: Tensor, *choice: Tensor) -> tuple[Tensor]:
        return (self.model.prior.sample(noise, *choice),)


MODULES: dict[Graph, type[GraphModule]] = {
    "encoder": EncoderGraph,
    "decoder": DecoderGraph,
    "joint": JointGraph,
    "observation": ObservationGraph,
    "prior": PriorGraph,
}
WITHOUT_GRAPH = ("standard_normal", "none")
"""Families of priors that the service draws itself, or that have no draws."""


def roles(model: LatentVariableModel) -> tuple[Graph, ...]:
    """The graphs that are exported from the model; a bundle may hold a backbone besides."""
    every: tuple[Graph, ...] = get_args(Graph)
    own = (role for role in every if role in MODULES)
    return tuple(role for role in own if role != "prior" or model.prior.family not in WITHOUT_GRAPH)


def signature(model: LatentVariableModel) -> Signature:
    """Sizes of the model's graphs."""
    return Signature(
        shape=model.shape, latent_dim=model.latent_dim, noise_dim=model.noise_dim, dither=model.likelihood.dither
    )


def likelihood(model: LatentVariableModel) -> Likelihood:
    """The model's p(x|z) in the contract's words.

    ``static`` binarisation becomes ``dynamic``: the one draw that it keeps is of the training images, and an image that
    arrives at the service has to be drawn anew.
    """
    part = model.likelihood
    binarisation = "dynamic" if part.binarisation == "static" else part.binarisation
    return Likelihood(
        family=part.family,
        parameters=list(part.parameter_names),
        measure=part.measure,
        pixelwise=part.pixelwise,
        observation_noise=part.observation_noise,
        binarisation=cast(Any, binarisation),
    )


def prior(model: LatentVariableModel) -> Prior:
    """The model's p(z) in the contract's words."""
    part = model.prior
    if part.family in WITHOUT_GRAPH:
        return Prior(family=part.family)
    return Prior(family=part.family, noise_dim=part.noise_dim, choice=part.choice)


def posterior(model: LatentVariableModel) -> Posterior:
    """The model's q(z|x) in the contract's words."""
    return Posterior(family=model.posterior_family, moments=model.moments)


def export_graphs(model: LatentVariableModel, progress: Advance = lambda done: None) -> dict[Graph, bytes]:
    """The model's graphs as serialised ONNX, weights inside. Raises ExportError.

    ``model`` is exported in eval mode, in float32, on the CPU; ``progress`` is told of each graph.
    """
    if model.training:
        raise ExportError("the model is in training mode: dropout would become part of the graphs")
    draft, graphs = _draft(model), {}
    for role in roles(model):
        graphs[role] = export_graph(model, draft, role)
        progress(1)
    return graphs


def export_corruption(network: nn.Module, model: LatentVariableModel) -> bytes:
    """The graph ``corruption`` of a network beside ``model``, in eval mode. Raises ExportError."""
    return _exported(network, _draft(model), "corruption")


def _draft(model: LatentVariableModel) -> Manifest:
    """What graph_spec reads of a manifest; the rest does not exist yet."""
    return Manifest.model_construct(signature=signature(model), likelihood=likelihood(model), prior=prior(model))


def export_graph(model: LatentVariableModel, manifest: Manifest, role: Graph) -> bytes:
    """One graph, checked by onnx.checker and against the contract's operators. Raises ExportError."""
    return _exported(MODULES[role](model).eval(), manifest, role)


def _exported(module: nn.Module, manifest: Manifest, role: Graph) -> bytes:
    spec = graph_spec(manifest, role)
    with _quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(_example(tensor) for tensor in spec.inputs),
            dynamo=True,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=_dynamic_shapes(module, spec.inputs),
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    strip(proto)
    without_logs_of_exponentials(proto.graph)
    with_weights_in_half(proto.graph)
    return _checked(proto, role)


def _checked(proto: onnx.ModelProto, role: Graph) -> bytes:
    if proto.ByteSize() > MAX_GRAPH_BYTES:
        raise ExportError(f"{role}: {proto.ByteSize()} bytes do not fit into one ONNX file; make the network smaller")
    opsets = {entry.domain: entry.version for entry in proto.opset_import}
    if opsets != {"": OPSET}:
        raise ExportError(f"{role}: the exporter wrote operator sets {opsets}, expected opset {OPSET} alone")
    try:
        onnx.checker.check_model(proto, full_check=True)
        data: bytes = proto.SerializeToString(deterministic=True)
        check_operators(data)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, BundleGraphError) as error:
        raise ExportError(f"{role}: the exported graph is not valid: {error}") from error
    return data


def _example(tensor: TensorSpec) -> Tensor:
    """A tensor of the spec's shape, of values that every graph accepts: ½."""
    sizes = [EXAMPLE_SIZES[size] if isinstance(size, str) else size for size in tensor.shape]
    return torch.full(sizes, 0.5, dtype=torch.float32)


def _dynamic_shapes(module: nn.Module, inputs: tuple[TensorSpec, ...]) -> tuple[Any, ...]:
    """Which axes are symbolic; inputs beyond the forward's named parameters are its variable arguments."""
    dims = {symbol: Dim(symbol) for symbol in EXAMPLE_SIZES}
    axes = [{i: dims[size] for i, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs]
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    named = sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
    rest = axes[named:]
    return (*axes[:named], *([tuple(rest)] if rest else []))


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's remarks that ask nothing of us; every other warning stays one."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")  # "torchvision is not installed"
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Several inputs share the axes N, K and M on purpose: the exporter keeps the first one's name for all.
            warnings.filterwarnings("ignore", r"# The axis name: \w will not be used", UserWarning)
            # torch 2.13 copies a pytree class that it has itself deprecated.
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
            yield
    finally:
        registration.setLevel(level)
