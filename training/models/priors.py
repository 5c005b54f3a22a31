"""Priors p(z): log densities, and draws as functions of noise so that they export as prior.onnx."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from training.config import PriorConfig
from training.errors import ConfigError
from training.models.posteriors import HALF_LOG_2PI
from training.nn.flows import CouplingStack


def log_standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) for each element, in nats."""
    return -0.5 * z**2 - HALF_LOG_2PI


class Prior(nn.Module, ABC):
    """``noise_dim`` standard normal numbers P, and one uniform ``choice`` if it says so, make one draw."""

    family: str
    noise_dim: int
    choice: bool = False

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of z [...,L] -> [...] float64, nats."""

    @abstractmethod
    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        """Noise [M,P], and choice [M] uniform in [0,1) -> z [M,L]."""


class StandardNormal(Prior):
    """N(0, I)."""

    family = "standard_normal"

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.noise_dim = latent_dim

    def log_prob(self, z: Tensor) -> Tensor:
        return log_standard_normal(z).double().sum(-1)

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        return noise


class NoPrior(Prior):
    """None: the model cannot be sampled, and log p(z) is given as 0."""

    family = "none"

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.noise_dim = latent_dim

    def log_prob(self, z: Tensor) -> Tensor:
        return 0.0 * z.double().sum(-1)

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        raise NotImplementedError("a model without a prior has no draws")


def mixture_log_prob(z: Tensor, log_weights: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log Σ_j w_j N(z; loc_j, diag(scale_j²)) of z [...,L] for J components [J], [J,L], [J,L] -> [...] float64.

    The squares are expanded so that the work is two matrix products, not an array of [...,J,L]; in float64, for the
    terms cancel.
    """
    z, loc, precision = z.double(), loc.double(), scale.double() ** -2
    quadratic = z**2 @ precision.T - 2 * (z @ (loc * precision).T) + (loc**2 * precision).sum(-1)
    normaliser = log_weights.double() - torch.log(scale.double()).sum(-1) - loc.shape[-1] * HALF_LOG_2PI
    return torch.logsumexp(normaliser - 0.5 * quadratic, -1)


def chosen(choice: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Rows of ``values`` [J,L] by the inverse distribution function of ``weights`` [J] at choice [M] -> [M,L]."""
    edges = torch.cumsum(weights, 0)
    above = (choice.unsqueeze(1) < edges).to(values.dtype)  # 1 from the chosen component on
    above = torch.cat([above[:, :-1], torch.ones_like(above[:, :1])], 1)  # rounding must not leave the last one out
    picked = above - torch.cat([torch.zeros_like(above[:, :1]), above[:, :-1]], 1)
    return picked @ values


class VampPrior(Prior):
    """A mixture of posteriors, (1/J) Σ_j q(z|u_j) with pseudo-inputs u_j learned (Tomczak & Welling 2018, eq. 9).

    Components are given by ``set_components`` before each use, for they are the encoder's; in a served graph they are
    constants.
    """

    family = "vamp"
    choice = True

    def __init__(self, latent_dim: int, numbers: int, components: int) -> None:
        super().__init__()
        self.noise_dim = latent_dim
        self.logits = nn.Parameter(torch.empty(components, numbers))
        nn.init.normal_(self.logits, 0.0, 0.5)
        self.loc: Tensor
        self.scale: Tensor
        self.register_buffer("loc", torch.zeros(components, latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(components, latent_dim), persistent=False)

    def pseudo_inputs(self) -> Tensor:
        """u [J,D] in (0,1)."""
        return torch.sigmoid(self.logits)

    @torch.no_grad()
    def start_at(self, images: Tensor) -> None:
        """Pseudo-inputs from training images [B,D] in [0,1]; those beyond B stay random."""
        count = min(len(images), len(self.logits))
        self.logits[:count] = torch.logit(images[:count].clamp(0.02, 0.98))

    def set_components(self, loc: Tensor, scale: Tensor) -> None:
        """Posterior moments [J,L] of the pseudo-inputs."""
        self.loc, self.scale = loc, scale

    def _weights(self) -> Tensor:
        return torch.full_like(self.loc[:, 0], 1 / len(self.loc))

    def log_prob(self, z: Tensor) -> Tensor:
        return mixture_log_prob(z, torch.log(self._weights()), self.loc, self.scale)

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        assert choice is not None, "a mixture wants a choice"
        weights = self._weights()
        return chosen(choice, weights, self.loc) + chosen(choice, weights, self.scale) * noise


class FlowPrior(Prior):
    """z = f(ε) with f a stack of affine couplings (Dinh et al. 2017; as a VAE's prior: Huang et al. 2017).

    log p(z) = log N(f⁻¹(z); 0, I) + log |det ∂f⁻¹/∂z|. Starts as N(0, I).
    """

    family = "flow"

    def __init__(self, latent_dim: int, steps: int, hidden: int) -> None:
        super().__init__()
        self.noise_dim = latent_dim
        self.flow = CouplingStack(latent_dim, steps, hidden)

    def log_prob(self, z: Tensor) -> Tensor:
        noise, log_det = self.flow.inverse(z)
        return log_standard_normal(noise).double().sum(-1) + log_det

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        return self.flow(noise)[0]


def build_prior(config: PriorConfig, latent_dim: int, shape: tuple[int, int, int]) -> Prior:
    """The configured prior for latents of that size and images of that shape. Raises ConfigError."""
    if config.family == "vamp":
        return VampPrior(latent_dim, math.prod(shape), config.components)
    if config.family == "flow":
        if latent_dim < 2:
            raise ConfigError(
                "model.prior.family: a flow couples dimensions, of which it wants 2; got model.latent_dim 1"
            )
        return FlowPrior(latent_dim, config.steps, config.hidden)
    return StandardNormal(latent_dim)
