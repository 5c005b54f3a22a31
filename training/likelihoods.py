"""Likelihoods p(x|z): what the decoder's raw outputs mean, in nats.

Each one maps raw decoder outputs [M,P,C,H,W] to named parameters [M,C,H,W], pixels to the ``target`` at which the
density is evaluated, and both to log p(x|z) pixel by pixel. All functions are plain tensor algebra, so that they
export to ONNX as they stand. Targets broadcast against parameters: [N,1,C,H,W] against [N,K,C,H,W].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import LikelihoodConfig

Parameters = tuple[Tensor, ...]

NARROWEST_SCALE = 0.01
"""Floor of the Gaussian's scale, 2.6 levels: the gradient of a residual r is r/σ², so that the floor of 1e-3 that suits
the logistic (whose gradient is 1/σ at most) lets single pixels of constant value throw the training off."""


class Likelihood(nn.Module, ABC):
    """Base: identity target, no dither."""

    family: str
    parameters_of: tuple[str, ...]
    measure: Literal["counting", "lebesgue"]
    observation_noise: Literal["uniform", "standard_normal"]
    binarisation: str = "none"
    dither: bool = False

    @property
    def raw(self) -> int:
        """Raw decoder outputs P that this likelihood wants a pixel."""
        return len(self.parameters_of)

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        """Pixels x [N,C,H,W] in [0,1] and uniform dither of the same shape -> the point of evaluation."""
        return x

    @abstractmethod
    def parameters_from(self, raw: Tensor) -> Parameters:
        """Raw outputs [M,P,C,H,W] -> parameters, each [M,C,H,W] float32."""

    @abstractmethod
    def mean(self, parameters: Parameters) -> Tensor:
        """E[x|z] in [0,1]."""

    @abstractmethod
    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        """log p(x|z) a pixel, in nats."""

    def total(self, log_prob_map: Tensor) -> Tensor:
        """log p(x|z) by pixel [...,C,H,W] -> log p(x|z) [...], summed in float64."""
        return log_prob_map.sum((-3, -2, -1), dtype=torch.float64)

    @abstractmethod
    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        """A draw x ~ p(x|z) from noise of the declared distribution, in [0,1]."""

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        """Set the decoder's last bias so that p(x) starts at the training mean [C,H,W]."""


class Bernoulli(Likelihood):
    """log p(x|z) = x·l − log(1 + eˡ) with logits l, for binary x; grey pixels are first binarised.

    Dynamic binarisation (Salakhutdinov & Murray 2008; Burda et al. 2016) draws x = 1[u < pixel] afresh at each use,
    static binarisation keeps one draw for each training image, threshold takes x = 1[pixel ≥ ½].
    """

    family = "bernoulli"
    parameters_of = ("logits",)
    measure = "counting"
    observation_noise = "uniform"

    def __init__(self, config: LikelihoodConfig) -> None:
        super().__init__()
        self.binarisation = config.binarisation
        self.dither = config.binarisation != "threshold"

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        if dither is None:
            return (x >= 0.5).to(x.dtype)
        return (dither < x).to(x.dtype)

    def parameters_from(self, raw: Tensor) -> Parameters:
        return (raw[:, 0].float(),)

    def mean(self, parameters: Parameters) -> Tensor:
        return torch.sigmoid(parameters[0])

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        (logits,) = parameters
        return target * logits - F.softplus(logits)

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        return (noise < torch.sigmoid(parameters[0])).to(noise.dtype)

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        head.copy_(torch.logit(mean.clamp(0.005, 0.995)).reshape(head.shape))


