"""Inputs and outputs of each graph of a bundle: names, dtypes and shapes, some of whose sizes are symbols."""

from __future__ import annotations

from typing import Literal, NamedTuple

from service.bundle.manifest import Graph, Manifest
from service.errors import BundleFormatError


class TensorSpec(NamedTuple):
    """One input or output of a graph: ``shape`` holds sizes, and the symbols N, K and M for sizes that vary."""

    name: str
    dtype: Literal["float32", "float64"]
    shape: tuple[int | str, ...]


class GraphSpec(NamedTuple):
    """The inputs and outputs that the contract requires of one graph, in its order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def graph_spec(manifest: Manifest, role: Graph) -> GraphSpec:
    """Return the inputs and outputs of a graph for the manifest's sizes, as service.bundle's docstring lists them.

    Raises BundleFormatError for the prior of a family that needs no graph, and for a backbone that the manifest does
    not describe.
    """
    image, latent_dim, names = manifest.signature.shape, manifest.signature.latent_dim, manifest.likelihood.parameters
    if role == "encoder":
        return _encoder_spec(manifest)
    if role == "decoder":
        outputs = tuple(_floats(name, "M", *image) for name in ("mean", *names))
        return GraphSpec((_floats("z", "M", latent_dim),), outputs)
    if role == "density":
        return _density_spec(manifest)
    if role == "observation":
        parameters = tuple(_floats(name, "M", *image) for name in names)
        return GraphSpec((*parameters, _floats("noise", "M", *image)), (_floats("sample", "M", *image),))
    if role == "backbone":
        return _backbone_spec(manifest)
    if role == "corruption":
        return GraphSpec((_floats("x", "N", *image),), (_floats("log_odds", "N", *image[1:]),))
    if manifest.prior.noise_dim is None:
        raise BundleFormatError(f"family {manifest.prior.family!r} of the prior is not drawn by a graph")
    choice = (_floats("choice", "M"),) if manifest.prior.choice else ()
    return GraphSpec((_floats("noise", "M", manifest.prior.noise_dim), *choice), (_floats("z", "M", latent_dim),))


def _floats(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _nats(name: str) -> TensorSpec:
    """Describe log densities by row and sample, in nats."""
    return TensorSpec(name, "float64", ("N", "K"))


def _encoder_spec(manifest: Manifest) -> GraphSpec:
    signature = manifest.signature
    image, latent_dim = signature.shape, signature.latent_dim
    dither = (_floats("dither", "N", *image),) if signature.dither else ()
    inputs = (_floats("x", "N", *image), _floats("noise", "N", "K", signature.noise_dim), *dither)
    posterior = (_floats("loc", "N", latent_dim), _floats("scale", "N", latent_dim))
    sample = (_floats("z", "N", "K", latent_dim), _nats("log_q"))
    return GraphSpec(inputs, (_floats("target", "N", *image), *posterior, *sample))


def _density_spec(manifest: Manifest) -> GraphSpec:
    image, latent_dim = manifest.signature.shape, manifest.signature.latent_dim
    inputs = (_floats("target", "N", *image), _floats("z", "N", "K", latent_dim))
    parameters = tuple(_floats(name, "N", "K", *image) for name in manifest.likelihood.parameters)
    outputs = (_nats("log_p_x"), _floats("log_p_x_map", "N", "K", *image), _nats("log_p_z"))
    return GraphSpec((*inputs, *parameters), outputs)


def _backbone_spec(manifest: Manifest) -> GraphSpec:
    """Return the input and output of the graph "backbone". Raises BundleFormatError if the manifest has none."""
    backbone = manifest.backbone
    if backbone is None:
        raise BundleFormatError("the manifest describes no backbone")
    rows: int | str = "N" if backbone.batch == "any" else 1
    return GraphSpec(
        (TensorSpec("x", "float32", (rows, *manifest.preprocessing.shape)),),
        (TensorSpec("features", "float32", (rows, *backbone.natural)),),
    )
