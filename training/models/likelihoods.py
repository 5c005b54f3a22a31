"""The likelihoods p(x|z): what a decoder's raw outputs mean, and the table of them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

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
from training.models.likelihood import Likelihood
from training.nn.networks import Shape

NARROWEST_SCALE = 0.01
"""Floor of the Gaussian's scale, 2.6 levels: the gradient of a residual r is r/σ², so that the floor of 1e-3 that suits
the logistic (whose gradient is 1/σ at most) lets single pixels of constant value throw the training off."""


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
WITHOUT_DENSITY = (ReconstructionError, DeltaLikelihood)
"""Classes whose ``log_prob`` is no log p(x|z)."""


def build_likelihood(config: LikelihoodConfig, shape: Shape) -> Likelihood:
    """The configured likelihood for rows [C,H,W]. Raises ConfigError: a family of pixels for reals."""
    family = LIKELIHOODS[config.family]
    if config.values == "reals" and not family.takes_reals:
        known = ", ".join(name for name, cls in LIKELIHOODS.items() if cls.takes_reals)
        raise ConfigError(
            f"model.likelihood.family: {config.family!r} is of pixels in [0, 1], these rows are numbers in their own "
            f"units: expected one of {known}"
        )
    return family(config, shape)


def build_density(config: LikelihoodConfig, shape: Shape) -> Likelihood:
    """The configured likelihood, of a model that bounds log p(x). Raises ConfigError: a family without p(x|z)."""
    likelihood = build_likelihood(config, shape)
    if isinstance(likelihood, WITHOUT_DENSITY):
        known = ", ".join(name for name, cls in LIKELIHOODS.items() if not issubclass(cls, WITHOUT_DENSITY))
        raise ConfigError(
            f"model.likelihood.family: the model bounds log p(x), and expects one of {known}; got {config.family!r}, "
            "which gives no p(x|z)"
        )
    return likelihood


@torch.no_grad()
def initialise_head(decoder: nn.Module, likelihood: Likelihood, mean: Tensor) -> None:
    """Set the bias of a decoder's last layer so that p(x) starts at the training mean [C,H,W]."""
    head = [m for m in decoder.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if head.bias is None:
        return
    if isinstance(head, nn.Conv2d):  # one bias for the four sub-pixels and all positions of a channel
        mean = mean.mean((-2, -1)).repeat_interleave(head.out_channels // likelihood.raw // len(mean))
    likelihood.initialise(head.bias, mean)
