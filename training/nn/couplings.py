"""Invertible maps of images with tractable Jacobians (RealNVP, Dinh et al. 2017; Glow, Kingma & Dhariwal 2018).

``forward`` maps images [N,C,H,W] towards latents and gives log |det ∂y/∂x| in nats, float64: [N], or 0-dim where it is
the same for every image. ``inverse`` maps back. ``initialise`` is forward, and sets from those images what starts from
data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.nn.flows import MAX_LOG_SCALE
from training.nn.networks import GatedConv, gate

NARROWEST = 1e-3
"""Floor of a channel's standard deviation when activations are normalised: a constant channel is not blown up."""


class Bijection(nn.Module, ABC):
    """An invertible map of images."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N,C,H,W] -> y, log |det ∂y/∂x|."""

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """y -> x."""

    def initialise(self, x: Tensor) -> Tensor:
        """x -> y, having set from x what starts from data."""
        y: Tensor = self(x)[0]
        return y


class Chain(Bijection):
    """Bijections one after the other."""

    def __init__(self, steps: Iterable[Bijection]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def _bijections(self) -> list[Bijection]:
        return [step for step in self.steps if isinstance(step, Bijection)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x[:, 0, 0, 0], dtype=torch.float64)
        for step in self._bijections():
            x, log_det = step(x)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor) -> Tensor:
        for step in reversed(self._bijections()):
            y = step.inverse(y)
        return y

    def initialise(self, x: Tensor) -> Tensor:
        for step in self._bijections():
            x = step.initialise(x)
        return x


class Logit(Bijection):
    """y = logit(α + (1 − 2α)x) of x in [0,1] (Dinh et al. 2017, sec. 4.1): pixels without their edges.

    With s = α + (1 − 2α)x, log dy/dx = log(1 − 2α) − log s − log(1 − s).
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.bound + (1 - 2 * self.bound) * x
        log_s, log_rest = torch.log(s), torch.log(1 - s)
        return log_s - log_rest, (math.log(1 - 2 * self.bound) - log_s - log_rest).double().sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        return (torch.sigmoid(y) - self.bound) / (1 - 2 * self.bound)


class Squeeze(Bijection):
    """Blocks of ``factors`` pixels become channels: [N,C,H,W] -> [N,C·a·b,H/a,W/b] (Dinh et al. 2017, sec. 3.6)."""

    def __init__(self, factors: tuple[int, int]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), (channels, height, width) = self.factors, x.shape[1:]
        blocks = x.reshape(-1, channels, height // a, a, width // b, b).permute(0, 1, 3, 5, 2, 4)
        return blocks.reshape(-1, channels * a * b, height // a, width // b), x.new_zeros((), dtype=torch.float64)

    def inverse(self, y: Tensor) -> Tensor:
        (a, b), (channels, height, width) = self.factors, y.shape[1:]
        blocks = y.reshape(-1, channels // (a * b), a, b, height, width).permute(0, 1, 4, 2, 5, 3)
        return blocks.reshape(-1, channels // (a * b), height * a, width * b)


class ActNorm(Bijection):
    """y = (x + b)·exp(s), b and s by channel (Kingma & Dhariwal 2018, sec. 3.1).

    ``initialise`` makes the images' channels zero-mean and unit-variance after it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.shape[2] * x.shape[3] * self.log_scale.double().sum()
        return (x + self.shift) * torch.exp(self.log_scale), log_det

    def inverse(self, y: Tensor) -> Tensor:
        return y * torch.exp(-self.log_scale) - self.shift

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(x, (0, 2, 3), correction=0)
        self.shift.copy_(-mean.view_as(self.shift))
        self.log_scale.copy_(-torch.log(deviation.clamp(min=NARROWEST)).view_as(self.log_scale))
        return super().initialise(x)


class InvertibleConv(Bijection):
    """A 1×1 convolution by W = P(L + I)(U + diag(sign·eˢ)), log |det| = HW·Σs (Kingma & Dhariwal 2018, eq. 10–11).

    P and the signs are those of a random rotation's decomposition, and stay. In eval mode W and its inverse are
    constants, those of the weights at that moment, so that graphs hold no inversion.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower, self.upper = nn.Parameter(lower.tril(-1).contiguous()), nn.Parameter(upper.triu(1).contiguous())
        self.log_scale = nn.Parameter(torch.log(diagonal.abs()))
        self.permutation: Tensor
        self.signs: Tensor
        self.weight: Tensor
        self.weight_inverse: Tensor
        self.register_buffer("permutation", permutation)
        self.register_buffer("signs", torch.sign(diagonal))
        self.register_buffer("weight", rotation, persistent=False)
        self.register_buffer("weight_inverse", rotation.T.contiguous(), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """As everywhere; eval mode fixes W and its inverse."""
        super().train(mode)
        if not mode:
            with torch.no_grad():
                self.weight = self._composed()
                self.weight_inverse = torch.linalg.inv(self.weight.double()).to(self.weight.dtype)
        return self

    def _composed(self) -> Tensor:
        identity = torch.eye(len(self.signs), dtype=self.signs.dtype, device=self.signs.device)
        upper = self.upper.triu(1) + torch.diag(self.signs * torch.exp(self.log_scale))
        return self.permutation @ (self.lower.tril(-1) + identity) @ upper

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x):
            y = mix(x, self._composed() if self.training else self.weight)
        return y, x.shape[2] * x.shape[3] * self.log_scale.double().sum()

    def inverse(self, y: Tensor) -> Tensor:
        with full_precision(y):
            return mix(y, torch.linalg.inv(self._composed()) if self.training else self.weight_inverse)


def mix(x: Tensor, weight: Tensor) -> Tensor:
    """Channels of x [N,C,H,W] multiplied by ``weight`` [C,C]."""
    return F.conv2d(x, weight.unsqueeze(-1).unsqueeze(-1))


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast off: a map rounded to bfloat16 is not the inverse of its inverse."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.split(self.sizes, 1)
        log_scale, shift = self.network(kept)
        return torch.cat([kept, moved * torch.exp(log_scale) + shift], 1), log_scale.double().sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        kept, moved = y.split(self.sizes, 1)
        log_scale, shift = self.network(kept)
        return torch.cat([kept, (moved - shift) * torch.exp(-log_scale)], 1)


class CheckerboardCoupling(Bijection):
    """The same between the two colours of a checkerboard (Dinh et al. 2017, sec. 3.4): for a single channel."""

    def __init__(self, shape: tuple[int, int, int], hidden: int, swap: bool) -> None:
        super().__init__()
        channels, height, width = shape
        colour = (torch.arange(height).unsqueeze(1) + torch.arange(width) + swap) % 2
        self.moved: Tensor
        self.register_buffer("moved", colour.float(), persistent=False)
        self.network = ScaleAndShift(channels, hidden, channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = (self.moved * value for value in self.network((1 - self.moved) * x))
        return x * torch.exp(log_scale) + shift, log_scale.double().sum((1, 2, 3))

    def inverse(self, y: Tensor) -> Tensor:
        log_scale, shift = (self.moved * value for value in self.network((1 - self.moved) * y))
        return (y - shift) * torch.exp(-log_scale)