class Gaussian(Likelihood):
    """N(t; loc, scale²) at t = (255x + u)/256, uniform u: 8-bit pixels dequantised, or a density could grow for ever.

    log p is of a density of t in [0,1]; −log2 p + 8 bounds the bits of an 8-bit pixel from above (Theis et al. 2016,
    eq. 4). Pixels between the levels get the same noise. The scale is learned, one for all pixels (σ-VAE, Rybkin et
    al. 2021) or by pixel, and never below ``min_scale`` or NARROWEST_SCALE. ``mean`` and draws are pixels again: at the
    middle of u, and levels.
    """

    family = "gaussian"
    parameters_of = ("loc", "scale")
    measure = "lebesgue"
    observation_noise = "standard_normal"
    dither = True

    def __init__(self, config: LikelihoodConfig) -> None:
        super().__init__()
        self.shared = config.scale == "shared"
        self.min_scale = max(config.min_scale, NARROWEST_SCALE)
        if self.shared:
            self.log_scale = nn.Parameter(torch.tensor(math.log(0.2)))

    @property
    def raw(self) -> int:
        return 1 if self.shared else 2

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        assert dither is not None, "dequantisation wants noise"
        return (255 * x + dither) / 256

    def parameters_from(self, raw: Tensor) -> Parameters:
        loc = raw[:, 0].float()
        log_scale = self.log_scale.expand_as(loc) if self.shared else raw[:, 1].float() - 2
        return loc, self.min_scale + torch.exp(log_scale.clamp(max=4))

    def mean(self, parameters: Parameters) -> Tensor:
        return ((256 * parameters[0] - 0.5) / 255).clamp(0, 1)

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        loc, scale = parameters
        return -0.5 * ((target - loc) / scale) ** 2 - torch.log(scale) - 0.5 * math.log(2 * math.pi)

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        return torch.floor(256 * (parameters[0] + parameters[1] * noise)).clamp(0, 255) / 255

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        head.view(self.raw, -1)[0].copy_((255 * mean.flatten() + 0.5) / 256)


class DiscretisedLogistic(Likelihood):
    """Logistic distribution integrated over the 256 levels of 8-bit pixels (Kingma et al. 2016, App. C; Salimans 2017).

    With a and b the standardised upper and lower edge of the pixel's level,
    log(σ(a) − σ(b)) = log σ(a) + log σ(−b) + log(1 − e^(b−a)); levels 0 and 255 take the whole tail. The last term is
    written log 2t/(1 + t) with t = tanh((a−b)/2), for 1 − e^(b−a) cancels where the scale is wide.
    ``mean`` is E of the logistic clipped to [0,1]: s·(softplus(m/s) − softplus((m−1)/s)).
    """

    family = "discretised_logistic"
    parameters_of = ("loc", "scale")
    measure = "counting"
    observation_noise = "uniform"

    def __init__(self, config: LikelihoodConfig) -> None:
        super().__init__()
        self.min_scale = config.min_scale

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        return torch.round(x * 255) / 255

    def parameters_from(self, raw: Tensor) -> Parameters:
        loc, log_scale = raw[:, 0].float(), raw[:, 1].float()
        return loc, self.min_scale + torch.exp((log_scale - 2).clamp(max=4))

    def mean(self, parameters: Parameters) -> Tensor:
        loc, scale = parameters
        return (scale * (F.softplus(loc / scale) - F.softplus((loc - 1) / scale))).clamp(0, 1)

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        loc, scale = parameters
        half = 0.5 / 255
        log_cdf = -F.softplus(-(target + half - loc) / scale)
        log_sf = -F.softplus((target - half - loc) / scale)
        t = torch.tanh(half / scale)
        inner = log_cdf + log_sf + torch.log(2 * t / (1 + t))
        return torch.where(target < half, log_cdf, torch.where(target > 1 - half, log_sf, inner))

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        loc, scale = parameters
        u = noise.clamp(1e-6, 1 - 1e-6)
        draw = loc + scale * (torch.log(u) - torch.log(1 - u))
        return torch.round(draw.clamp(0, 1) * 255) / 255

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        head.view(2, -1)[0].copy_(mean.flatten())


FAMILIES = {cls.family: cls for cls in (Bernoulli, Gaussian, DiscretisedLogistic)}


def build_likelihood(config: LikelihoodConfig) -> Likelihood:
    """The configured likelihood."""
    return FAMILIES[config.family](config)
