"""The logistic distribution on the 256 levels of 8-bit pixels (Kingma et al. 2016, App. C; Salimans et al. 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_LEVEL = 0.5 / 255


def level_log_prob(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log P(level x) for levels x in {0, 1/255, …, 1}, in nats: the logistic's mass between the level's edges.

    With a and b the standardised upper and lower edge,
    log(σ(a) − σ(b)) = log σ(a) + log σ(−b) + log(1 − e^(b−a)); levels 0 and 255 take the whole tail. The last term is
    written log 2t/(1 + t) with t = tanh((a−b)/2), for 1 − e^(b−a) cancels where the scale is wide.
    """
    log_cdf = -F.softplus(-(x + HALF_LEVEL - loc) / scale)
    log_sf = -F.softplus((x - HALF_LEVEL - loc) / scale)
    t = torch.tanh(HALF_LEVEL / scale)
    inner = log_cdf + log_sf + torch.log(2 * t / (1 + t))
    return torch.where(x < HALF_LEVEL, log_cdf, torch.where(x > 1 - HALF_LEVEL, log_sf, inner))


def clipped_mean(loc: Tensor, scale: Tensor) -> Tensor:
    """E of the logistic clipped to [0,1]: s·(softplus(m/s) − softplus((m−1)/s))."""
    return (scale * (F.softplus(loc / scale) - F.softplus((loc - 1) / scale))).clamp(0, 1)


def level_quantile(u: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The level at probability u in [0,1): the logistic's inverse distribution function, clipped and rounded."""
    u = u.clamp(1e-6, 1 - 1e-6)
    return torch.round((loc + scale * (torch.log(u) - torch.log(1 - u))).clamp(0, 1) * 255) / 255
