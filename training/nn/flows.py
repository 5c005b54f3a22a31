"""Invertible maps of vectors with tractable Jacobians, in plain tensor algebra so that they export."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_LOG_SCALE = 3.0
"""Bound of a coupling's log-scale: |s| = 3·tanh(·/3) keeps a step's factor in (e⁻³, e³)."""


class AffineCoupling(nn.Module):
    """y_b = x_b · exp(s(x_a)) + t(x_a), y_a = x_a for the two halves of a vector (RealNVP, Dinh et al. 2017, eq. 7–8).

    Starts as the identity. ``swap`` says which half is left alone.
    """

    def __init__(self, size: int, hidden: int, swap: bool) -> None:
        super().__init__()
        first = size // 2
        self.sizes = (first, size - first)
        self.swap = swap
        kept = self.sizes[1] if swap else self.sizes[0]
        self.network = nn.Sequential(
            nn.Linear(kept, hidden),
            nn.LeakyReLU(0.01),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.01),
            nn.Linear(hidden, 2 * (size - kept)),
        )
        nn.init.zeros_(self.network[-1].weight)  # type: ignore[arg-type]  # a Linear's
        nn.init.zeros_(self.network[-1].bias)  # type: ignore[arg-type]

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x[..., : self.sizes[0]], x[..., self.sizes[0] :]
        return (second, first) if self.swap else (first, second)

    def _joined(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat([moved, kept] if self.swap else [kept, moved], -1)

    def _scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.network(kept).float().chunk(2, -1)
        return MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE), shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [...,D] -> y [...,D], log |det ∂y/∂x| [...] float64."""
        kept, moved = self._halves(x)
        log_scale, shift = self._scale_and_shift(kept)
        return self._joined(kept, moved * torch.exp(log_scale) + shift), log_scale.double().sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y [...,D] -> x [...,D], log |det ∂x/∂y| [...] float64."""
        kept, moved = self._halves(y)
        log_scale, shift = self._scale_and_shift(kept)
        return self._joined(kept, (moved - shift) * torch.exp(-log_scale)), -log_scale.double().sum(-1)


class CouplingStack(nn.Module):
    """Affine couplings that leave alternate halves alone, with fixed permutations between pairs of them.

    The permutations are drawn once, from a generator of their own, and kept with the weights.
    """

    def __init__(self, size: int, steps: int, hidden: int) -> None:
        super().__init__()
        if size < 2:
            raise ValueError(f"a coupling wants at least 2 dimensions, got {size}")
        self.steps = nn.ModuleList(AffineCoupling(size, hidden, swap=bool(i % 2)) for i in range(steps))
        generator = torch.Generator().manual_seed(0)
        orders = torch.stack([torch.randperm(size, generator=generator) for _ in range(steps)])
        self.orders: Tensor
        self.backs: Tensor
        self.register_buffer("orders", orders)
        self.register_buffer("backs", torch.argsort(orders, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [...,D] -> y [...,D], log |det ∂y/∂x| [...] float64."""
        total = torch.zeros_like(x[..., 0], dtype=torch.float64)
        for i, step in enumerate(self.steps):
            x, log_det = step(x)
            total = total + log_det
            if i % 2:
                x = x[..., self.orders[i]]
        return x, total

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y [...,D] -> x [...,D], log |det ∂x/∂y| [...] float64."""
        total = torch.zeros_like(y[..., 0], dtype=torch.float64)
        for i in reversed(range(len(self.steps))):
            if i % 2:
                y = y[..., self.backs[i]]
            y, log_det = self.steps[i].inverse(y)  # type: ignore[operator]  # an AffineCoupling's
            total = total + log_det
        return y, total
