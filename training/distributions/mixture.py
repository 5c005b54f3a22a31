"""Finite mixtures of normal distributions of vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from training.distributions.multivariate_normal import MultivariateNormal
from training.distributions.normal import Normal


class Mixture(NamedTuple):
    """Σ_j w_j p_j(x) over J components, weights [J] that sum to 1; sampled from noise and one uniform choice a draw.

    log p(x) = log Σ_j exp(log w_j + log p_j(x)).
    """

    weights: Tensor
    components: Normal | MultivariateNormal

    @property
    def mean(self) -> Tensor:
        """E[x] = Σ_j w_j loc_j, [L]."""
        return self.weights @ self.components.loc

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of x [...,L] -> [...] float64, in nats."""
        return torch.logsumexp(torch.log(self.weights).double() + self.components.log_prob_by_row(x), -1)

    def sample(self, noise: Tensor, choice: Tensor) -> Tensor:
        """Draws [M,L] from standard normal noise [M,L] and choice [M] uniform in [0,1)."""
        return self.components.sample_rows(chosen(choice, self.weights), noise)


def chosen(choice: Tensor, weights: Tensor) -> Tensor:
    """Component by the inverse distribution function of ``weights`` [J] at choice [M] -> [M,J], all 0 but a 1."""
    edges = torch.cumsum(weights, 0)
    above = (choice.unsqueeze(1) < edges).to(weights.dtype)  # 1 from the chosen component on
    above = torch.cat([above[:, :-1], torch.ones_like(above[:, :1])], 1)  # rounding must not leave the last one out
    return above - torch.cat([torch.zeros_like(above[:, :1]), above[:, :-1]], 1)
