"""What every model here is: a prior p(z), a decoder p(x|z), an encoder q(z|x), and log p(x), a bound on it, or neither.

Shapes: N rows, K posterior samples a row, M latents, L latent dimensions, E noise numbers a sample, C×H×W numbers
a row (vectors are 1×1×D, signals C×1×T).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.distributions import Distribution, PointPosterior, Posterior, unflattened
from training.errors import ConfigError
from training.models.likelihood import Likelihood
from training.models.likelihoods import LIKELIHOODS, build_likelihood
from training.models.priors import Prior
from training.nn.networks import Shape


class Rows(Protocol):
    """The rows of a split, which can be read more than once."""

    def __len__(self) -> int:
        """Number of rows."""

    def batches(self, size: int) -> Iterator[Tensor]:
        """Values x, float32 [≤size,C,H,W], in the split's order."""


class Joint(NamedTuple):
    """Outputs of joint.onnx: the two parts of log p(x,z), in nats.

    log p(x|z) [N,K] float64, the same for each number of x [N,K,C,H,W] float32, log p(z) [N,K] float64.
    """

    log_p_x_given_z: Tensor
    log_p_x_given_z_map: Tensor
    log_p_z: Tensor


class NegativeError(NamedTuple):
    """Outputs of joint.onnx of a model without a likelihood: minus its reconstruction error, in the error's own unit.

    [N,K] float64, the same for each number of x [N,K,C,H,W] float32; log p(z) [N,K] float64 in nats, of a prior that
    was fitted afterwards.
    """

    negative_error: Tensor
    negative_error_map: Tensor
    log_p_z: Tensor


class KL(NamedTuple):
    """KL(q(z|x) ‖ p(z)) of each row by group of latents, ``per_group`` [N,G] float32, in nats.

    ``analytic``: by latent dimension (G = L) where both are diagonal Gaussians, by layer in a ladder; otherwise
    log q − log p averaged over the samples, of all latents together (G = 1).
    """

    per_group: Tensor
    analytic: bool


class Terms(NamedTuple):
    """What an objective needs, float32, in nats: three log densities [N,K], the KL, and the samples z [N,K,L].

    Of a model without a likelihood ``log_p_x_given_z`` is minus the reconstruction error, and the rest is 0.
    """

    log_p_x_given_z: Tensor
    log_p_z: Tensor
    log_q_z: Tensor
    kl: KL
    z: Tensor


