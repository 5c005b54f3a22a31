"""Approximate posteriors q(z|x): parameters from the encoder's features, draws from noise, log q at the draws."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from training.config import PosteriorConfig

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Posterior(nn.Module, ABC):
    """Features [N,F] -> parameters of q(z|x), and noise [N,K,E] -> draws.

    ``moments``: ``exact`` if ``moments_of`` gives mean and standard deviations, ``base`` if it gives the image of the
    base distribution's mean and the base's deviations. ``evaluable``: log q can be had at any z, not only at a draw.
    """

    family: str
    moments: Literal["exact", "base"] = "exact"
    evaluable: bool = False
    noise_dim: int

    @abstractmethod
    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> parameters, float32 [N,…] each."""

    @abstractmethod
    def moments_of(self, statistics: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Parameters -> loc, scale, each [N,L]; see ``moments``."""

    @abstractmethod
    def sample(self, statistics: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters and noise [N,K,E] -> z [N,K,L] and log q(z|x) [N,K] float64, nats."""

    def log_prob(self, statistics: tuple[Tensor, ...], z: Tensor) -> Tensor:
        """log q(z|x) [N,K] float64 at any z [N,K,L], where ``evaluable``."""
        raise NotImplementedError(f"{self.family}: log q is known at its own draws only")


class DiagonalGaussian(Posterior):
    """q(z|x) = N(loc, diag(scale²)), loc and scale by one linear head on the encoder's features [N,F]."""

    family = "diagonal_gaussian"
    evaluable = True

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, 2 * latent_dim)
        self.noise_dim = latent_dim

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> loc, scale, each [N,L] float32; scale in (e^-7, e^3)."""
        loc, log_scale = self.head(features).float().chunk(2, -1)
        return loc, torch.exp(log_scale.clamp(-7, 3))

    def moments_of(self, statistics: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        loc, scale = statistics
        return loc, scale

    def sample(self, statistics: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = statistics
        log_q = (-0.5 * noise**2 - HALF_LOG_2PI - torch.log(scale).unsqueeze(1)).double().sum(-1)
        return reparameterise(loc, scale, noise), log_q

    def log_prob(self, statistics: tuple[Tensor, ...], z: Tensor) -> Tensor:
        loc, scale = statistics
        return log_normal(z, loc.unsqueeze(1), scale.unsqueeze(1)).double().sum(-1)


def reparameterise(loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """z = loc + scale·ε for noise ε [N,K,L] (Kingma & Welling 2014, eq. 10) -> [N,K,L]."""
    return loc.unsqueeze(1) + scale.unsqueeze(1) * noise


def log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(z; loc, scale²) for each element, in nats."""
    return -0.5 * ((z - loc) / scale) ** 2 - torch.log(scale) - HALF_LOG_2PI


def kl_to_standard_normal(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale²) ‖ N(0, 1)) for each element, in nats (Kingma & Welling 2014, App. B)."""
    return 0.5 * (loc**2 + scale**2 - 1) - torch.log(scale)


def build_posterior(config: PosteriorConfig, features: int, latent_dim: int) -> Posterior:
    """The configured posterior on F = ``features`` encoder features."""
    return DiagonalGaussian(features, latent_dim)
