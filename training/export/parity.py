"""reference.npz: inputs and what the trainer saw, and how far a graph may be from it."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from torch import Tensor, nn

from service.bundle.input_rules import Backbone
from service.bundle.manifest import Tolerance
from training.data import Dataset
from training.data.batches import derived_seed, to_unit
from training.distributions import unflattened
from training.export.graphs import roles
from training.models.base import LatentVariableModel
from training.models.likelihood import Likelihood

Arrays = dict[str, np.ndarray]

IMAGES, SAMPLES = 4, 3  # rows N and samples K of the reference
DRAWS = 8  # rows M of the prior's reference
MAX_PIXELS = 2**16  # of the reference's N·K images: bounds its file to a few MB for large images
RTOL = 1e-4
"""Two float32 implementations of one network differ by rounding that grows with depth and width: some 1e-6 of the value
was measured on the shipped models. A hundred times that still finds every real defect (another weight, activation,
padding or order of axes changes outputs by far more than 1e-2 of their size)."""
ATOL_BY_SCALE = 1e-5
"""Of the output's largest magnitude: where terms cancel, rounding is relative to what was summed, not to the sum."""
NAT_BY_TERM = 1e-6
"""Of Σ |log p(x_i|z)| over the pixels: a sum of float32 terms of either sign, each some 1e-7 off."""
ONE_LEVEL = 1.01 / 255
"""A draw on the edge between two grey levels may round either way."""
EDGE = 1e-3
"""Uniform noise stays so far from the probability it is compared with that rounding cannot turn a pixel over."""


@torch.no_grad()
def reference_arrays(model: LatentVariableModel, dataset: Dataset, seed: int = 0) -> Arrays:
    """Inputs x, noise, dither, observation_noise and the model's outputs, named as service.bundle.manifest.Reference
    says.

    ``x`` are the first images of the test split; ``model`` is in eval mode, in float32, on the CPU.
    """
    count = math.prod(model.shape)
    samples = max(1, min(SAMPLES, MAX_PIXELS // (IMAGES * count)))
    x = to_unit(dataset.pixels(dataset.splits["test"][:IMAGES]))
    generator = torch.Generator().manual_seed(derived_seed(seed, "reference"))
    samples = samples if model.noise_dim else 1
    noise = torch.randn(len(x), samples, model.noise_dim, generator=generator)
    dither = torch.rand(x.shape, generator=generator) if model.likelihood.dither else None
    likelihood, target = model.likelihood, model.likelihood.target(x, dither)
    loc, scale, z, log_q_z = model.encode(target).with_moments(noise)
    p = model.decode(z.flatten(0, 1))
    joint = model.joint(target, z, unflattened(p, z.shape[:2]))
    mean = likelihood.mean(p)
    observation_noise = _observation_noise(model, mean, generator)
    encoded = {"target": target, "loc": loc, "scale": scale, "z": z, "log_q_z": log_q_z}
    parameters = dict(zip(likelihood.parameter_names, likelihood.parameters_of(p), strict=True))
    tensors: dict[str, Tensor] = {
        "x": x,
        **({"noise": noise} if model.noise_dim else {}),
        **({} if dither is None else {"dither": dither}),
        **{f"encoder.{name}": value for name, value in encoded.items()},
        "decoder.mean": mean,
        **{f"decoder.{name}": value for name, value in parameters.items()},
        **{f"joint.{name}": value for name, value in joint._asdict().items()},
        **({} if observation_noise is None else {"observation_noise": observation_noise}),
        "observation.sample": likelihood.sample(p, *([] if observation_noise is None else [observation_noise])),
        **_prior_arrays(model, generator),
    }
    return {name: value.contiguous().numpy() for name, value in tensors.items()}


def backbone_arrays(images: Dataset, features: Dataset, backbone: Backbone) -> Arrays:
    """The images of the reference, and their features as the training had them, in the backbone's own shape."""
    indices = images.splits["test"][:IMAGES]
    return {
        "backbone_x": to_unit(images.pixels(indices)).numpy(),
        "backbone.features": features.pixels(indices).reshape(-1, *backbone.natural),
    }


@torch.no_grad()
def corruption_arrays(network: nn.Module, x: np.ndarray) -> Arrays:
    """The network's log odds of the reference's images."""
    return {"corruption.log_odds": network(torch.from_numpy(x)).numpy()}


def _prior_arrays(model: LatentVariableModel, generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs and output of the prior's graph, where there is one."""
    prior = model.prior
    if "prior" not in roles(model):
        return {}
    noise = torch.randn(DRAWS, prior.noise_dim, generator=generator)
    choice = torch.rand(DRAWS, generator=generator) if prior.choice else None
    named = {"prior_noise": noise} | ({} if choice is None else {"prior_choice": choice})
    return named | {"prior.z": prior.sample(noise, choice)}


def _observation_noise(model: LatentVariableModel, mean: Tensor, generator: torch.Generator) -> Tensor | None:
    """Noise [M,C,H,W] of the likelihood's distribution; None where draws take none."""
    if model.likelihood.observation_noise == "none":
        return None
    if model.likelihood.observation_noise == "standard_normal":
        return torch.randn(mean.shape, generator=generator)
    noise = torch.rand(mean.shape, generator=generator)
    if model.likelihood.family != "bernoulli":
        return noise
    return torch.where((noise - mean).abs() < EDGE, torch.where(mean > 0.5, mean / 2, (1 + mean) / 2), noise)


def tolerances(arrays: Arrays, rounded: bool) -> dict[str, Tolerance]:
    """Largest allowed |Δ| for every output in ``arrays``, draws ``rounded`` to levels or not; the constants say why."""
    result = {}
    for name, value in arrays.items():
        if "." in name:
            atol = ATOL_BY_SCALE * max(1.0, float(np.abs(value).max()))
            result[name] = Tolerance(atol=atol, rtol=RTOL)
    (log_p,) = (name.removesuffix("_map") for name in arrays if name.startswith("joint.") and name.endswith("_map"))
    terms = float(np.abs(arrays[f"{log_p}_map"]).sum(axis=(-3, -2, -1), dtype=np.float64).max())
    result[log_p] = Tolerance(atol=max(1e-4, NAT_BY_TERM * terms), rtol=RTOL / 100)
    result["encoder.target"] = Tolerance(atol=1e-6, rtol=0.0)  # compared and rounded, never computed at length
    if rounded:
        result["observation.sample"] = Tolerance(atol=ONE_LEVEL, rtol=0.0)
    return result


def rounds(likelihood: Likelihood) -> bool:
    """Whether draws of x are rounded to grey levels, of which they may miss the nearest one by a last bit."""
    return likelihood.values == "pixels" and likelihood.family != "bernoulli"


def to_npz(arrays: Arrays) -> bytes:
    """The arrays as an .npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for allow_pickle
    return buffer.getvalue()
