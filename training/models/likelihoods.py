"""Likelihoods p(x|z): what the decoder's raw outputs mean, in nats.

Each one maps raw decoder outputs [M,P,C,H,W] to named parameters [M,C,H,W], values x to the ``target`` at which the
density is evaluated, and both to log p(x|z) place by place. All functions are plain tensor algebra, so that they
export to ONNX as they stand. Targets broadcast against parameters: [N,1,C,H,W] against [N,K,C,H,W].

x holds pixels in [0,1], or reals (vectors, signals) in their own units, of which the target is (x − shift)/unit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import LikelihoodConfig
from training.distributions import continuous_bernoulli, logistic
from training.errors import ConfigError
from training.nn.networks import Shape

Parameters = tuple[Tensor, ...]

NARROWEST_SCALE = 0.01
"""Floor of the Gaussian's scale, 2.6 levels: the gradient of a residual r is r/σ², so that the floor of 1e-3 that suits
the logistic (whose gradient is 1/σ at most) lets single pixels of constant value throw the training off."""


class Likelihood(nn.Module, ABC):
    """Base: pixels are their own target and need no dither; reals are standardised by ``shift`` and ``unit`` [C,H,W].

    ``pixelwise``: whether log p(x|z) says something place by place. ``unit_of_error``: what −log p counts.
    Raises ConfigError: reals under a family of pixels.
    """

    family: str
    parameters_of: tuple[str, ...]
    measure: Literal["counting", "lebesgue", "none"]
    observation_noise: Literal["uniform", "standard_normal"]
    binarisation: str = "none"
    dither: bool = False
    pixelwise: bool = True
    takes_reals: bool = False
    unit_of_error: str = "nats"

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__()
        self.values = config.values
        if self.values == "pixels":
            return
        if not self.takes_reals:
            known = ", ".join(name for name, cls in FAMILIES.items() if cls.takes_reals)
            raise ConfigError(
                f"model.likelihood.family: {self.family!r} is of pixels in [0, 1], these rows are numbers in their own "
                f"units: expected one of {known}"
            )
        self.shift: Tensor
        self.unit: Tensor
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("unit", torch.ones(shape))

    @property
    def raw(self) -> int:
        """Raw decoder outputs P that this likelihood wants a place."""
        return len(self.parameters_of)

    @property
    def log_volume(self) -> Tensor:
        """log |det ∂target/∂x| of the standardisation: −Σ log unit, 0-dim float64; 0 for pixels."""
        if self.values == "pixels":
            return torch.zeros((), dtype=torch.float64)
        return -torch.log(self.unit).double().sum()

    @torch.no_grad()
    def initialise_values(self, mean: Tensor, std: Tensor) -> None:
        """Take shift and unit from the training data's mean and standard deviation [C,H,W]; pixels have none.

        A place that never varies keeps the unit 1.
        """
        if self.values == "reals":
            self.shift.copy_(mean)
            self.unit.copy_(torch.where(std > 0, std, 1.0))

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        """Values x [N,C,H,W] and uniform dither of the same shape -> the point of evaluation."""
        return x if self.values == "pixels" else (x - self.shift) / self.unit

    def network_input(self, target: Tensor) -> Tensor:
        """What networks see of a target: pixels in [−1,1], reals as standardised."""
        return 2 * target - 1 if self.values == "pixels" else target

    def restored(self, target: Tensor) -> Tensor:
        """Expected targets -> values: pixels in [0,1], reals in their own units."""
        return target.clamp(0, 1) if self.values == "pixels" else self.shift + self.unit * target

    def parameters_from(self, raw: Tensor) -> Parameters:
        """Raw outputs [M,P,C,H,W] -> parameters, each [M,C,H,W] float32: here as they are."""
        return tuple(output.float() for output in raw.unbind(1))

    @abstractmethod
    def mean(self, parameters: Parameters) -> Tensor:
        """E[x|z], as x is: pixels in [0,1], reals in their own units."""

    @abstractmethod
    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        """log p(x|z) a place, in nats; of reals, the density of x itself, not of the standardised target."""

    def total(self, log_prob_map: Tensor) -> Tensor:
        """log p(x|z) by place [...,C,H,W] -> log p(x|z) [...], summed in float64."""
        return log_prob_map.sum((-3, -2, -1), dtype=torch.float64)

    @abstractmethod
    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        """A draw x ~ p(x|z) from noise of the declared distribution, as x is."""

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        """Set the decoder's last bias so that p(x) starts at the training mean (of pixels; reals start at 0)."""


