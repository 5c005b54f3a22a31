"""What every likelihood p(x|z) here is: a module whose forward gives the distribution of a target.

x holds pixels in [0,1], or reals (vectors, signals) in their own units. The density is evaluated at a *target*:
binarised or dequantised pixels, or standardised reals (x − shift)/unit. Targets broadcast against parameters,
[N,1,C,H,W] against [N,K,C,H,W]. All is plain tensor algebra, in nats, and exports to ONNX as it stands.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from training.config import LikelihoodConfig
from training.distributions import Distribution
from training.nn.networks import Shape


class Likelihood(nn.Module, ABC):
    """Base: pixels are their own target and need no dither; reals are standardised by ``shift`` and ``unit`` [C,H,W].

    ``distribution``: the class of p(target|z), whose fields are the graphs' parameters. ``measure``: of the density of
    x, "none" for a reconstruction error. ``observation_noise``: what ``sample`` wants. ``pixelwise``: log p(x|z) has a
    meaning at each pixel. ``unit_of_error``: what −log p counts.
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
