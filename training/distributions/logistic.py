"""Logistic distributions: the standard one, and those on the 256 levels of 8-bit pixels.

Kingma et al. 2016, App. C; Salimans et al. 2017.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_LEVEL = 0.5 / 255
STANDARD_DEVIATION = math.pi / math.sqrt(3)
"""Of the standard logistic distribution."""
ERFC = (
    *(-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806),
    *(0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277),
)


def standard_logistic_log_prob(x: Tensor) -> Tensor:
    """log p(x) = −|x| − 2 log(1 + e^−|x|) of the standard logistic, element by element, in nats."""
    size = x.abs()
    return -size - 2 * torch.log1p(torch.exp(-size))


def standard_logistic_from_normal(noise: Tensor) -> Tensor:
    """F⁻¹(Φ(ε)) of standard normal ε for the logistic F: log Φ(ε) − log Φ(−ε), element by element."""
    tail = log_normal_tail(noise.abs())
    return torch.sign(noise) * (torch.log1p(-torch.exp(tail)) - tail)


def log_normal_tail(a: Tensor) -> Tensor:
    """log Φ(−a) of a ≥ 0, Φ the standard normal distribution function, to 1.2e-7 however far out the tail.

    erfc(x) = t·exp(−x² + P(t)) with t = 1/(1 + x/2), x = a/√2 (Press et al. 1992, sec. 6.2), which needs no operator
    erfc, and no difference that cancels.
    """
    t = 1 / (1 + a / math.sqrt(8))
    polynomial = torch.zeros_like(t)
    for coefficient in reversed(ERFC):
        polynomial = polynomial * t + coefficient
    return torch.log(t / 2) - 0.5 * a**2 + polynomial


class DiscretisedLogistic(NamedTuple):
    """The logistic's mass on the levels x in {0, 1/255, …, 1}; levels 0 and 1 take the whole tail.

    With a and b the standardised upper and lower edge of the level,
    log(σ(a) − σ(b)) = log σ(a) + log σ(−b) + log(1 − e^(b−a)). The last term is written log 2t/(1 + t) with
    t = tanh((a−b)/2), for 1 − e^(b−a) cancels where the scale is wide. Sampled from uniform noise.
    """

    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        """E of the logistic clipped to [0,1]: s·(softplus(m/s) − softplus((m−1)/s))."""
        loc, scale = self
        return (scale * (F.softplus(loc / scale) - F.softplus((loc - 1) / scale))).clamp(0, 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log P(level x), element by element, in nats."""
        loc, scale = self
        log_cdf = -F.softplus(-(x + HALF_LEVEL - loc) / scale)
        log_sf = -F.softplus((x - HALF_LEVEL - loc) / scale)
        t = torch.tanh(HALF_LEVEL / scale)
        inner = log_cdf + log_sf + torch.log(2 * t / (1 + t))
        return torch.where(x < HALF_LEVEL, log_cdf, torch.where(x > 1 - HALF_LEVEL, log_sf, inner))

    def sample(self, noise: Tensor) -> Tensor:
        """The level at probability u in [0,1): the logistic's inverse distribution function, clipped and rounded."""
        u = noise.clamp(1e-6, 1 - 1e-6)
        x = self.loc + self.scale * (torch.log(u) - torch.log(1 - u))
        return torch.round(x.clamp(0, 1) * 255) / 255


class LogisticMixture(NamedTuple):
    """Σ_j w_j · DiscretisedLogistic(loc_j, scale_j), parameters [...,J,C,H,W] of J components (Salimans et al. 2017).

    Sampled from uniform noise [...,C,H,W].
    """

    log_weights: Tensor
    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x] = Σ_j w_j E_j[x], [...,C,H,W]."""
        return (torch.exp(self.log_weights) * self._components.mean).sum(-4).clamp(0, 1)

    @property
    def _components(self) -> DiscretisedLogistic:
        return DiscretisedLogistic(self.loc, self.scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """log P(level x) of x [...,C,H,W], element by element, in nats."""
        return torch.logsumexp(self.log_weights + self._components.log_prob(x.unsqueeze(-4)), -4)

    def sample(self, noise: Tensor) -> Tensor:
        """One uniform number chooses a component; what it exceeds the lower components' weight by is uniform again."""
        weights, noise = torch.exp(self.log_weights), noise.unsqueeze(-4)
        upper = torch.cumsum(weights, -4)
        lower = upper - weights
        # Rounding must leave neither the first nor the last component out.
        above = (noise >= lower.narrow(-4, 1, lower.shape[-4] - 1)).to(noise.dtype)
        edge = torch.zeros_like(above.narrow(-4, 0, 1))
        picked = torch.cat([edge + 1, above], -4) - torch.cat([above, edge], -4)
        rest = (picked * (noise - lower) / weights.clamp(min=1e-12)).sum(-4).clamp(0, 1)
        return DiscretisedLogistic((picked * self.loc).sum(-4), (picked * self.scale).sum(-4)).sample(rest)
