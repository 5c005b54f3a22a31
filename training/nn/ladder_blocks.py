"""Parts of a hierarchical VAE: the deterministic pass up, and the pass down that prior, posterior and decoder share.

After Sønderby et al. 2016 (ladder VAE) in the bidirectional form of Kingma et al. 2016 (sec. 4 and App. B: ResNet VAE)
and Child 2021 (VDVAE). Levels are resolutions, layers are stochastic: a level holds one or more. Features are
[M,w,h,w'], a layer's latents [M,c,h,w'].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import LadderConfig
from training.distributions import Normal
from training.errors import ConfigError
from training.nn.networks import GatedConv, Shape, Upsample, gate, pyramid

BOUND = 5.0
"""Log scales lie in (−5, 5), softly: NVAE (Vahdat & Kautz 2020) bounds them so, and calls it vital for stability."""
SMALLEST = 8
"""Numbers along the longer side of an image, or of a signal, that are worth a pyramid."""


class LayerShape(NamedTuple):
    """Where a stochastic layer stands: its level (0 is the finest), width w, and latents c×h×w'."""

    level: int
    width: int
    latents: tuple[int, int, int]

    @property
    def size(self) -> int:
        """Latent numbers."""
        return math.prod(self.latents)


def layer_shapes(shape: Shape, config: LadderConfig) -> list[LayerShape]:
    """The stochastic layers for images [C,H,W], top first. Raises ConfigError: too small an image, or too many levels.

    >>> [layer.latents for layer in layer_shapes((1, 28, 28), LadderConfig(latents=[1, 2], layers=[1, 2]))]
    [(2, 7, 7), (2, 7, 7), (1, 14, 14)]
    """
    levels, longer = len(config.channels), max(shape[1:])
    if longer < SMALLEST:
        raise ConfigError(
            f"model.family 'ladder' wants images or signals of at least {SMALLEST} numbers along a side, "
            f"not {shape[1]}×{shape[2]}; take 'vae'"
        )
    if longer <= 2 ** (levels - 1):
        raise ConfigError(
            f"model.ladder.channels has {levels} levels, more than {shape[1]}×{shape[2]} can be halved: "
            f"at most {math.ceil(math.log2(longer))} expected"
        )
    sizes = pyramid(*shape[1:], levels)[1:]
    every = [
        LayerShape(level, config.channels[level], (config.latents[level], *sizes[level]))
        for level in range(levels)
        for _ in range(config.layers[level])
    ]
    return every[::-1]


def soft_bound(x: Tensor) -> Tensor:
    """x bent into (−BOUND, BOUND), slope 1 at 0."""
    return BOUND * torch.tanh(x / BOUND)


class ResidualBlock(nn.Module):
    """x + conv(dropout(gated conv(x))); branches start smaller by 1/√depth where ``depth`` of them are summed."""

    def __init__(self, channels: int, dropout: float, depth: int) -> None:
        super().__init__()
        self.inner = GatedConv(channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.outer.weight.mul_(1 / math.sqrt(depth))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.dropout(self.inner(x)))


def residual_blocks(count: int, channels: int, config: LadderConfig) -> nn.Sequential:
    """``count`` residual blocks."""
    depth = max(1, config.blocks * sum(config.layers))
    return nn.Sequential(*(ResidualBlock(channels, config.dropout, depth) for _ in range(count)))


class BottomUp(nn.Module):
    """Images [N,C,H,W] -> the features of every level, finest first: halved by a gated convolution, then refined."""

    def __init__(self, inputs: int, config: LadderConfig) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(
                GatedConv(above, width, stride=2),
                residual_blocks(config.blocks * layers, width, config),
            )
            for (above, width), layers in zip(pairwise([inputs, *config.channels]), config.layers, strict=True)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        features = []
        for level in self.levels:
            image = level(image)
            features.append(image)
        return features


