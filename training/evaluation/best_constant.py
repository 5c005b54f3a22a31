"""The best constant p(x|z) = p(x) of a likelihood, the yardstick of a model that learns nothing of a row x.

Its parameters are fitted to the training split, number by number of x, whatever z. A posterior that has collapsed onto
the prior ends there; a model that is far worse on held-out rows has diverged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from training.config import LikelihoodConfig
from training.data.batches import pixel_batches
from training.data.dataset import Dataset
from training.distributions import Bernoulli, ContinuousBernoulli, Delta, DiscretisedLogistic, Distribution, Normal
from training.distributions.continuous_bernoulli import logits_of
from training.evaluation.evaluate import dither_of
from training.models.base import LatentVariableModel
from training.models.likelihood import Likelihood

NUMBERS, FEWEST, MOST = 2**24, 200, 5000
"""The constant is fitted to the first training rows: as many as hold so many numbers, FEWEST at least, MOST at most."""
BATCH = 250
LOCS = torch.linspace(-0.25, 1.25, 61)
SCALES = 24  # of a logistic, from the smallest that the model may have to 1
TOGETHER = 2048  # pixels whose grids are compared at a time

Constant = Callable[[Tensor], Tensor]
"""Targets [N,C,H,W] -> log p of each row, float64 [N]."""


@torch.no_grad()
def best_constant(
    model: LatentVariableModel, dataset: Dataset, indices: np.ndarray, config: LikelihoodConfig, seed: int = 0
) -> np.ndarray:
    """log p(x) of the rows at ``indices``, float64 [N], under the constant of the model's likelihood that suits them.

    Of a reconstruction error, minus the error. Dither is that of ``evaluation.evaluate.bounds`` with that seed.
    """
    train = dataset.splits["train"][: max(FEWEST, min(MOST, NUMBERS // math.prod(model.shape)))]
    constants = CONSTANTS[config.family](model.likelihood, _targets(model, dataset, train, seed), config)
    target = _targets(model, dataset, indices, seed)
    log_ps = [torch.cat([constant(part) for part in target.split(BATCH)]).numpy() for constant in constants]
    return max(log_ps, key=lambda log_p: float(log_p.mean()))


def _targets(model: LatentVariableModel, dataset: Dataset, indices: np.ndarray, seed: int) -> Tensor:
    """Targets [N,C,H,W] of the rows at ``indices``, on the CPU."""
    parts = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
    return torch.cat([
        model.likelihood.target(x, dither_of(model, part, seed))
        for part, x in zip(parts, pixel_batches(dataset, parts), strict=True)
    ])  # fmt: skip


def _of(likelihood: Likelihood, p: Distribution) -> Constant:
    """p(target) with parameters [C,H,W], of every row."""
    return lambda target: likelihood.total(likelihood.log_prob(target, p))


def _bernoulli(likelihood: Likelihood, target: Tensor, config: LikelihoodConfig) -> list[Constant]:
    """The mean of targets in [0,1], and of half a row of either end: none is impossible."""
    return [_of(likelihood, Bernoulli(torch.logit((target.sum(0) + 0.5) / (len(target) + 1))))]


def _continuous_bernoulli(likelihood: Likelihood, target: Tensor, config: LikelihoodConfig) -> list[Constant]:
    """The logits whose mean is that of the targets: the maximum-likelihood ones, as in any exponential family."""
    return [_of(likelihood, ContinuousBernoulli(logits_of(target.mean(0))))]


def _squared_error(likelihood: Likelihood, target: Tensor, config: LikelihoodConfig) -> list[Constant]:
    """The mean."""
    return [_of(likelihood, Delta(target.mean(0)))]


def _gaussian(likelihood: Likelihood, target: Tensor, config: LikelihoodConfig) -> list[Constant]:
    """The mean, and a scale of the kind that the model has: fixed, one for all numbers, or also one for each."""
    mean, variance = target.mean(0), target.var(0, unbiased=False)
    if config.scale == "fixed":
        return [_of(likelihood, Normal(mean, torch.full_like(mean, config.fixed_scale)))]
    floor = max(getattr(likelihood, "min_scale", 0.0), config.min_scale)
    variances = [variance.mean().expand_as(mean)] + ([] if config.scale == "shared" else [variance])
    return [_of(likelihood, Normal(mean, variance.sqrt().clamp(min=floor))) for variance in variances]


def _logistic(likelihood: Likelihood, target: Tensor, config: LikelihoodConfig) -> list[Constant]:
    """Of each pixel the loc and scale, on a grid, that give most to the training rows and a row of every level alike.

    How many rows have each level is what their log p is linear in, so that the whole grid is one product. A mixture
    with all its components there is this constant: its own best one is at least as good.
    """
    locs, scales = torch.meshgrid(LOCS, torch.logspace(math.log10(config.min_scale), 0, SCALES), indexing="ij")
    grid = DiscretisedLogistic(locs.flatten(), scales.flatten())
    log_p = grid.log_prob(torch.linspace(0, 1, 256).unsqueeze(1))
    levels = torch.round(target.flatten(1) * 255).long()
    best = torch.cat([((_counts(part) + 1 / 256) @ log_p).argmax(1) for part in levels.split(TOGETHER, 1)])
    p = DiscretisedLogistic(*(values[best].view(target.shape[1:]) for values in grid))
    return [lambda target: likelihood.total(p.log_prob(target))]


def _counts(levels: Tensor) -> Tensor:
    """How many of the rows [N,P] have each of 256 levels at each pixel: float32 [P,256]."""
    counts = torch.zeros(levels.shape[1], 256)
    return counts.scatter_add_(1, levels.T, torch.ones(levels.T.shape))


def _bijection(likelihood: Likelihood, target: Tensor, config: LikelihoodConfig) -> list[Constant]:
    """For bijections, whose likelihood has no parameters: a Gaussian each number; of pixels, uniform is another."""
    p = Normal(target.mean(0), target.std(0, unbiased=False).clamp(min=config.min_scale))

    def gaussian(target: Tensor) -> Tensor:
        return likelihood.total(p.log_prob(target)) + likelihood.log_volume

    def uniform(target: Tensor) -> Tensor:
        return torch.zeros(len(target), dtype=torch.float64)

    return [gaussian, uniform] if likelihood.values == "pixels" else [gaussian]


CONSTANTS: dict[str, Callable[[Likelihood, Tensor, LikelihoodConfig], list[Constant]]] = {
    "bernoulli": _bernoulli,
    "cross_entropy": _bernoulli,
    "continuous_bernoulli": _continuous_bernoulli,
    "squared_error": _squared_error,
    "gaussian": _gaussian,
    "discretised_logistic": _logistic,
    "logistic_mixture": _logistic,
    "delta": _bijection,
}
"""From a likelihood's family to its constants, of targets [N,C,H,W] of the training split."""
