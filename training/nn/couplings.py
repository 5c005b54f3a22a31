"""Couplings: bijections that scale and shift one half of their input by functions of the other (Dinh et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.nn.bijections import Bijection
from training.nn.networks import GatedConv, gate

MAX_LOG_SCALE = 3.0
"""Bound of a coupling's log-scale: |s| = 3·tanh(·/3) keeps a step's factor in (e⁻³, e³)."""


class AffineCoupling(Bijection):
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

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [...,D] -> y [...,D], log |det ∂y/∂x| [...] float64."""
        kept, moved = self._halves(x)
        log_scale, shift = self._scale_and_shift(kept)
        return self._joined(kept, moved * torch.exp(log_scale) + shift), log_scale.double().sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y [...,D] -> x [...,D], log |det ∂x/∂y| [...] float64."""
        kept, moved = self._halves(y)
        log_scale, shift = self._scale_and_shift(kept)
        return self._joined(kept, (moved - shift) * torch.exp(-log_scale)), -log_scale.double().sum(-1)

    def inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]


class CouplingStack(Bijection):
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

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [...,D] -> y [...,D], log |det ∂y/∂x| [...] float64."""
        total = torch.zeros_like(x[..., 0], dtype=torch.float64)
        for i, step in enumerate(self.steps):
            x, ladj = step.call_and_ladj(x)  # type: ignore[operator]  # an AffineCoupling's
            total = total + ladj
            if i % 2:
                x = x[..., self.orders[i]]
        return x, total

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y [...,D] -> x [...,D], log |det ∂x/∂y| [...] float64."""
        total = torch.zeros_like(y[..., 0], dtype=torch.float64)
        for i in reversed(range(len(self.steps))):
            if i % 2:
                y = y[..., self.backs[i]]
            y, ladj = self.steps[i].inverse_and_ladj(y)  # type: ignore[operator]  # an AffineCoupling's
            total = total + ladj
        return y, total

    def inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]


class GatedPointwise(nn.Module):
    """Gated 1×1 convolution at constant width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return gate(self.conv(x))


class ScaleAndShift(nn.Module):
    """Gated convolutions [N,inputs,H,W] -> log s, t, each [N,outputs,H,W]; both start at 0, |log s| ≤ MAX_LOG_SCALE."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        head = nn.Conv2d(hidden, 2 * outputs, 3, padding=1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)  # type: ignore[arg-type]  # it has one
        self.network = nn.Sequential(GatedConv(inputs, hidden), GatedPointwise(hidden), head)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.network(x).to(x.dtype).chunk(2, 1)
        return MAX_LOG_SCALE * torch.tanh(raw / MAX_LOG_SCALE), shift


class ChannelCoupling(Bijection):
    """y_b = x_b · exp(s(x_a)) + t(x_a), y_a = x_a for the first and second half of the channels (Dinh et al. 2017)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.sizes = (channels // 2, channels - channels // 2)
        self.network = ScaleAndShift(self.sizes[0], hidden, self.sizes[1])

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.split(self.sizes, 1)
        log_scale, shift = self.network(kept)
        return torch.cat([kept, moved * torch.exp(log_scale) + shift], 1), log_scale.double().sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        kept, moved = y.split(self.sizes, 1)
        log_scale, shift = self.network(kept)
        return torch.cat([kept, (moved - shift) * torch.exp(-log_scale)], 1)


class CheckerboardCoupling(Bijection):
    """An affine coupling of the two colours of a checkerboard (Dinh et al. 2017, sec. 3.4), for a single channel."""

    def __init__(self, shape: tuple[int, int, int], hidden: int, swap: bool) -> None:
        super().__init__()
        channels, height, width = shape
        colour = (torch.arange(height).unsqueeze(1) + torch.arange(width) + swap) % 2
        self.moved: Tensor
        self.register_buffer("moved", colour.float(), persistent=False)
        self.network = ScaleAndShift(channels, hidden, channels)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = (self.moved * value for value in self.network((1 - self.moved) * x))
        return x * torch.exp(log_scale) + shift, log_scale.double().sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        log_scale, shift = (self.moved * value for value in self.network((1 - self.moved) * y))
        return (y - shift) * torch.exp(-log_scale)
