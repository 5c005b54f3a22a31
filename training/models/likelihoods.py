"""Likelihoods p(x|z): what a decoder's raw outputs mean. A module's forward returns the distribution of a target.

x holds pixels in [0,1], or reals (vectors, signals) in their own units. The density is evaluated at a *target*:
binarised or dequantised pixels, or standardised reals (x − shift)/unit. Targets broadcast against parameters,
[N,1,C,H,W] against [N,K,C,H,W]. All is plain tensor algebra, in nats, and exports to ONNX as it stands.
"""

from __future__ import annotations

import math
from abc import ABC
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from training.config import LikelihoodConfig
from training.distributions import (
    Bernoulli,
    ContinuousBernoulli,
    Delta,
    DiscretisedLogistic,
    Distribution,
    LogisticMixture,
    Normal,
)
from training.distributions.continuous_bernoulli import logits_of
from training.errors import ConfigError
from training.nn.networks import Shape

NARROWEST_SCALE = 0.01
"""Floor of the Gaussian's scale, 2.6 levels: the gradient of a residual r is r/σ², so that the floor of 1e-3 that suits
the logistic (whose gradient is 1/σ at most) lets single pixels of constant value throw the training off."""


class Likelihood(nn.Module, ABC):
    """Base: pixels are their own target and need no dither; reals are standardised by ``shift`` and ``unit`` [C,H,W].

    ``distribution``: the class of p(target|z), whose fields are the graphs' parameters. ``measure``: of the density of
    x, "none" for a reconstruction error. ``observation_noise``: what ``sample`` wants. ``pixelwise``: log p(x|z) has a
    meaning at each pixel. ``unit_of_error``: what −log p counts. Raises ConfigError: reals under a family of pixels.
    """

    family: ClassVar[str]
    distribution: ClassVar[Any]
    measure: ClassVar[Literal["counting", "lebesgue", "none"]]
    observation_noise: ClassVar[Literal["uniform", "standard_normal", "none"]] = "uniform"
    binarisation: str = "none"
    dither: bool = False
    pixelwise: ClassVar[bool] = True
    takes_reals: ClassVar[bool] = False
    unit_of_error: str = "nats"

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__()
        self.values = config.values
        if self.values == "pixels":
            return
        if not self.takes_reals:
            known = ", ".join(name for name, cls in LIKELIHOODS.items() if cls.takes_reals)
            raise ConfigError(
                f"model.likelihood.family: {self.family!r} is of pixels in [0, 1], these rows are numbers in their own "
                f"units: expected one of {known}"
            )
        self.shift: Tensor
        self.unit: Tensor
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("unit", torch.ones(shape))

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the distribution's parameters, which are the graphs' too."""
        names: tuple[str, ...] = self.distribution._fields
        return names

    @property
    def raw(self) -> int:
        """Raw decoder outputs P for each number of x."""
        return len(self.parameter_names)

    @property
    def log_volume(self) -> Tensor:
        """log |det ∂target/∂x| of the standardisation: −Σ log unit, 0-dim float64; 0 for pixels."""
        if self.values == "pixels":
            return torch.zeros((), dtype=torch.float64)
        return -torch.log(self.unit).double().sum()

    @torch.no_grad()
    def initialise_values(self, mean: Tensor, std: Tensor) -> None:
        """Take shift and unit from the training data's mean and standard deviation [C,H,W]; pixels have none.

        A number that never varies keeps the unit 1.
        """
        if self.values == "reals":
            self.shift.copy_(mean)
            self.unit.copy_(torch.where(std > 0, std, 1.0))

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        """Values x [N,C,H,W], and uniform dither of the same shape where ``dither`` -> the point of evaluation."""
        return x if self.values == "pixels" else (x - self.shift) / self.unit

    def network_input(self, target: Tensor) -> Tensor:
        """What networks see of a target: pixels in [−1,1], reals as standardised."""
        return 2 * target - 1 if self.values == "pixels" else target

    def to_data(self, target: Tensor) -> Tensor:
        """An expected target -> a value of x: a pixel in [0,1], or a number in its own unit."""
        return target if self.values == "pixels" else self.shift + self.unit * target

    def quantise(self, target: Tensor) -> Tensor:
        """A drawn target -> a value that x can have: a grey level, or a number in its own unit."""
        return Likelihood.to_data(self, target)

    def forward(self, raw: Tensor) -> Distribution:
        """Raw outputs [M,P,C,H,W] -> the distribution of the target, parameters [M,C,H,W] float32."""
        p: Distribution = self.distribution(*(output.float() for output in raw.unbind(1)))
        return p

    def parameters_of(self, p: Distribution) -> tuple[Tensor, ...]:
        """The parameters of ``forward``'s distribution, in the order of ``parameter_names``, each of x's shape."""
        return tuple(p)  # type: ignore[arg-type]  # a NamedTuple of tensors

    def of_parameters(self, parameters: tuple[Tensor, ...]) -> Distribution:
        """The distribution of these parameters: the inverse of ``parameters_of``."""
        p: Distribution = self.distribution(*parameters)
        return p

    def mean(self, p: Distribution) -> Tensor:
        """E[x|z] of p(target|z), as x is."""
        return self.to_data(p.mean)

    def log_prob(self, target: Tensor, p: Distribution) -> Tensor:
        """log p(x|z) of each number of x, in nats; of reals, the density of x itself, not of the target."""
        return p.log_prob(target)

    def total(self, log_prob_map: Tensor) -> Tensor:
        """log p(x|z) of each number [...,C,H,W] -> log p(x|z) [...], summed in float64."""
        return log_prob_map.sum((-3, -2, -1), dtype=torch.float64)

    def sample(self, p: Distribution, noise: Tensor) -> Tensor:
        """A draw x ~ p(x|z) from noise of the declared distribution, as x is."""
        return self.quantise(p.sample(noise))

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        """Set the decoder's last bias so that p(x) starts at the training mean (of pixels; reals start at 0)."""