class Logits(Likelihood):
    """Base: x·l − log(1 + eˡ) with logits l, and the mean σ(l)."""

    parameters_of = ("logits",)
    observation_noise = "uniform"

    def mean(self, parameters: Parameters) -> Tensor:
        return torch.sigmoid(parameters[0])

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        (logits,) = parameters
        return target * logits - F.softplus(logits)

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        head.copy_(torch.logit(mean.clamp(0.005, 0.995)).reshape(head.shape))


class Bernoulli(Logits):
    """log p(x|z) = x·l − log(1 + eˡ) for binary x; grey pixels are first binarised.

    Dynamic binarisation (Salakhutdinov & Murray 2008; Burda et al. 2016) draws x = 1[u < pixel] afresh at each use,
    static binarisation keeps one draw for each training image, threshold takes x = 1[pixel ≥ ½].
    """

    family = "bernoulli"
    measure = "counting"

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.binarisation = config.binarisation
        self.dither = config.binarisation != "threshold"

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        if dither is None:
            return (x >= 0.5).to(x.dtype)
        return (dither < x).to(x.dtype)

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        return (noise < torch.sigmoid(parameters[0])).to(noise.dtype)


class CrossEntropy(Logits):
    """x·log σ(l) + (1 − x)·log(1 − σ(l)) at grey pixels x: the Bernoulli's form as a reconstruction error.

    x is not binary, so that this is no likelihood of it (Loaiza-Ganem & Cunningham 2019, sec. 3). Its "draws" are the
    mean, as there is no distribution to draw from.
    """

    family = "cross_entropy"
    measure = "none"
    unit_of_error = "nats of cross-entropy"

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        return self.mean(parameters) + 0 * noise


class SquaredError(Likelihood):
    """−(t − loc)² at the pixel or standardised number t: a reconstruction error, and no density of anything.

    Its "draws" are the mean, as there is no distribution to draw from.
    """

    family = "squared_error"
    parameters_of = ("loc",)
    measure = "none"
    observation_noise = "uniform"
    takes_reals = True

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.unit_of_error = "squared error" if self.values == "pixels" else "squared standard deviations"

    def mean(self, parameters: Parameters) -> Tensor:
        return self.restored(parameters[0])

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        return -((target - parameters[0]) ** 2)

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        return self.mean(parameters) + 0 * noise

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        head.view(1, -1)[0] = mean.flatten() if self.values == "pixels" else 0.0


class Continuous(Likelihood):
    """Base of densities of t = (255x + u)/256, uniform u: 8-bit pixels dequantised, or a density could grow for ever.

    −log2 p + 8 bounds the bits of an 8-bit pixel from above (Theis et al. 2016, eq. 4). Pixels between the levels get
    the same noise. Means and draws are pixels again: at the middle of u, and levels. Reals are continuous already.
    """

    measure = "lebesgue"

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.dither = self.values == "pixels"

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        if self.values == "reals":
            return super().target(x, dither)
        assert dither is not None, "dequantisation wants noise"
        return (255 * x + dither) / 256

    def restored(self, target: Tensor) -> Tensor:
        if self.values == "reals":
            return super().restored(target)
        return ((256 * target - 0.5) / 255).clamp(0, 1)

    def drawn(self, target: Tensor) -> Tensor:
        """A drawn target -> a value: a grey level, or a number in its own unit."""
        if self.values == "reals":
            return super().restored(target)
        return torch.floor(256 * target).clamp(0, 255) / 255


