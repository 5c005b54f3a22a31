"""Evaluation: ELBO, rate, distortion, IWAE-k log-likelihood, bits per dimension, active units. Values in nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from training.batches import derived_seed, image_dither, pixel_batches
from training.config import EvaluateConfig
from training.data.dataset import Dataset
from training.models.base import LatentVariableModel

Progress = Callable[[int], None]
ACTIVE_VARIANCE = 0.01
"""A latent dimension is active if Var_x E_q[z|x] exceeds this (Burda et al. 2016, sec. 5.2)."""


@dataclass(frozen=True)
class Bounds:
    """Bounds for each image, float64 [N], by k sampled weights an image."""

    elbo: np.ndarray
    iwae: np.ndarray
    rate: np.ndarray
    distortion: np.ndarray

    def means(self) -> dict[str, float]:
        """Mean of each over the images."""
        return {name: float(values.mean()) for name, values in asdict(self).items()}


def log_weights(
    model: LatentVariableModel, x: Tensor, dither: Tensor | None, k: int, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """log w = log p(x|z) + log p(z) − log q(z|x) and log p(x|z) at k sampled z, float64 [N,≤k] at a time."""
    step = max(1, chunk // len(x))
    target = model.likelihood.target(x, dither)
    posterior = model.infer(target)
    for start in range(0, k, step):
        samples = min(step, k - start)
        noise = torch.randn(len(x), samples, model.noise_dim, device=x.device)
        encoded = model.draw(target, posterior, noise)
        flat = model.parameters_at(encoded.z.flatten(0, 1))
        parameters = tuple(p.unflatten(0, encoded.z.shape[:2]) for p in flat)
        density = model.density(encoded.target, encoded.z, parameters)
        yield density.log_p_x + density.log_p_z - encoded.log_q, density.log_p_x


def batch_bounds(model: LatentVariableModel, x: Tensor, dither: Tensor | None, k: int, chunk: int) -> dict[str, Tensor]:
    """elbo, iwae (log-mean-exp of sampled weights, Burda et al. 2016, eq. 8), rate and distortion, each [N]."""
    log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    fit = torch.zeros_like(total)
    for log_w, log_p_x in log_weights(model, x, dither, k, chunk):
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_w, 1))
        total += log_w.sum(1)
        fit += log_p_x.sum(1)
    return {"elbo": total / k, "iwae": log_sum - math.log(k), "rate": (fit - total) / k, "distortion": -fit / k}


@torch.no_grad()
def bounds(
    model: LatentVariableModel,
    dataset: Dataset,
    indices: np.ndarray,
    k: int,
    chunk: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> Bounds:
    """Bounds of the images at ``indices``, at most ``chunk`` decodes at a time, the same for the same seed."""
    device = next(model.parameters()).device
    batch = max(1, min(256, chunk))
    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    found: list[dict[str, Tensor]] = []
    for part, pixels in zip(parts, pixel_batches(dataset, parts), strict=True):
        torch.manual_seed(derived_seed(seed, "evaluate", int(part[0])))
        dither = None
        if model.likelihood.dither:
            dither = torch.from_numpy(np.stack([image_dither(model.shape, int(i), seed) for i in part])).to(device)
        found.append(batch_bounds(model, pixels.to(device), dither, k, chunk))
        if progress:
            progress(len(part))
    return Bounds(**{name: torch.cat([f[name] for f in found]).cpu().numpy() for name in found[0]})


@torch.no_grad()
def active_units(model: LatentVariableModel, dataset: Dataset, indices: np.ndarray) -> int:
    """Latent dimensions whose posterior mean varies over the images by more than ACTIVE_VARIANCE."""
    device = next(model.parameters()).device
    parts = [indices[i : i + 256] for i in range(0, len(indices), 256)]
    locs = []
    for pixels in pixel_batches(dataset, parts):
        x = pixels.to(device)
        dither = torch.full_like(x, 0.5) if model.likelihood.dither else None
        locs.append(model.encode(x, x.new_zeros(len(x), 1, model.noise_dim), dither).loc)
    return int((torch.cat(locs).var(0) > ACTIVE_VARIANCE).sum())


def bits_per_dim(log_likelihood: float, model: LatentVariableModel) -> float:
    """−log p / (D ln 2) for D pixels; a density over [0,1] is stated for 8-bit pixels, 8 bits higher."""
    offset = 8.0 if model.likelihood.measure == "lebesgue" else 0.0
    return -log_likelihood / (math.prod(model.shape) * math.log(2)) + offset


def evaluate(
    model: LatentVariableModel,
    dataset: Dataset,
    split: str,
    config: EvaluateConfig,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The metrics of one split: elbo, rate, distortion, log_likelihood (IWAE-k), bits_per_dim, active_units, n, k."""
    indices = dataset.splits[split][: config.images]
    model.eval()
    result = bounds(model, dataset, indices, config.k, config.chunk, seed, progress)
    means = result.means()
    log_likelihood = means.pop("iwae")
    return {
        **means,
        "log_likelihood": log_likelihood,
        "log_likelihood_standard_error": float(result.iwae.std() / math.sqrt(len(indices))),
        "k": config.k,
        "bits_per_dim": bits_per_dim(log_likelihood, model),
        "active_units": active_units(model, dataset, indices),
        "images": len(indices),
    }
