"""Masked dense layers whose outputs see only what comes before them in an order (MADE, Germain et al. 2015)."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mask_between(inputs: Tensor, outputs: Tensor, strict: bool) -> Tensor:
    """Degrees [I] and [O] -> mask [O,I], 1 where an output's degree is at least (``strict``: above) the input's.

    Germain et al. 2015, eq. 12 and 13.
    """
    below, above = inputs.unsqueeze(0), outputs.unsqueeze(1)
    return (above > below if strict else above >= below).float()


class MaskedLinear(nn.Linear):
    """Dense layer [...,I] -> [...,O] with the weights that ``mask`` [O,I] names.

    In training the product of weight and mask is taken at each step, so that the others get no gradient; ``eval()``
    folds the mask into the weight, and a graph exported in eval mode holds the weight alone.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=False)
        self._fold()

    @torch.no_grad()
    def _fold(self) -> None:
        self.weight.mul_(self.mask)

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode; eval mode folds the mask into the weight."""
        super().train(mode)
        if not mode:
            self._fold()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask if self.training else self.weight, self.bias)


class AutoregressiveNetwork(nn.Module):
    """z [N,K,L] and context [N,H] -> two outputs [N,K,L]; in each, element i depends on z_j with j < i alone.

    ``reverse`` turns the order round: on z_j with j > i. Two hidden layers of H = ``hidden`` ELUs, the context added to
    the first; some units have degree 0 and see the context only, so that it reaches the first element too. Starts at
    zero.
    """

    def __init__(self, latent_dim: int, hidden: int, reverse: bool) -> None:
        super().__init__()
        order = torch.arange(1, latent_dim + 1)
        order = order.flip(0) if reverse else order
        middle = torch.arange(hidden) * latent_dim // hidden
        self.first = MaskedLinear(mask_between(order, middle, strict=False))
        self.second = MaskedLinear(mask_between(middle, middle, strict=False))
        self.last = MaskedLinear(mask_between(middle, order.repeat(2), strict=True))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.elu(self.first(z) + context.unsqueeze(1))
        one, other = self.last(F.elu(self.second(hidden))).chunk(2, -1)
        return one, other
