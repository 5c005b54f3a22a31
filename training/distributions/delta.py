"""A point: all probability at one value."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Delta(NamedTuple):
    """x = loc with certainty. It has no density: ``log_prob`` is 0, as a bijection takes log p(x|z) to be."""

    loc: Tensor

    @property
    def mean(self) -> Tensor:
        """E[x] = loc."""
        return self.loc

    def log_prob(self, x: Tensor) -> Tensor:
        """Zeros of loc's shape, whatever x is."""
        return torch.zeros_like(self.loc)

    def sample(self, noise: Tensor) -> Tensor:
        """x = loc, whatever the noise is."""
        return self.loc
