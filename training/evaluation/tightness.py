"""How tight a bound is: effective samples, and the inference gap in its two parts (Cremer et al. 2018). In nats."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.batches import derived_seed
from training.distributions import HALF_LOG_2PI, DiagonalGaussianPosterior
from training.models.base import LatentVariableModel

LEARNING_RATE = 0.03
"""Of Adam on loc/scale and log scale: it falls to 0 by a cosine, so that the last steps average the noise."""
SAMPLES = 8  # of the gradient at each step
JUDGED = 512  # fresh samples by which the optimised posterior is judged
ELEMENTS = 2**21  # numbers of one decoder output at a time, of which the gradient keeps several


def effective_samples(log_sum: Tensor, log_squares: Tensor) -> Tensor:
    """(Σ w)² / Σ w² from log Σ w and log Σ w²: how many equal weights would tell as much (Kong 1992)."""
    return torch.exp(2 * log_sum - log_squares)


@dataclass(frozen=True)
class InferenceGap:
    """The inference gap of each image, float64 [N], in its two parts.

    ``amortisation`` = optimised elbo − the encoder's elbo; ``approximation`` = log p(x) − optimised elbo
    (Cremer et al. 2018, eq. 6), with log p(x) by the IWAE bound: too loose a bound makes approximation too small, too
    short an optimisation too large. The best posterior is a diagonal Gaussian; a richer encoder's gap may be negative.
    """

    amortisation: np.ndarray
    approximation: np.ndarray

    def metrics(self) -> dict[str, float]:
        """Mean and standard error over the images of each, and how many images they are of."""
        metrics = {"gap_images": float(len(self.amortisation))}
        for name, values in (("amortisation_gap", self.amortisation), ("approximation_gap", self.approximation)):
            metrics[name] = float(values.mean())
            metrics[f"{name}_standard_error"] = float(values.std() / math.sqrt(len(values)))
        return metrics


def inference_gap(
    model: LatentVariableModel,
    x: Tensor,
    dither: Tensor | None,
    elbo: np.ndarray,
    log_likelihood: np.ndarray,
    steps: int,
    seed: int,
) -> InferenceGap:
    """The gap of images x [N,C,H,W], whose amortised ``elbo`` and log p(x) [N] are given, at the same dither."""
    optimised = []
    block = max(1, ELEMENTS // (SAMPLES * math.prod(model.shape)))
    for start in range(0, len(x), block):
        part = slice(start, start + block)
        target = model.likelihood.target(x[part], None if dither is None else dither[part])
        generator = torch.Generator(x.device).manual_seed(derived_seed(seed, "gap", start))
        loc, scale = optimise_posterior(model, target, steps, generator)
        optimised.append(gaussian_elbo(model, target, loc, scale, JUDGED, generator))
    best = torch.cat(optimised).cpu().numpy()
    return InferenceGap(amortisation=best - elbo, approximation=log_likelihood - best)


def log_joint(model: LatentVariableModel, target: Tensor, z: Tensor) -> Tensor:
    """log p(x|z) + log p(z) of target [N,C,H,W] and z [N,K,L] -> [N,K] float64."""
    log_p_x_given_z, _, log_p_z = model.joint(target, z, model.decode_samples(z))
    return log_p_x_given_z + log_p_z


def optimise_posterior(
    model: LatentVariableModel, target: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """loc and scale [N,L] of the diagonal Gaussian that maximises each image's elbo, from the encoder's own start.

    Adam on E log p(x,z) + Σ log scale, the entropy up to a constant; loc moves in units of the first scale.
    """
    with torch.no_grad():
        q = model.encode(target)
        start, unit = q.loc, q.scale.clamp(min=1e-4)
    shift = torch.zeros_like(start, requires_grad=True)
    stretch = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([shift, stretch], LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        noise = torch.randn(len(target), SAMPLES, start.shape[1], generator=generator, device=target.device)
        q = DiagonalGaussianPosterior(start + unit * shift, unit * torch.exp(stretch))
        z = q.rsample(noise).z
        elbo = log_joint(model, target, z).mean(1) + stretch.double().sum(1)
        shift.grad, stretch.grad = torch.autograd.grad(-elbo.sum(), [shift, stretch])
        optimiser.step()
        schedule.step()
    return (start + unit * shift).detach(), (unit * torch.exp(stretch)).detach()


@torch.no_grad()
def gaussian_elbo(
    model: LatentVariableModel, target: Tensor, loc: Tensor, scale: Tensor, samples: int, generator: torch.Generator
) -> Tensor:
    """The elbo [N] float64 of N(loc, diag(scale²)) by ``samples`` draws, its entropy in closed form."""
    q = DiagonalGaussianPosterior(loc, scale)
    total = torch.zeros(len(target), dtype=torch.float64, device=target.device)
    for start in range(0, samples, SAMPLES):
        count = min(SAMPLES, samples - start)
        noise = torch.randn(len(target), count, loc.shape[1], generator=generator, device=target.device)
        total += log_joint(model, target, q.rsample(noise).z).sum(1)
    entropy = (torch.log(scale.double()) + HALF_LOG_2PI + 0.5).sum(1)
    return total / samples + entropy