class Gaussian(Continuous):
    """N(t; loc, scale²) at the dequantised pixel or standardised number t.

    The scale is ``fixed``, or learned: ``shared`` by all places (σ-VAE, Rybkin et al. 2021), ``diagonal``, one a place
    whatever z, or by ``pixel`` from z. A learned one is never below ``min_scale`` or NARROWEST_SCALE, unless
    ``closed_form``, where ``set_scale`` gives it as it is.
    """

    family = "gaussian"
    parameters_of = ("loc", "scale")
    observation_noise = "standard_normal"
    takes_reals = True

    def __init__(self, config: LikelihoodConfig, shape: Shape, closed_form: bool = False) -> None:
        super().__init__(config, shape)
        self.by_pixel = config.scale == "pixel"
        self.min_scale = 0.0 if closed_form else max(config.min_scale, NARROWEST_SCALE)
        start = 0.2 if self.values == "pixels" else 1.0
        if config.scale == "fixed":
            self.min_scale, start = 0.0, config.fixed_scale
        sizes = shape if config.scale == "diagonal" else ()
        log_scale = torch.full(sizes, math.log(start))
        if config.scale in ("shared", "diagonal"):
            self.log_scale: Tensor = nn.Parameter(log_scale)
        elif config.scale == "fixed":
            self.register_buffer("log_scale", log_scale, persistent=False)

    @property
    def raw(self) -> int:
        return 2 if self.by_pixel else 1

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """The standard deviation of t in closed form, positive: 0-dim where ``shared``, [C,H,W] where ``diagonal``."""
        self.log_scale.copy_(torch.log(scale - self.min_scale))

    def parameters_from(self, raw: Tensor) -> Parameters:
        loc = raw[:, 0].float()
        log_scale = raw[:, 1].float() - 2 if self.by_pixel else self.log_scale.expand_as(loc)
        return loc, self.min_scale + torch.exp(log_scale.clamp(max=4))

    def mean(self, parameters: Parameters) -> Tensor:
        return self.restored(parameters[0])

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        loc, scale = parameters
        log_p = -0.5 * ((target - loc) / scale) ** 2 - torch.log(scale) - 0.5 * math.log(2 * math.pi)
        return log_p if self.values == "pixels" else log_p - torch.log(self.unit)

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        return self.drawn(parameters[0] + parameters[1] * noise)

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        start = (255 * mean.flatten() + 0.5) / 256 if self.values == "pixels" else 0.0
        head.view(self.raw, -1)[0] = start


class Delta(Continuous):
    """x is a function of z and z of x: the parameter ``loc`` is the target itself, and log p(x|z) is given as 0.

    What a bijection has to say stands in log q(z|x) = −log |det ∂z/∂target| − log_volume.
    """

    family = "delta"
    parameters_of = ("loc",)
    observation_noise = "uniform"
    pixelwise = False
    takes_reals = True

    def mean(self, parameters: Parameters) -> Tensor:
        return self.restored(parameters[0])

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        return 0 * (target - parameters[0])

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        return self.drawn(parameters[0]) + 0 * noise


class ContinuousBernoulli(Continuous):
    """p(t) ∝ e^(tl) on [0,1] with logits l, at the dequantised pixel t (Loaiza-Ganem & Cunningham 2019).

    Dequantised, for at a grey level 0 or 1 itself the density grows without end as l does.
    """

    family = "continuous_bernoulli"
    parameters_of = ("logits",)
    observation_noise = "uniform"

    def mean(self, parameters: Parameters) -> Tensor:
        return self.restored(continuous_bernoulli.mean(parameters[0]))

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        return continuous_bernoulli.log_prob(target, parameters[0])

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        return self.drawn(continuous_bernoulli.quantile(noise, parameters[0]))

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        expected = ((255 * mean + 0.5) / 256).clamp(0.005, 0.995)
        head.copy_(continuous_bernoulli.logits_of(expected).reshape(head.shape))


class DiscretisedLogistic(Likelihood):
    """Logistic distribution integrated over the 256 levels of 8-bit pixels (Kingma et al. 2016, App. C).

    ``mean`` is of the logistic clipped to [0,1].
    """

    family = "discretised_logistic"
    parameters_of: tuple[str, ...] = ("loc", "scale")
    measure = "counting"
    observation_noise = "uniform"

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.min_scale = config.min_scale

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        return torch.round(x * 255) / 255

    def parameters_from(self, raw: Tensor) -> Parameters:
        loc, log_scale = raw[:, 0].float(), raw[:, 1].float()
        return loc, self.min_scale + torch.exp((log_scale - 2).clamp(max=4))

    def mean(self, parameters: Parameters) -> Tensor:
        return logistic.clipped_mean(*parameters)

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        return logistic.level_log_prob(target, *parameters)

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        return logistic.level_quantile(noise, *parameters)

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        head.view(2, -1)[0].copy_(mean.flatten())