class BernoulliLikelihood(Likelihood):
    """P(x|z) = Bernoulli(x; logits) for binary x; grey pixels are first binarised.

    Dynamic binarisation (Salakhutdinov & Murray 2008; Burda et al. 2016) draws x = 1[u < pixel] afresh at each use,
    static binarisation keeps one draw for each training image, threshold takes x = 1[pixel ≥ ½].
    """

    family = "bernoulli"
    distribution = Bernoulli
    measure = "counting"

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.binarisation = config.binarisation
        self.dither = config.binarisation != "threshold"

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        if dither is None:
            return (x >= 0.5).to(x.dtype)
        return (dither < x).to(x.dtype)

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        head.copy_(torch.logit(mean.clamp(0.005, 0.995)).reshape(head.shape))


class ReconstructionError(Likelihood):
    """Base of what is minimised in place of −log p(x|z), a density of nothing: ``log_prob`` is minus the error.

    A "draw" is the mean, as there is no distribution to draw from.
    """

    measure = "none"
    observation_noise = "none"

    def sample(self, p: Distribution, noise: Tensor | None = None) -> Tensor:
        return self.mean(p)


class CrossEntropy(ReconstructionError):
    """−x·log σ(l) − (1 − x)·log(1 − σ(l)) at grey pixels x: the Bernoulli's form.

    x is not binary, so that this is no likelihood of it (Loaiza-Ganem & Cunningham 2019, sec. 3).
    """

    family = "cross_entropy"
    distribution = Bernoulli
    unit_of_error = "nats of cross-entropy"
    initialise = BernoulliLikelihood.initialise


class SquaredError(ReconstructionError):
    """(t − loc)² at the pixel or standardised number t."""

    family = "squared_error"
    distribution = Delta
    takes_reals = True

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.unit_of_error = "squared error" if self.values == "pixels" else "squared standard deviations"

    def to_data(self, target: Tensor) -> Tensor:
        return target.clamp(0, 1) if self.values == "pixels" else super().to_data(target)

    def log_prob(self, target: Tensor, p: Distribution) -> Tensor:
        return -((target - p.mean) ** 2)

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

    def to_data(self, target: Tensor) -> Tensor:
        if self.values == "reals":
            return super().to_data(target)
        return ((256 * target - 0.5) / 255).clamp(0, 1)

    def quantise(self, target: Tensor) -> Tensor:
        if self.values == "reals":
            return super().quantise(target)
        return torch.floor(256 * target).clamp(0, 255) / 255


class GaussianLikelihood(Continuous):
    """N(t; loc, scale²) at the dequantised pixel or standardised number t.

    The scale is ``fixed``, or learned: one ``shared`` scale (σ-VAE, Rybkin et al. 2021), a ``diagonal`` one for each
    number of x whatever z, or by ``pixel`` from z. A learned one is never below ``min_scale`` or NARROWEST_SCALE,
    unless ``closed_form``, where ``set_scale`` gives it as it is.
    """

    family = "gaussian"
    distribution = Normal
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

    def forward(self, raw: Tensor) -> Normal:
        loc = raw[:, 0].float()
        log_scale = raw[:, 1].float() - 2 if self.by_pixel else self.log_scale.expand_as(loc)
        return Normal(loc, self.min_scale + torch.exp(log_scale.clamp(max=4)))

    def log_prob(self, target: Tensor, p: Distribution) -> Tensor:
        log_p = p.log_prob(target)
        return log_p if self.values == "pixels" else log_p - torch.log(self.unit)

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        start = (255 * mean.flatten() + 0.5) / 256 if self.values == "pixels" else 0.0
        head.view(self.raw, -1)[0] = start


