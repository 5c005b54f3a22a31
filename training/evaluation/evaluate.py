"""Evaluation: log-likelihood, elbo, rate, distortion, bits per dimension, tightness, use of the latents. In nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.config import EvaluateConfig
from training.data.batches import derived_seed, image_dither, pixel_batches
from training.data.dataset import Dataset
from training.evaluation.aggregate import aggregate_posterior
from training.evaluation.tightness import effective_samples, inference_gap
from training.models.base import LatentVariableModel

Progress = Callable[[int], None]
IMAGES = 64
"""Images whose samples are drawn together."""
IN_CACHE, ON_DEVICE = 2**20, 2**24
"""Numbers of one decoder output at a time. On a CPU fewer pay for the calls, more leave the cache and are asked of the
system anew at each step: of MNIST's 784, 320 decodes at a time took 25 µs each, 1,024 and 2,048 took 20, 4,096 took 24,
16,384 took 33. A GPU wants more to do at once."""


@dataclass(frozen=True)
class Bounds:
    """Bounds for each image, float64 [N], by k sampled weights an image; effective_samples is a number of weights."""

    elbo: np.ndarray
    iwae: np.ndarray
    rate: np.ndarray
    distortion: np.ndarray
    effective_samples: np.ndarray

    def means(self) -> dict[str, float]:
        """Mean of each over the images."""
        return {name: float(values.mean()) for name, values in asdict(self).items()}


class Evaluation(NamedTuple):
    """``metrics`` of a split by name, and by latent dimension the arrays of evaluation.aggregate, where z is drawn."""

    metrics: dict[str, float]
    latents: dict[str, list[float]] | None


def log_weights(
    model: LatentVariableModel, x: Tensor, dither: Tensor | None, k: int, chunk: int, precision: str = "32-true"
) -> Iterator[tuple[Tensor, Tensor]]:
    """log w = log p(x|z) + log p(z) − log q(z|x) and log p(x|z) at k sampled z, float64 [N,≤k] at a time.

    With ``precision`` "bf16-mixed" the decoder alone rounds; densities, their sums and the proposal q stay as they are,
    so that w is still a weight of the z that was drawn.
    """
    step = max(1, chunk // len(x))
    target = model.likelihood.target(x, dither)
    q = model.encode(target)
    for start in range(0, k, step):
        samples = min(step, k - start)
        noise = torch.randn(samples, len(x), model.noise_dim, device=x.device).transpose(0, 1)
        z, log_q_z = q.rsample(noise)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            p = model.decode_samples(z)
        log_p_x_given_z, _, log_p_z = model.joint(target, z, p)
        yield log_p_x_given_z + log_p_z - log_q_z, log_p_x_given_z


def batch_bounds(
    model: LatentVariableModel, x: Tensor, dither: Tensor | None, k: int, chunk: int, precision: str = "32-true"
) -> dict[str, Tensor]:
    """The fields of Bounds, each [N]; iwae is the log-mean-exp of sampled weights (Burda et al. 2016, eq. 8)."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    conditional, log_sum, log_squares = torch.zeros_like(total), total - math.inf, total - math.inf
    for log_w, log_p_x_given_z in log_weights(model, x, dither, k, chunk, precision):
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_w, 1))
        log_squares = torch.logaddexp(log_squares, torch.logsumexp(2 * log_w, 1))
        total += log_w.sum(1)
        conditional += log_p_x_given_z.sum(1)
    return {
        "elbo": total / k,
        "iwae": log_sum - math.log(k),
        "rate": (conditional - total) / k,
        "distortion": -conditional / k,
        "effective_samples": effective_samples(log_sum, log_squares),
    }


@torch.no_grad()
def bounds(
    model: LatentVariableModel,
    dataset: Dataset,
    indices: np.ndarray,
    k: int,
    chunk: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    precision: str = "32-true",
) -> Bounds:
    """Bounds of the images at ``indices``, ``chunk`` decodes at a time (None: as many as suit the device).

    The same for the same seed and chunk.
    """
    device = next(model.parameters()).device
    chunk = chunk or default_chunk(model, device)
    batch = min(IMAGES, chunk)
    parts = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    batches: list[dict[str, Tensor]] = []
    for part, pixels in zip(parts, pixel_batches(dataset, parts), strict=True):
        torch.manual_seed(derived_seed(seed, "evaluate", int(part[0])))
        dither = dither_of(model, part, seed)
        batches.append(batch_bounds(model, pixels.to(device), dither, k, chunk, precision))
        if progress:
            progress(len(part))
    return Bounds(**{name: torch.cat([batch[name] for batch in batches]).cpu().numpy() for name in batches[0]})


