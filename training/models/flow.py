"""Normalising flows: z = f(x) ~ N(0, I) is invertible, and log p(x) = log N(f(x); 0, I) + log |det ∂f/∂x| exact.

Images go through a multi-scale stack of couplings (RealNVP, Dinh et al. 2017; Glow, Kingma & Dhariwal 2018), vectors
and signals through couplings of halves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from training.config import FlowConfig, ModelConfig
from training.distributions import Distribution
from training.errors import ConfigError
from training.models.base import BijectiveModel
from training.models.priors import StandardNormal
from training.nn.bijections import ActNorm, Bijection, Chain, InvertibleConv, Logit, Squeeze
from training.nn.couplings import ChannelCoupling, CheckerboardCoupling, CouplingStack
from training.nn.networks import Shape


def squeezings(shape: Shape, levels: int) -> list[tuple[int, int]]:
    """How each of at most ``levels`` levels is squeezed: (a, b), 2 along even sides and 1 along odd ones.

    Padding would not be invertible, so levels end where both sides are odd; the first level is there in any case.
    """
    squeezes: list[tuple[int, int]] = []
    height, width = shape[1:]
    for level in range(levels):
        factors = (2 - height % 2, 2 - width % 2)
        if level and factors == (1, 1):
            break
        squeezes.append(factors)
        height, width = height // factors[0], width // factors[1]
    return squeezes


def flow_step(shape: Shape, hidden: int, index: int) -> list[Bijection]:
    """One step of flow (Kingma & Dhariwal 2018, fig. 2a), on a checkerboard where there is one channel only."""
    if shape[0] == 1:
        return [ActNorm(1), CheckerboardCoupling(shape, hidden, swap=bool(index % 2))]
    return [ActNorm(shape[0]), InvertibleConv(shape[0]), ChannelCoupling(shape[0], hidden)]


class MultiScale(Bijection):
    """Images -> latents by levels: squeeze, steps of flow, split off half of the channels (Dinh et al. 2017, sec. 3.6).

    Before a split one more coupling normalises the half that leaves given the half that stays: Glow's learned prior of
    the split part, written as a bijection. Latents are the levels' parts, flat, one after the other.
    """

    def __init__(self, shape: Shape, config: FlowConfig) -> None:
        super().__init__()
        factors = squeezings(shape, config.levels)
        self.levels = nn.ModuleList()
        self.shapes: list[Shape] = []  # of the levels' latents
        for level, (a, b) in enumerate(factors):
            channels, height, width = shape[0] * a * b, shape[1] // a, shape[2] // b
            last = level == len(factors) - 1
            parts: list[Bijection] = [Squeeze((a, b))] if level else [Logit(config.bound), Squeeze((a, b))]
            for i in range(config.steps):
                parts += flow_step((channels, height, width), config.hidden, i)
            parts += [] if last else [ActNorm(channels), ChannelCoupling(channels, config.hidden)]
            self.levels.append(Chain(parts))
            self.shapes.append((channels if last else channels - channels // 2, height, width))
            shape = (channels // 2, height, width)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N,C,H,W] in [0,1] -> z [N,L], log |det ∂z/∂x| [N] float64."""
        total = torch.zeros_like(x[:, 0, 0, 0], dtype=torch.float64)
        parts = []
        for level, shape in zip(self.levels, self.shapes, strict=True):
            y, ladj = level.call_and_ladj(x)  # type: ignore[operator]  # a Chain's
            total = total + ladj
            x, done = y.split([y.shape[1] - shape[0], shape[0]], 1)
            parts.append(done.flatten(1))
        return torch.cat(parts, 1), total

    def inverse(self, z: Tensor) -> Tensor:
        """z [M,L] -> x [M,C,H,W]."""
        parts = z.split([math.prod(shape) for shape in self.shapes], 1)
        x = None
        for level, part, shape in reversed(list(zip(self.levels, parts, self.shapes, strict=True))):
            done = part.unflatten(1, shape)
            x = level.inverse(done if x is None else torch.cat([x, done], 1))
        assert x is not None
        return x

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Normalise the activations of images x [B,C,H,W] in [0,1] at every step; the last level's input."""
        for level, shape in zip(self.levels, self.shapes, strict=True):
            y = level.initialise(x)  # type: ignore[operator]  # a Chain's
            x = y[:, : y.shape[1] - shape[0]]
        return x


class VectorFlow(Bijection):
    """Standardised numbers [N,C,H,W] -> latents by couplings of the halves of one flat vector."""

    def __init__(self, shape: Shape, config: FlowConfig) -> None:
        super().__init__()
        self.shape = shape
        self.stack = CouplingStack(math.prod(shape), config.steps, config.hidden)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [N,C,H,W] -> z [N,L], log |det ∂z/∂x| [N] float64."""
        return self.stack.call_and_ladj(x.flatten(1))

    def inverse(self, z: Tensor) -> Tensor:
        """z [M,L] -> x [M,C,H,W]."""
        return self.stack.inverse(z).unflatten(1, self.shape)


class Flow(BijectiveModel):
    """p(x) by change of variables; L = C·H·W whatever ``latent_dim`` says.

    The encoder is f, the decoder f⁻¹, log p(x|z) = 0 and log q(z|x) = −log |det ∂z/∂x|, with the Jacobians of
    dequantisation, logit and standardisation in it, so that the elbo is log p(x) itself. Images have their pixels
    dequantised (Theis et al. 2016, sec. 3.1) and 8-bit levels t in [0,1].

    Raises ConfigError: another likelihood than delta, or fewer than 2 numbers.

    >>> from training.config import LikelihoodConfig
    >>> flow = Flow((1, 8, 8), ModelConfig(family="flow", likelihood=LikelihoodConfig(family="delta")))
    >>> flow.decode(torch.zeros(3, 64)).mean.shape
    torch.Size([3, 1, 8, 8])
    """

    family = "flow"
    title = "normalising flow"
    convolutional = True

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__(shape, config)
        if self.latent_dim < 2:
            raise ConfigError("model.family: a flow wants at least 2 numbers an example, got 1")
        self.prior = StandardNormal(self.latent_dim)
        build = VectorFlow if config.likelihood.values == "reals" else MultiScale
        self.flow: Bijection = build(shape, config.flow)

    def call_and_ladj(self, target: Tensor) -> tuple[Tensor, Tensor]:
        z, ladj = self.flow.call_and_ladj(target)
        return z, ladj + self.likelihood.log_volume

    def decode(self, z: Tensor) -> Distribution:
        p: Distribution = self.likelihood(self.flow.inverse(z).unsqueeze(1))
        return p

    @torch.no_grad()
    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Normalise the activations at every step by training examples."""
        dither = torch.rand_like(examples) if self.likelihood.dither else None
        self.flow.initialise(self.likelihood.target(examples, dither))
