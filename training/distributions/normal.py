"""The normal distribution with independent elements."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """log N(x; 0, 1) = −½x² − ½ log 2π, element by element, in nats."""
    return -0.5 * x**2 - HALF_LOG_2PI


class Normal(NamedTuple):
    """N(loc, scale²), independently in each element; sampled from standard normal noise.

    log p(x) = −½ ((x − loc)/scale)² − log scale − ½ log 2π.

    >>> Normal(torch.zeros(2), torch.ones(2)).log_prob(torch.tensor([0.0, 1.0]))
    tensor([-0.9189, -1.4189])
    """

    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x] = loc."""
        return self.loc

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), element by element, in nats."""
        return -0.5 * ((x - self.loc) / self.scale) ** 2 - torch.log(self.scale) - HALF_LOG_2PI

    def sample(self, noise: Tensor) -> Tensor:
        """x = loc + scale·ε for standard normal ε (Kingma & Welling 2014, eq. 10)."""
        return self.loc + self.scale * noise

    def log_prob_of_draw(self, noise: Tensor) -> Tensor:
        """log p at ``sample(noise)``, from the noise itself: nothing is subtracted and divided again."""
        return standard_normal_log_prob(noise) - torch.log(self.scale)

    def kl_to_standard(self) -> Tensor:
        """KL(N(loc, scale²) ‖ N(0, 1)), element by element, in nats (Kingma & Welling 2014, App. B)."""
        return 0.5 * (self.loc**2 + self.scale**2 - 1) - torch.log(self.scale)

    def log_prob_by_row(self, x: Tensor) -> Tensor:
        """log densities of vectors x [...,L] under each of J rows loc, scale [J,L] -> [...,J] float64.

        The squares are expanded, so that the work is two matrix products and not an array of [...,J,L]; in float64,
        because the terms cancel.
        """
        x, loc, precision = x.double(), self.loc.double(), self.scale.double() ** -2
        quadratic = x**2 @ precision.T - 2 * (x @ (loc * precision).T) + (loc**2 * precision).sum(-1)
        log_volume = torch.log(self.scale.double()).sum(-1) + loc.shape[-1] * HALF_LOG_2PI
        return -0.5 * quadratic - log_volume

    def sample_rows(self, weights: Tensor, noise: Tensor) -> Tensor:
        """Draws [M,L] from noise [M,L], of the row that each of ``weights`` [M,J], all 0 but a 1, picks."""
        weights = weights.to(self.loc.dtype)
        return Normal(weights @ self.loc, weights @ self.scale).sample(noise)
