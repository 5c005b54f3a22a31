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
    if role == "joint":
        return _joint_spec(manifest)
    if role == "observation":
        return _observation_spec(manifest)
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


def _doubles(name: str, samples: int | str) -> TensorSpec:
    """Describe numbers by row and sample in float64: log densities in nats, or minus a reconstruction error."""
    return TensorSpec(name, "float64", ("N", samples))


def _encoder_spec(manifest: Manifest) -> GraphSpec:
    signature = manifest.signature
    image, latent_dim = signature.shape, signature.latent_dim
    dither = (_floats("dither", "N", *image),) if signature.dither else ()
    samples: int | str = "K" if signature.noise_dim else 1
    noise = (_floats("noise", "N", samples, signature.noise_dim),) if signature.noise_dim else ()
    target, posterior = _floats("target", "N", *image), (_floats(name, "N", latent_dim) for name in ("loc", "scale"))
    sample = (_floats("z", "N", samples, latent_dim), _doubles("log_q_z", samples))
    return GraphSpec((_floats("x", "N", *image), *noise, *dither), (target, *posterior, *sample))


def _joint_spec(manifest: Manifest) -> GraphSpec:
    image, latent_dim = manifest.signature.shape, manifest.signature.latent_dim
    inputs = (_floats("target", "N", *image), _floats("z", "N", "K", latent_dim))
    parameters = tuple(_floats(name, "N", "K", *image) for name in manifest.likelihood.parameters)
    fit = manifest.likelihood.fit_output
    outputs = (_doubles(fit, "K"), _floats(f"{fit}_map", "N", "K", *image), _doubles("log_p_z", "K"))
    return GraphSpec((*inputs, *parameters), outputs)


def _observation_spec(manifest: Manifest) -> GraphSpec:
    image, likelihood = manifest.signature.shape, manifest.likelihood
    parameters = tuple(_floats(name, "M", *image) for name in likelihood.parameters)
    noise = () if likelihood.observation_noise == "none" else (_floats("noise", "M", *image),)
    return GraphSpec((*parameters, *noise), (_floats("sample", "M", *image),))


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
