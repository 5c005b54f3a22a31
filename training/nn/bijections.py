"""Invertible maps of images with tractable Jacobians (RealNVP, Dinh et al. 2017; Glow, Kingma & Dhariwal 2018)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributions import Transform
from training.nn.precision import full_precision

NARROWEST = 1e-3
"""Floor of a channel's standard deviation when activations are normalised: a constant channel is not blown up."""


class Bijection(nn.Module, Transform):
    """An invertible map, towards latents; the protocol of every bijection here.

    ``call_and_ladj`` maps x to y and gives log |det ∂y/∂x| in nats, float64: [N], or 0-dim where it is the same for
    every row. ``inverse`` maps back.
    """

    @abstractmethod
    def inverse(self, y: Tensor) -> Tensor:
        """y -> x."""

    def initialise(self, x: Tensor) -> Tensor:
        """Set the parameters that start from data by training examples x; x -> y with them."""
        return self.call_and_ladj(x)[0]


class Chain(Bijection):
    """Bijections one after the other."""

    def __init__(self, steps: Iterable[Bijection]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    def _bijections(self) -> list[Bijection]:
        return [step for step in self.steps if isinstance(step, Bijection)]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x[:, 0, 0, 0], dtype=torch.float64)
        for step in self._bijections():
            x, ladj = step.call_and_ladj(x)
            total = total + ladj
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

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
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

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
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

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        ladj = x.shape[2] * x.shape[3] * self.log_scale.double().sum()
        return (x + self.shift) * torch.exp(self.log_scale), ladj

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
        """Set train or eval mode; eval mode fixes W and its inverse at the present weights."""
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

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x):
            y = mix(x, self._composed() if self.training else self.weight)
        return y, x.shape[2] * x.shape[3] * self.log_scale.double().sum()

    def inverse(self, y: Tensor) -> Tensor:
        with full_precision(y):
            return mix(y, torch.linalg.inv(self._composed()) if self.training else self.weight_inverse)


def mix(x: Tensor, weight: Tensor) -> Tensor:
    """Channels of x [N,C,H,W] multiplied by ``weight`` [C,C]."""
    return F.conv2d(x, weight.unsqueeze(-1).unsqueeze(-1))