class LatentVariableModel(nn.Module, ABC):
    """Base of all families; ``evidence``, ``posterior_family`` and ``moments`` are the manifest's words.

    ``title``: the family in words. ``convolutional``: its networks are convolutions whatever ``model.network.kind``
    says. ``leaves_axes_out``: it keeps fewer axes than the data have, or its residual is rounding.
    ``weighs_samples``: its objective may be a bound of several weighted posterior samples. ``kl_groups``: what the
    groups of Terms.kl are. ``noise_dim``: standard normal numbers E that one posterior sample takes.

    ``closed_form`` models are solved by ``finish`` alone; the others are trained by gradient on ``forward``'s terms,
    and may add in ``finish`` what is fitted once the weights stand.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    evidence: Literal["bound", "exact", "none"] = "bound"
    posterior_family: str = "diagonal_gaussian"
    moments: Literal["exact", "base", "point"] = "exact"
    closed_form: ClassVar[bool] = False
    convolutional: ClassVar[bool] = False
    leaves_axes_out: ClassVar[bool] = False
    weighs_samples: ClassVar[bool] = False
    kl_groups: ClassVar[Literal["dimension", "layer"]] = "dimension"

    shape: Shape
    latent_dim: int
    noise_dim: int
    likelihood: Likelihood
    prior: Prior

    @abstractmethod
    def encode(self, target: Tensor) -> Posterior:
        """Target [N,C,H,W] -> q(z|x)."""

    @abstractmethod
    def decode(self, z: Tensor) -> Distribution:
        """Latents [M,L] -> the distribution of the target p(x|z), parameters [M,C,H,W]."""

    def decode_samples(self, z: Tensor) -> Distribution:
        """Latents [N,K,L] -> p(x|z), parameters [N,K,C,H,W]."""
        return unflattened(self.decode(z.flatten(0, 1)), z.shape[:2])

    def joint(self, target: Tensor, z: Tensor, p: Distribution) -> Joint | NegativeError:
        """Target [N,C,H,W], z [N,K,L] and p(x|z) at them, parameters [N,K,C,H,W] -> the parts of log p(x,z)."""
        log_prob_map = self.likelihood.log_prob(target.unsqueeze(1), p)
        return Joint(self.likelihood.total(log_prob_map), log_prob_map, self.prior.log_prob(z))

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, stop_gradient_q: bool = False) -> Terms:
        """The terms of an objective for values x [N,C,H,W] at K samples, from noise [N,K,E].

        ``stop_gradient_q`` evaluates log q with its parameters held constant, so that its gradient flows through z
        alone (sticking the landing, Roeder et al. 2017; DReG, Tucker et al. 2019). Raises NotImplementedError: a model
        of closed form.
        """
        raise NotImplementedError(f"a model of family {self.family!r} is solved in closed form, and has no objective")

    @torch.no_grad()
    def log_prob(self, x: Tensor, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """log p(x) [N] float64 of values x [N,C,H,W], in nats: exact, or a lower bound by ``samples`` draws of z.

        The bound is IWAE's, log (1/K) Σ_k p(x|z_k) p(z_k) / q(z_k|x) (Burda et al. 2016, eq. 8), and decodes N·K rows
        at once. Dither and noise come from ``generator``, of x's device. The model is in eval mode, as a run's is.
        Raises ConfigError: a model without a likelihood.
        """
        if self.evidence == "none":
            raise ConfigError(f"a model of family {self.family!r} has no likelihood, and so no log p(x)")
        dither = torch.rand(x.shape, generator=generator, device=x.device) if self.likelihood.dither else None
        target = self.likelihood.target(x, dither)
        noise = torch.randn(len(x), samples, self.noise_dim, generator=generator, device=x.device)
        z, log_q_z = self.encode(target).rsample(noise)
        log_p_x_given_z, _, log_p_z = self.joint(target, z, self.decode_samples(z))
        return torch.logsumexp(log_p_x_given_z + log_p_z - log_q_z, 1) - math.log(samples)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws x [count,C,H,W]: z from the prior, x from p(x|z), by ``generator``, of the model's device.

        The model is in eval mode, as a run's is. Raises NotImplementedError without a prior.
        """
        device = next(self.parameters()).device
        choice = torch.rand(count, generator=generator, device=device) if self.prior.choice else None
        noise = torch.randn(count, self.prior.noise_dim, generator=generator, device=device)
        p = self.decode(self.prior.sample(noise, choice))
        draw = torch.randn if self.likelihood.observation_noise == "standard_normal" else torch.rand
        return self.likelihood.sample(p, draw((count, *self.shape), generator=generator, device=device))

    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Start from the training mean [C,H,W] and some training images [B,C,H,W]."""

    def finish(self, train: Rows, validation: Rows, seed: int) -> Iterator[str]:
        """Fit to the training rows what gradients do not; yields sentences for the log, one after each stage."""
        return iter(())


class Reconstruction(LatentVariableModel):
    """Base of models with one code z a row and a reconstruction error in place of log p(x|z): there is no evidence.

    Raises ConfigError: a likelihood where a reconstruction error is expected.
    """

    evidence = "none"
    posterior_family = "deterministic"
    moments = "point"
    noise_dim = 0

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        self.latent_dim = config.latent_dim
        self.likelihood = build_likelihood(config.likelihood, shape)
        if self.likelihood.measure != "none":
            errors = " or ".join(name for name, cls in LIKELIHOODS.items() if cls.measure == "none")
            raise ConfigError(
                f"model.likelihood.family: a model of family {config.family!r} is trained on a reconstruction error, "
                f"expected {errors}, got {config.likelihood.family!r}"
            )

    @abstractmethod
    def code(self, target: Tensor) -> Tensor:
        """Target [N,C,H,W] -> z [N,L]."""

    def encode(self, target: Tensor) -> PointPosterior:
        z = self.code(target)
        return PointPosterior(z, torch.zeros_like(z[:, 0], dtype=torch.float64))

    def joint(self, target: Tensor, z: Tensor, p: Distribution) -> NegativeError:
        return NegativeError(*super().joint(target, z, p))

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, stop_gradient_q: bool = False) -> Terms:
        """Terms whose log_p_x_given_z is minus the error of each row; the others are 0."""
        target, copies = self.likelihood.target(x, dither), noise.shape[1]
        z = self.code(target)
        errors = self.likelihood.log_prob(target, self.decode(z)).sum((-3, -2, -1)).unsqueeze(1).expand(-1, copies)
        nothing = torch.zeros_like(errors)
        z = z.unsqueeze(1).expand(-1, copies, -1)
        return Terms(errors, nothing, nothing, KL(nothing[:, :1], analytic=False), z)


class BijectiveModel(LatentVariableModel):
    """Base of models with as many latents as numbers: x and z are each other's image, so that log p(x) is exact.

    log p(x|z) = 0 and log q(z|x) = −log |det ∂z/∂x|. Raises ConfigError: another likelihood than delta.
    """

    evidence = "exact"
    posterior_family = "deterministic"
    moments = "point"
    noise_dim = 0

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__()
        if (name := config.likelihood.family) != "delta":
            raise ConfigError(
                f"model.likelihood.family: the decoder of family {config.family!r} is its inverse: expected delta, "
                f"got {name}"
            )
        self.shape, self.latent_dim = shape, math.prod(shape)
        self.likelihood = build_likelihood(config.likelihood, shape)

    @abstractmethod
    def call_and_ladj(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Target [N,C,H,W] -> z [N,L], log |det ∂z/∂x| [N] float64."""

    def encode(self, target: Tensor) -> PointPosterior:
        z, ladj = self.call_and_ladj(target)
        return PointPosterior(z, -ladj)

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, stop_gradient_q: bool = False) -> Terms:
        """The terms of an objective, of one z a row; ``stop_gradient_q`` changes nothing: log q is what is learned."""
        z, log_q_z = self.encode(self.likelihood.target(x, dither)).rsample(noise)
        log_p_z = self.prior.log_prob(z)
        rate = (log_q_z - log_p_z)[:, :1].float()
        return Terms(torch.zeros_like(rate).expand(log_q_z.shape), log_p_z.float(), log_q_z.float(), KL(rate, False), z)
