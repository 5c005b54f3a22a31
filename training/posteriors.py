"""Approximate posteriors q(z|x)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class DiagonalGaussian(nn.Module):
    """q(z|x) = N(loc, diag(scale²)), loc and scale by one linear head on the encoder's features [N,F]."""

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, 2 * latent_dim)
        self.noise_dim = latent_dim

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N,F] -> loc, scale, each [N,L] float32; scale in (e^-7, e^3)."""
        loc, log_scale = self.head(features).float().chunk(2, -1)
        return loc, torch.exp(log_scale.clamp(-7, 3))


def reparameterise(loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """z = loc + scale·ε for noise ε [N,K,L] (Kingma & Welling 2014, eq. 10) -> [N,K,L]."""
    return loc.unsqueeze(1) + scale.unsqueeze(1) * noise


def log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(z; loc, scale²) for each element, in nats."""
    return -0.5 * ((z - loc) / scale) ** 2 - torch.log(scale) - HALF_LOG_2PI


def kl_to_standard_normal(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale²) ‖ N(0, 1)) for each element, in nats (Kingma & Welling 2014, App. B)."""
    return 0.5 * (loc**2 + scale**2 - 1) - torch.log(scale)