class PriorLayer(nn.Module):
    """One step down: h ← entry(h); p(z_i|z_{>i}) from h; h ← blocks(h + f(h) + W z_i)."""

    def __init__(self, layer: LayerShape, entry: nn.Module, config: LadderConfig) -> None:
        super().__init__()
        channels = layer.latents[0]
        self.entry = entry
        self.inner = GatedConv(layer.width, layer.width)
        self.head = nn.Conv2d(layer.width, 2 * channels + layer.width, 1)
        self.merge = nn.Conv2d(channels, layer.width, 1)
        self.blocks = residual_blocks(config.blocks, layer.width, config)
        self.sizes = [channels, channels, layer.width]

    def prior(self, h: Tensor) -> tuple[Normal, Tensor]:
        """Features -> p(z_i|z_{>i}), and what is added to the features, whatever z_i is."""
        loc, log_scale, features = self.head(self.inner(h)).split(self.sizes, 1)
        return Normal(loc.float(), torch.exp(soft_bound(log_scale.float()))), features

    def absorb(self, h: Tensor, z: Tensor) -> Tensor:
        """Features and z_i -> features of which the next layer, or the image, is made."""
        refined: Tensor = self.blocks(h + self.merge(z))
        return refined


class TopDown(nn.Module):
    """The pass from a learned constant through all stochastic layers to features [M,w,h,w'] of the finest level."""

    def __init__(self, shape: Shape, config: LadderConfig) -> None:
        super().__init__()
        self.layer_shapes = layer_shapes(shape, config)
        self.sizes = [layer.size for layer in self.layer_shapes]
        first = self.layer_shapes[0]
        self.constant = nn.Parameter(0.1 * torch.randn(first.width, *first.latents[1:]))
        self.layers = nn.ModuleList()
        for above, layer in pairwise([first, *self.layer_shapes]):
            down = above.level - layer.level
            height, width = layer.latents[1:]
            entry = Upsample(above.width, layer.width, (height, width)) if down else nn.Identity()
            self.layers.append(PriorLayer(layer, entry, config))

    def forward(self, rows: int, choose: Callable[[int, Tensor, Normal], Tensor]) -> Tensor:
        """Pass M = ``rows`` rows down; ``choose(i, h, p)`` is z_i [M,c,h,w'], with features h and p = p(z_i|z_{>i})."""
        h = self.constant.unsqueeze(0).expand(rows, -1, -1, -1)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, PriorLayer)
            h = layer.entry(h)
            prior, features = layer.prior(h)
            z = choose(i, h, prior)
            h = layer.absorb(h + features, z)
        return h

    def split(self, flat: Tensor) -> list[Tensor]:
        """Flat latents, or noise, [M,L] -> every layer's [M,c,h,w'], top first."""
        parts = flat.split(self.sizes, -1)
        return [part.unflatten(-1, layer.latents) for part, layer in zip(parts, self.layer_shapes, strict=True)]


class PosteriorLayer(nn.Module):
    """q(z_i|z_{>i}, x) as a shift δ and a factor s in units of the prior: N(loc + scale·δ, (scale·s)²).

    In these units KL(q ‖ p) is KL(N(δ, s²) ‖ N(0, 1)), as in NVAE (Vahdat & Kautz 2020, eq. 2) with δ relative too.
    """

    def __init__(self, layer: LayerShape) -> None:
        super().__init__()
        self.up = nn.Conv2d(layer.width, 2 * layer.width, 3, padding=1)
        self.down = nn.Conv2d(layer.width, 2 * layer.width, 3, padding=1, bias=False)
        self.head = nn.Conv2d(layer.width, 2 * layer.latents[0], 1)
        assert self.head.bias is not None
        with torch.no_grad():
            self.head.weight.mul_(0.1)  # q starts near p
            self.head.bias.zero_()

    def lateral(self, features: Tensor) -> Tensor:
        """Bottom-up features [N,w,h,w'] -> this layer's share of them [N,2w,h,w']."""
        share: Tensor = self.up(features)
        return share

    def forward(self, h: Tensor, lateral: Tensor) -> Normal:
        """Top-down features and the lateral share, [M,…] each -> δ and s."""
        shift, log_factor = self.head(gate(self.down(h) + lateral)).float().chunk(2, 1)
        return Normal(shift, torch.exp(soft_bound(log_factor)))