class DeltaLikelihood(Continuous):
    """x is a function of z and z of x: the parameter ``loc`` is the target itself, and log p(x|z) is given as 0.

    What a bijection has to say stands in log q(z|x) = −log |det ∂z/∂target| − log_volume.
    """

    family = "delta"
    distribution = Delta
    observation_noise = "none"
    pixelwise = False
    takes_reals = True

    def sample(self, p: Distribution, noise: Tensor | None = None) -> Tensor:
        return self.quantise(p.mean)


class ContinuousBernoulliLikelihood(Continuous):
    """p(t) ∝ e^(tl) on [0,1] with logits l, at the dequantised pixel t (Loaiza-Ganem & Cunningham 2019).

    Dequantised, for at a grey level 0 or 1 itself the density grows without end as l does.
    """

    family = "continuous_bernoulli"
    distribution = ContinuousBernoulli

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        expected = ((255 * mean + 0.5) / 256).clamp(0.005, 0.995)
        head.copy_(logits_of(expected).reshape(head.shape))


class DiscretisedLogisticLikelihood(Likelihood):
    """The logistic distribution integrated over the 256 levels of 8-bit pixels (Kingma et al. 2016, App. C)."""

    family = "discretised_logistic"
    distribution: ClassVar[Any] = DiscretisedLogistic
    measure = "counting"

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.min_scale = config.min_scale

    def target(self, x: Tensor, dither: Tensor | None) -> Tensor:
        return torch.round(x * 255) / 255

    def _scale(self, raw: Tensor) -> Tensor:
        return self.min_scale + torch.exp((raw - 2).clamp(max=4))

    def forward(self, raw: Tensor) -> Distribution:
        return DiscretisedLogistic(raw[:, 0].float(), self._scale(raw[:, 1].float()))

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        head.view(2, -1)[0].copy_(mean.flatten())


class LogisticMixtureLikelihood(DiscretisedLogisticLikelihood):
    """Σ_j w_j · discretised logistic(loc_j, scale_j), J components a pixel (Salimans et al. 2017, eq. 1–2).

    Without their dependence of a pixel's colours on each other. The graphs' parameters are log w_j, loc_j and scale_j.
    """

    family = "logistic_mixture"
    distribution = LogisticMixture

    def __init__(self, config: LikelihoodConfig, shape: Shape) -> None:
        super().__init__(config, shape)
        self.components = config.components

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return tuple(f"{kind}_{j}" for kind in ("log_weight", "loc", "scale") for j in range(self.components))

    def forward(self, raw: Tensor) -> LogisticMixture:
        """Raw outputs [M,3J,C,H,W] -> a mixture of parameters [M,J,C,H,W]."""
        logits, loc, log_scale = raw.float().chunk(3, 1)
        return LogisticMixture(torch.log_softmax(logits, 1), loc, self._scale(log_scale))

    def parameters_of(self, p: Distribution) -> tuple[Tensor, ...]:
        return tuple(component for part in super().parameters_of(p) for component in part.unbind(-4))

    def of_parameters(self, parameters: tuple[Tensor, ...]) -> LogisticMixture:
        count = self.components
        return LogisticMixture(*(torch.stack(parameters[i : i + count], -4) for i in range(0, 3 * count, count)))

    def initialise(self, head: Tensor, mean: Tensor) -> None:
        """Components around the mean, a tenth to either side: equal ones would learn the same at first."""
        offsets = 0.1 * torch.linspace(-1, 1, self.components + 2)[1:-1]
        loc = head.view(self.raw, -1)[self.components : 2 * self.components]
        loc.copy_(mean.flatten() + offsets.to(mean).unsqueeze(1))


CLASSES: tuple[type[Likelihood], ...] = (
    *(BernoulliLikelihood, ContinuousBernoulliLikelihood, GaussianLikelihood, DiscretisedLogisticLikelihood),
    *(LogisticMixtureLikelihood, DeltaLikelihood, CrossEntropy, SquaredError),
)
LIKELIHOODS = {cls.family: cls for cls in CLASSES}
"""From ``model.likelihood.family`` to the class that it names."""


def build_likelihood(config: LikelihoodConfig, shape: Shape) -> Likelihood:
    """The configured likelihood for rows [C,H,W]. Raises ConfigError: a family of pixels for reals."""
    return LIKELIHOODS[config.family](config, shape)


@torch.no_grad()
def initialise_head(decoder: nn.Module, likelihood: Likelihood, mean: Tensor) -> None:
    """Set the bias of a decoder's last layer so that p(x) starts at the training mean [C,H,W]."""
    head = [m for m in decoder.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if head.bias is None:
        return
    if isinstance(head, nn.Conv2d):  # one bias for the four sub-pixels and all positions of a channel
        mean = mean.mean((-2, -1)).repeat_interleave(head.out_channels // likelihood.raw // len(mean))
    likelihood.initialise(head.bias, mean)