def default_chunk(model: LatentVariableModel, device: torch.device) -> int:
    """How many samples to decode at a time, to keep one decoder output in a core's cache, or a GPU busy."""
    return max(1, (IN_CACHE if device.type == "cpu" else ON_DEVICE) // math.prod(model.shape))


def dither_of(model: LatentVariableModel, indices: np.ndarray, seed: int) -> Tensor | None:
    """Uniform dither [N,C,H,W], each image's a function of its index and the seed; None if the model wants none."""
    if not model.likelihood.dither:
        return None
    device = next(model.parameters()).device
    return torch.from_numpy(np.stack([image_dither(model.shape, int(i), seed) for i in indices])).to(device)


def samples_needed(model: LatentVariableModel, k: int) -> int:
    """Number of samples: k for a bound, 1 where every weight is p(x) itself, or where there is no likelihood."""
    return k if model.evidence == "bound" else 1


def bits_per_dim(log_likelihood: float, model: LatentVariableModel) -> float | None:
    """−log p / (D ln 2) for D pixels; a density over [0,1] is stated for 8-bit pixels, 8 bits higher.

    None for numbers in units of their own, which have no levels.
    """
    if model.likelihood.measure == "none" or (
        model.likelihood.measure == "lebesgue" and model.likelihood.values == "reals"
    ):
        return None
    offset = 8.0 if model.likelihood.measure == "lebesgue" else 0.0
    return -log_likelihood / (math.prod(model.shape) * math.log(2)) + offset


def evaluate(
    model: LatentVariableModel,
    dataset: Dataset,
    split: str,
    config: EvaluateConfig,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """One split evaluated; the metrics are means over its images.

    Always ``images`` and ``k``. With a likelihood: ``log_likelihood`` (IWAE-k, or log p(x) itself, then k = 1), its
    standard error, ``elbo`` and ``bits_per_dim``; of a bound also how tight it is, its gap split if ``config.gaps``
    asks for it (evaluation.tightness). Without one: ``reconstruction_error`` in the likelihood's unit. Where z is
    drawn: ``rate``, ``distortion``, and what the latents carry (evaluation.aggregate).
    """
    indices = dataset.splits[split][: config.images]
    model.eval()
    k = samples_needed(model, config.k)
    result = bounds(model, dataset, indices, k, config.chunk, seed, progress, config.precision)
    metrics = {**_evidence(model, result), "k": k, "images": len(indices)}
    latents = None
    if model.moments != "point":
        metrics |= {"rate": float(result.rate.mean()), "distortion": float(result.distortion.mean())}
        aggregate = aggregate_posterior(model, dataset, indices, seed)
        metrics, latents = metrics | aggregate.metrics(), aggregate.by_dimension()
    if model.evidence == "bound":
        effective = float(result.effective_samples.mean())
        metrics |= {"effective_sample_size": effective, "effective_sample_fraction": effective / k}
        if config.gaps:
            metrics |= _gaps(model, dataset, indices[: config.gaps], result, config, seed)
    return Evaluation(metrics, latents)


def summary(metrics: dict[str, float]) -> str:
    """The metrics in one line."""
    if "log_likelihood" not in metrics:
        return f"reconstruction error {metrics['reconstruction_error']:.4g}, no likelihood"
    exact = "bound_gap" not in metrics
    how = "exact" if exact else f"IWAE-{metrics['k']}"
    parts = [f"log p(x) {metrics['log_likelihood']:.3f} nats ({how})"]
    if not exact:
        parts.append(f"elbo {metrics['elbo']:.3f}, effective samples {metrics['effective_sample_size']:.1f}")
    if "rate" in metrics:
        parts.append(f"rate {metrics['rate']:.2f}, distortion {metrics['distortion']:.2f}")
    if "amortisation_gap" in metrics:
        gaps = (metrics["approximation_gap"], metrics["amortisation_gap"])
        parts.append("gap by approximation {:.2f}, by amortisation {:.2f}".format(*gaps))
    if "bits_per_dim" in metrics:
        parts.append(f"{metrics['bits_per_dim']:.3f} bits/dim")
    if "active_units" in metrics:
        parts.append(f"{metrics['active_units']} active units")
    return ", ".join(parts)


def _evidence(model: LatentVariableModel, result: Bounds) -> dict[str, float]:
    """log p(x), its standard error, elbo and bits, or the reconstruction error where there is no likelihood."""
    root = math.sqrt(len(result.elbo))
    if model.evidence == "none":
        error = result.distortion
        return {
            "reconstruction_error": float(error.mean()),
            "reconstruction_error_standard_error": float(error.std() / root),
        }
    log_likelihood = float(result.iwae.mean())
    metrics = {
        "log_likelihood": log_likelihood,
        "log_likelihood_standard_error": float(result.iwae.std() / root),
        "elbo": float(result.elbo.mean()),
    }
    if model.evidence == "bound":
        metrics["bound_gap"] = log_likelihood - metrics["elbo"]
    bits = bits_per_dim(log_likelihood, model)
    return metrics | ({} if bits is None else {"bits_per_dim": bits})


def _gaps(
    model: LatentVariableModel, dataset: Dataset, indices: np.ndarray, result: Bounds, config: EvaluateConfig, seed: int
) -> dict[str, float]:
    """The inference gap of the first images, in its two parts; their elbo and log p(x) are those of ``result``."""
    dither = dither_of(model, indices, seed)
    x = next(pixel_batches(dataset, [indices])).to(next(model.parameters()).device)
    first = slice(0, len(indices))
    gap = inference_gap(model, x, dither, result.elbo[first], result.iwae[first], config.gap_steps, seed)
    return gap.metrics()
