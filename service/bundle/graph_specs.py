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
    """Inputs and outputs of the graph ``role`` for the manifest's sizes, as the docstring of service.bundle lists them.

    Raises BundleFormatError for the prior of a family that needs no graph, and for a backbone that the manifest does
    not describe.
    """
    image, latent = manifest.signature.shape, manifest.signature.latent_dim
    names = manifest.likelihood.parameters

    def floats(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name, "float32", shape)

    def nats(name: str) -> TensorSpec:
        return TensorSpec(name, "float64", ("N", "K"))

    if role == "encoder":
        dither = (floats("dither", "N", *image),) if manifest.signature.dither else ()
        return GraphSpec(
            (floats("x", "N", *image), floats("noise", "N", "K", manifest.signature.noise_dim), *dither),
            (
                floats("target", "N", *image),
                floats("loc", "N", latent),
                floats("scale", "N", latent),
                floats("z", "N", "K", latent),
                nats("log_q"),
            ),
        )
    if role == "decoder":
        outputs = tuple(floats(name, "M", *image) for name in ("mean", *names))
        return GraphSpec((floats("z", "M", latent),), outputs)
    if role == "density":
        inputs = (floats("target", "N", *image), floats("z", "N", "K", latent))
        parameters = tuple(floats(name, "N", "K", *image) for name in names)
        return GraphSpec(
            (*inputs, *parameters), (nats("log_p_x"), floats("log_p_x_map", "N", "K", *image), nats("log_p_z"))
        )
    if role == "observation":
        parameters = tuple(floats(name, "M", *image) for name in names)
        return GraphSpec((*parameters, floats("noise", "M", *image)), (floats("sample", "M", *image),))
    if role == "backbone":
        return _backbone_spec(manifest)
    if role == "corruption":
        return GraphSpec((floats("x", "N", *image),), (floats("log_odds", "N", *image[1:]),))
    if manifest.prior.noise_dim is None:
        raise BundleFormatError(f"family {manifest.prior.family!r} of the prior is not drawn by a graph")
    choice = (floats("choice", "M"),) if manifest.prior.choice else ()
    return GraphSpec((floats("noise", "M", manifest.prior.noise_dim), *choice), (floats("z", "M", latent),))


def _backbone_spec(manifest: Manifest) -> GraphSpec:
    """Input and output of the graph "backbone". Raises BundleFormatError where the manifest describes none."""
    backbone = manifest.backbone
    if backbone is None:
        raise BundleFormatError("the manifest describes no backbone")
    rows: int | str = "N" if backbone.batch == "any" else 1
    return GraphSpec(
        (TensorSpec("x", "float32", (rows, *manifest.preprocessing.shape)),),
        (TensorSpec("features", "float32", (rows, *backbone.natural)),),
    )