class LogisticMixture(DiscretisedLogistic):
    """Σ_j w_j · discretised logistic(loc_j, scale_j), J components a place (Salimans et al. 2017, eq. 1–2).

    Without their dependence of a pixel's colours on each other. The parameters are log w_j, loc_j and scale_j.
    """

    family = "logistic_mixture"

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.components = config.components
        kinds = ("log_weight", "loc", "scale")
        self.parameters_of = tuple(f"{kind}_{j}" for kind in kinds for j in range(self.components))

    def parameters_from(self, raw: Tensor) -> Parameters:
        logits, loc, log_scale = raw.float().chunk(3, 1)
        scale = self.min_scale + torch.exp((log_scale - 2).clamp(max=4))
        parts = (torch.log_softmax(logits, 1), loc, scale)
        return tuple(component for part in parts for component in part.unbind(1))

    def _stacked(self, parameters: Parameters) -> Parameters:
        """Log weights, locs and scales, each [J,…]."""
        count = self.components
        return tuple(torch.stack(parameters[i : i + count]) for i in range(0, 3 * count, count))

    def mean(self, parameters: Parameters) -> Tensor:
        log_weights, loc, scale = self._stacked(parameters)
        return (torch.exp(log_weights) * logistic.clipped_mean(loc, scale)).sum(0).clamp(0, 1)

    def log_prob(self, target: Tensor, parameters: Parameters) -> Tensor:
        log_weights, loc, scale = self._stacked(parameters)
        return torch.logsumexp(log_weights + logistic.level_log_prob(target, loc, scale), 0)

    def sample(self, parameters: Parameters, noise: Tensor) -> Tensor:
        """One uniform number chooses a component; what it exceeds the lower components' weight by is uniform again."""
        log_weights, loc, scale = self._stacked(parameters)
        weights = torch.exp(log_weights)
        upper = torch.cumsum(weights, 0)
        lower = upper - weights
        above = (noise >= lower[1:]).to(noise.dtype)  # rounding must leave neither the first nor the last one out
        picked = torch.cat([torch.ones_like(above[:1]), above]) - torch.cat([above, torch.zeros_like(above[:1])])
        rest = (picked * (noise - lower) / weights.clamp(min=1e-12)).sum(0).clamp(0, 1)
        return logistic.level_quantile(rest, (picked * loc).sum(0), (picked * scale).sum(0))

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        """Components around the mean, a tenth to either side: equal ones would learn the same at first."""
        offsets = 0.1 * torch.linspace(-1, 1, self.components + 2)[1:-1]
        loc = head.view(self.raw, -1)[self.components : 2 * self.components]
        loc.copy_(mean.flatten() + offsets.to(mean).unsqueeze(1))


FAMILIES: dict[str, type[Likelihood]] = {
    cls.family: cls
    for cls in (
        Bernoulli,
        CrossEntropy,
        SquaredError,
        Gaussian,
        Delta,
        ContinuousBernoulli,
        DiscretisedLogistic,
        LogisticMixture,
    )
}


def build_likelihood(config: LikelihoodConfig, shape: Shape, closed_form: bool = False) -> Likelihood:
    """The configured likelihood for rows [C,H,W]; of a ``closed_form`` model, a Gaussian's scale has no floor.

    Raises ConfigError: a family of pixels for reals.
    """
    if config.family == "gaussian":
        return Gaussian(config, shape, closed_form)
    return FAMILIES[config.family](config, shape)


@torch.no_grad()
def initialise_head(decoder: nn.Module, likelihood: Likelihood, mean: Tensor) -> None:
    """Set the bias of a decoder's last layer so that p(x) starts at the training mean [C,H,W]."""
    head = [m for m in decoder.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if head.bias is None:
        return
    if isinstance(head, nn.Conv2d):  # one bias for the four sub-pixels and all positions of a channel
        mean = mean.mean((-2, -1)).repeat_interleave(head.out_channels // likelihood.raw // len(mean))
    likelihood.initialise(head.bias, mean)
