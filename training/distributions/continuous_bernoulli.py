"""The continuous Bernoulli distribution on [0,1] (Loaiza-Ganem & Cunningham 2019), in its logits l = log λ/(1 − λ).

p(x) = e^(xl) · l/(e^l − 1): an exponential family in l, of log normaliser A(l) = log (e^l − 1)/l and mean A'(l). Both
cancel near l = 0, that is λ = ½, where their Taylor series take over (their sec. 4.1 and supplement).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TAYLOR_BELOW = 1.0
"""|l| up to which the series are used: cut after four terms they are off by less than 3e-8 there, and beyond it the
closed forms lose less than a digit of float32."""


def log_normaliser(logits: Tensor) -> Tensor:
    """A(l) = log (e^l − 1)/l = l/2 + log sinh(|l|/2)/(|l|/2), in nats."""
    near = logits.abs() < TAYLOR_BELOW
    small, large = torch.where(near, logits, 0.0) ** 2, torch.where(near, TAYLOR_BELOW, logits.abs())
    series = small * (1 / 24 - small * (1 / 2880 - small * (1 / 181440 - small / 9676800)))
    closed = 0.5 * large + torch.log((1 - torch.exp(-large)) / large)
    return 0.5 * logits + torch.where(near, series, closed)


def mean(logits: Tensor) -> Tensor:
    """E[x] = A'(l) = 1/(1 − e^−l) − 1/l."""
    near = logits.abs() < TAYLOR_BELOW
    small, large = torch.where(near, logits, 0.0), torch.where(near, TAYLOR_BELOW, logits.abs())
    square = small**2
    series = 0.5 + small * (1 / 12 - square * (1 / 720 - square * (1 / 30240 - square / 1209600)))
    upper = 1 / (1 - torch.exp(-large)) - 1 / large
    return torch.where(near, series, torch.where(logits > 0, upper, 1 - upper))


def quantile(u: Tensor, logits: Tensor) -> Tensor:
    """x at probability u in [0,1): log(1 + u(e^l − 1))/l, of −|l| and mirrored where l > 0, for e^l could overflow."""
    near = logits.abs() < 0.01  # there the two terms of the series are off by 2e-6, a fraction of a level
    size = torch.where(near, 1.0, logits.abs())
    mirrored = logits > 0
    above = torch.where(mirrored, u, 1 - u)
    x = -torch.log((above + (1 - above) * torch.exp(-size)).clamp(min=1e-37)) / size
    series = u + 0.5 * logits * u * (1 - u)
    return torch.where(near, series, torch.where(mirrored, 1 - x, x)).clamp(0, 1)


def logits_of(expected: Tensor) -> Tensor:
    """The logits whose mean is ``expected``, within ±500, by bisection."""
    low, high = torch.full_like(expected, -500.0), torch.full_like(expected, 500.0)
    for _ in range(40):
        middle = 0.5 * (low + high)
        below = mean(middle) < expected
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)


class ContinuousBernoulli(NamedTuple):
    """p(x) = e^(xl − A(l)) on [0,1] with logits l and the log normaliser A; sampled from uniform noise."""

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x] = A'(l)."""
        return mean(self.logits)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of x in [0,1], element by element, in nats."""
        return x * self.logits - log_normaliser(self.logits)

    def sample(self, noise: Tensor) -> Tensor:
        """x at probability u in [0,1), by the inverse distribution function."""
        return quantile(noise, self.logits)
