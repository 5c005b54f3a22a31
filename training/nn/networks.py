"""Encoder and decoder trunks: gated MLPs and gated convolutions for any image size and channel count.

An encoder trunk maps images [N,C,H,W] to features [N,F]; a decoder trunk maps latents [M,L] to raw likelihood
parameters [M,P,C,H,W], P of them a pixel. Gated layers are those of Dauphin et al. 2017 (h = a ⊙ σ(b)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import NetworkConfig

Shape = tuple[int, int, int]


def gate(activations: Tensor, dim: int = 1) -> Tensor:
    """a ⊙ σ(b) for the two halves a, b of ``activations`` along ``dim`` (gated linear unit)."""
    value, control = activations.chunk(2, dim)
    return value * torch.sigmoid(control)


class GatedLinear(nn.Module):
    """Gated dense layer [N, inputs] -> [N, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        return gate(self.linear(x))


class GatedConv(nn.Module):
    """Gated 3×3 convolution; ``stride`` 2 halves height and width, rounding up."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 2 * outputs, 3, stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return gate(self.conv(x))


class Upsample(nn.Module):
    """3×3 convolution to four channels for each output channel, rearranged to twice the height and width.

    A sub-pixel convolution (Shi et al. 2016): all arithmetic happens at the low resolution. Crops to ``size``.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(inputs, 4 * outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.rearranged(self.conv(x))

    def rearranged(self, x: Tensor) -> Tensor:
        """[N,4·c,h,w] -> [N,c,*size], for any c."""
        return F.pixel_shuffle(x, 2)[:, :, : self.size[0], : self.size[1]]


class GatedUpsample(nn.Module):
    """Gated sub-pixel convolution [N,inputs,h,w] -> [N,outputs,*size].

    The gate goes before the rearrangement, which leaves the halves what they are, and has half to move then: that costs
    ONNX Runtime as much as a convolution.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.upsample = Upsample(inputs, 2 * outputs, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample.rearranged(gate(self.upsample.conv(x)))


class GatedResidual(nn.Module):
    """x + conv(gated conv(x)) at constant width and size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = GatedConv(channels, channels)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x))


def gated_mlp(sizes: Sequence[int], dropout: float) -> nn.Sequential:
    """Gated dense layers of the given sizes, dropout after each."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers.append(GatedLinear(inputs, outputs))
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


def pyramid(height: int, width: int, levels: int) -> list[tuple[int, int]]:
    """Sizes [(H, W), …] after 0…levels halvings that round up."""
    sizes = [(height, width)]
    for _ in range(levels):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
        sizes.append((height, width))
    return sizes


def mlp_encoder(shape: Shape, config: NetworkConfig) -> tuple[nn.Module, int]:
    """Trunk [N,C,H,W] -> [N,F] of gated dense layers, and its F."""
    sizes = [math.prod(shape), *config.hidden]
    return nn.Sequential(nn.Flatten(), gated_mlp(sizes, config.dropout)), sizes[-1]


def mlp_decoder(latent_dim: int, shape: Shape, parameters: int, config: NetworkConfig) -> nn.Module:
    """Trunk [M,L] -> [M,P,C,H,W] of gated dense layers, the encoder's mirrored."""
    sizes = [latent_dim, *reversed(config.hidden)]
    head = nn.Linear(sizes[-1], parameters * math.prod(shape))
    return nn.Sequential(gated_mlp(sizes, config.dropout), head, nn.Unflatten(1, (parameters, *shape)))


def conv_encoder(shape: Shape, config: NetworkConfig) -> tuple[nn.Module, int]:
    """Trunk [N,C,H,W] -> [N,F]: a stride-2 gated convolution and residual blocks a level, then gated dense layers."""
    widths = [shape[0], *config.channels]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers.append(GatedConv(inputs, outputs, stride=2))
        layers += [GatedResidual(outputs) for _ in range(config.blocks)]
    height, width = pyramid(*shape[1:], len(config.channels))[-1]
    sizes = [widths[-1] * height * width, *config.hidden]
    return nn.Sequential(*layers, nn.Flatten(), gated_mlp(sizes, config.dropout)), sizes[-1]


def conv_decoder(latent_dim: int, shape: Shape, parameters: int, config: NetworkConfig) -> nn.Module:
    """Trunk [M,L] -> [M,P,C,H,W]: gated dense layers, then residual blocks and a doubling a level."""
    sizes = pyramid(*shape[1:], len(config.channels))
    top = (config.channels[-1], *sizes[-1])
    dense = [latent_dim, *reversed(config.hidden)]
    layers: list[nn.Module] = [gated_mlp(dense, config.dropout), nn.Linear(dense[-1], math.prod(top))]
    layers.append(nn.Unflatten(1, top))
    widths = list(reversed(config.channels))
    for level, (inputs, size) in enumerate(zip(widths, reversed(sizes[:-1]), strict=True)):
        layers += [GatedResidual(inputs) for _ in range(config.blocks)]
        last = level == len(widths) - 1
        layers.append(
            Upsample(inputs, parameters * shape[0], size) if last else GatedUpsample(inputs, widths[level + 1], size)
        )
    layers.append(nn.Unflatten(1, (parameters, shape[0])))
    return nn.Sequential(*layers)


def build_encoder(shape: Shape, config: NetworkConfig) -> tuple[nn.Module, int]:
    """The configured encoder trunk and its number of features F."""
    return mlp_encoder(shape, config) if config.kind == "mlp" else conv_encoder(shape, config)


def build_decoder(latent_dim: int, shape: Shape, parameters: int, config: NetworkConfig) -> nn.Module:
    """The configured decoder trunk for P = ``parameters`` numbers a pixel."""
    builder = mlp_decoder if config.kind == "mlp" else conv_decoder
    return builder(latent_dim, shape, parameters, config)
