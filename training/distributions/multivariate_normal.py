"""The normal distribution of vectors with a full covariance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.distributions.normal import standard_normal_log_prob


class MultivariateNormal(NamedTuple):
    """N(loc, A Aᵀ) of vectors [L], in float64; sampled from standard normal noise.

    ``factor`` A is lower triangular with a positive diagonal, [L,L], or [J,L,L] for J components with loc [J,L].
    ``inverse_factor`` A⁻¹ is given too, because a graph holds no inversion.

    log p(x) = −½ ‖A⁻¹(x − loc)‖² − log |det A| − ½ L log 2π.
    """

    loc: Tensor
    factor: Tensor
    inverse_factor: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x] = loc."""
        return self.loc

    @property
    def scale(self) -> Tensor:
        """Marginal standard deviations [L]."""
        return torch.sqrt((self.factor**2).sum(-1))

    @property
    def log_volume(self) -> Tensor:
        """log |det A|, 0-dim or [J]."""
        return torch.log(torch.diagonal(self.factor, dim1=-2, dim2=-1)).sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of x [...,L] -> [...], in nats."""
        whitened = (x.double() - self.loc) @ self.inverse_factor.T
        return standard_normal_log_prob(whitened).sum(-1) - self.log_volume

    def sample(self, noise: Tensor) -> Tensor:
        """x = loc + A ε for standard normal ε [...,L] -> [...,L]."""
        return self.loc + noise.double() @ self.factor.T

    def log_prob_by_row(self, x: Tensor) -> Tensor:
        """log densities of x [...,L] under each of J components -> [...,J]; all are whitened in one matrix product."""
        shift = (self.inverse_factor @ self.loc.unsqueeze(-1)).squeeze(-1)
        whitened = (x.double() @ _side_by_side(self.inverse_factor)).unflatten(-1, self.loc.shape) - shift
        return standard_normal_log_prob(whitened).sum(-1) - self.log_volume

    def sample_rows(self, weights: Tensor, noise: Tensor) -> Tensor:
        """Draws [M,L] from noise [M,L], of the component that each of ``weights`` [M,J], all 0 but a 1, picks."""
        draws = self.loc + (noise.double() @ _side_by_side(self.factor)).unflatten(-1, self.loc.shape)
        return (weights.to(draws.dtype).unsqueeze(-1) * draws).sum(1)


def _side_by_side(factors: Tensor) -> Tensor:
    """Matrices [J,L,L] -> [L,J·L], by which a row times the transpose of each of them is one product."""
    return factors.permute(2, 0, 1).flatten(1)
