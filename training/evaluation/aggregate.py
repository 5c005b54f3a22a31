"""What the latents carry: rate by dimension, active units, the aggregate posterior q(z) against the prior. In nats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data.batches import derived_seed, image_dither, pixel_batches
from training.data.dataset import Dataset
from training.distributions import Normal
from training.models.base import LatentVariableModel
from training.models.priors import Prior

ACTIVE_VARIANCE = 0.01
"""A latent dimension is active if Var_x E_q[z|x] exceeds this (Burda et al. 2016, sec. 5.2); of flow posteriors and
ladders, whose mean is not known, loc is taken, the z of zero noise."""
UNUSED_RATE = 0.01
"""Nats: a group of latents of a smaller mean KL to the prior tells the decoder nothing."""
USED_SHARE = 0.1
"""Of the latent dimensions, fewer in use than this share are a collapse: good models of MNIST use a third or more."""
BATCH = 256
BLOCK = 2**22  # pairs (z_i, x_j) times latent dimensions at a time


@dataclass(frozen=True)
class Aggregate:
    """The posteriors q(z|x) of N images together, float64, by latent dimension [L].

    ``mean`` and ``variance`` are of the aggregate q(z) = (1/N) Σ q(z|x_n), to be held against the prior's
    ``prior_mean`` and ``prior_variance``; ``moved`` is the variance of the posterior means; ``rate`` is the mean
    KL(q(z_j|x) ‖ p(z_j)), None unless both are diagonal Gaussians; ``marginal_kl`` bounds KL(q(z) ‖ p(z)), over all
    dimensions together, from below and above, None unless q(z|x) is a diagonal Gaussian.
    """

    mean: np.ndarray
    variance: np.ndarray
    prior_mean: np.ndarray
    prior_variance: np.ndarray
    moved: np.ndarray
    rate: np.ndarray | None
    marginal_kl: tuple[float, float] | None

    @property
    def active_units(self) -> int:
        """Dimensions whose posterior mean varies over the images by more than ACTIVE_VARIANCE."""
        return int((self.moved > ACTIVE_VARIANCE).sum())

    def metrics(self) -> dict[str, float]:
        """The numbers for metrics.json."""
        metrics: dict[str, float] = {"active_units": self.active_units}
        if self.marginal_kl:
            metrics |= dict(zip(("marginal_kl_lower", "marginal_kl_upper"), self.marginal_kl, strict=True))
        return metrics

    def by_dimension(self) -> dict[str, list[float]]:
        """The arrays, for metrics.json, rounded to what they are good for."""
        arrays = {
            "aggregate_mean": self.mean,
            "aggregate_variance": self.variance,
            "prior_mean": self.prior_mean,
            "prior_variance": self.prior_variance,
            "variance_of_means": self.moved,
        } | ({} if self.rate is None else {"rate": self.rate})
        return {name: [float(f"{value:.5g}") for value in values] for name, values in arrays.items()}


@torch.no_grad()
def aggregate_posterior(model: LatentVariableModel, dataset: Dataset, indices: np.ndarray, seed: int = 0) -> Aggregate:
    """The aggregate posterior of the images at ``indices``, by one draw of z an image."""
    device = next(model.parameters()).device
    parts = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
    torch.manual_seed(derived_seed(seed, "aggregate"))
    moments_and_draws: list[tuple[Tensor, Tensor, Tensor]] = []
    for part, pixels in zip(parts, pixel_batches(dataset, parts), strict=True):
        dither = None
        if model.likelihood.dither:
            dither = torch.from_numpy(np.stack([image_dither(model.shape, int(i), seed) for i in part])).to(device)
        q = model.encode(model.likelihood.target(pixels.to(device), dither))
        loc, scale, z, _ = q.with_moments(torch.randn(len(part), 1, model.noise_dim, device=device))
        moments_and_draws.append((loc, scale, z[:, 0]))
    return describe(model, *(torch.cat(tensors) for tensors in zip(*moments_and_draws, strict=True)))


@torch.no_grad()
def describe(model: LatentVariableModel, loc: Tensor, scale: Tensor, z: Tensor) -> Aggregate:
    """Aggregate of posteriors with moments loc, scale [N,L] and one draw z [N,L] each."""
    mean, variance = moments(loc, scale) if model.moments == "exact" else moments(z, torch.zeros_like(z))
    diagonal = model.posterior_family == "diagonal_gaussian" and model.moments == "exact"
    standard = model.prior.family == "standard_normal"
    prior_mean, prior_variance = prior_moments(model)
    rate = Normal(loc.double(), scale.double()).kl_to_standard().mean(0) if diagonal and standard else None
    return Aggregate(
        mean=mean.cpu().numpy(),
        variance=variance.cpu().numpy(),
        prior_mean=prior_mean.cpu().numpy(),
        prior_variance=prior_variance.cpu().numpy(),
        moved=loc.double().var(0).cpu().numpy(),
        rate=None if rate is None else rate.cpu().numpy(),
        marginal_kl=marginal_kl(model, loc, scale, z) if diagonal else None,
    )


def moments(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [L] float64 of the mixture of N distributions with moments loc, scale [N,L]."""
    return loc.double().mean(0), loc.double().var(0, unbiased=False) + (scale.double() ** 2).mean(0)


