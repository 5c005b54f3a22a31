"""The Bernoulli distribution in its logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Bernoulli(NamedTuple):
    """P(x = 1) = σ(l) for binary x and logits l; sampled from uniform noise.

    log P(x) = x·l − log(1 + eˡ), which at grey x in (0,1) is the cross-entropy's negative, and no probability
    (Loaiza-Ganem & Cunningham 2019, sec. 3).
    """

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x] = σ(l)."""
        return torch.sigmoid(self.logits)

    def log_prob(self, x: Tensor) -> Tensor:
        """log P(x), element by element, in nats."""
        return x * self.logits - F.softplus(self.logits)

    def sample(self, noise: Tensor) -> Tensor:
        """x = 1[u < σ(l)] for uniform u in [0,1)."""
        return (noise < torch.sigmoid(self.logits)).to(noise.dtype)