def prior_moments(model: LatentVariableModel, draws: int = 10_000) -> tuple[Tensor, Tensor]:
    """Mean and variance [L] float64 of p(z), by fixed draws where it is not N(0, I); NaN without a prior."""
    prior, size, device = model.prior, model.latent_dim, next(model.parameters()).device
    if prior.family == "none":
        return torch.full((size,), math.nan).double(), torch.full((size,), math.nan).double()
    if prior.family == "standard_normal":
        return torch.zeros(size).double(), torch.ones(size).double()
    drawn = torch.cat(list(_prior_draws(prior, draws, device)))
    return drawn.mean(0), drawn.var(0)


def _prior_draws(prior: Prior, draws: int, device: torch.device, batch: int = 1000) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, draws, batch):
        count = min(batch, draws - start)
        noise = torch.randn(count, prior.noise_dim, generator=generator).to(device)
        choice = torch.rand(count, generator=generator).to(device) if prior.choice else None
        yield prior.sample(noise, choice).double()


def marginal_kl(model: LatentVariableModel, loc: Tensor, scale: Tensor, z: Tensor) -> tuple[float, float]:
    """Lower and upper bound of KL(q(z) ‖ p(z)) = rate − I(x; z) (Hoffman & Johnson 2016, eq. 5), q(z) the population's.

    E log q̂(z) − E log p(z), with q̂(z_i) the mean of q(z_i|x_j) over the N images: without j = i it lies below log q(z)
    in expectation, with it the mutual information that it implies does (Poole et al. 2019, eq. 10 and 13), and is at
    most log N. Where images share little posterior mass the two are therefore far apart: the upper one is then the rate
    less log N, and more images bring it down. A KL is not negative, which the lower one is cut at.
    """
    log_with, log_without = aggregate_log_prob(loc, scale, z)
    log_p = model.prior.log_prob(z.unsqueeze(1))[:, 0]
    lower, upper = float((log_without - log_p).mean()), float((log_with - log_p).mean())
    return max(0.0, lower), max(0.0, upper)


def aggregate_log_prob(loc: Tensor, scale: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """log (1/N) Σ_j q(z_i|x_j) with and, over N − 1, without j = i, for Gaussians loc, scale [N,L] and z [N,L] -> [N].

    In float64: the squares are expanded into matrix products, and cancel.
    """
    posteriors = Normal(loc.double(), scale.double())
    count = len(loc)
    with_own, without_own = [], []
    block = max(1, BLOCK // count)
    for start in range(0, count, block):
        rows = z[start : start + block]
        log_q = posteriors.log_prob_by_row(rows)
        with_own.append(torch.logsumexp(log_q, 1) - math.log(count))
        own = torch.arange(len(rows), device=z.device)
        log_q[own, start + own] = -math.inf
        without_own.append(torch.logsumexp(log_q, 1) - math.log(max(1, count - 1)))
    return torch.cat(with_own), torch.cat(without_own)


def collapsed(kl_per_group: Sequence[float] | np.ndarray, layers: bool = False) -> str | None:
    """A warning for the user if the posterior has collapsed onto the prior (Bowman et al. 2016), else None.

    ``kl_per_group``: mean KL of each latent dimension, or of each stochastic layer (``layers``), in nats. Of dimensions
    USED_SHARE must be in use, of layers every one.
    """
    rates = np.asarray(kl_per_group, dtype=np.float64)
    used = int((rates > UNUSED_RATE).sum())
    advice = "try objective.warmup_epochs or objective.free_bits"
    if used == 0:
        return f"posterior collapse: the rate is {rates.sum():.2g} nats, the decoder does without z; {advice}"
    if layers and used < len(rates):
        unused = ", ".join(str(i + 1) for i in np.flatnonzero(rates <= UNUSED_RATE))
        return f"posterior collapse of layer {unused} of {len(rates)}: its rate is below {UNUSED_RATE} nats; {advice}"
    if not layers and used < USED_SHARE * len(rates):
        return f"posterior collapse: only {used} of {len(rates)} latent dimensions carry {UNUSED_RATE} nats; {advice}"
    return None
