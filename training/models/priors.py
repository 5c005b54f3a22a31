"""Priors p(z): log densities, and draws as functions of noise so that they export as prior.onnx."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from training.config import MixtureConfig, PriorConfig
from training.distributions import Mixture, MultivariateNormal, Normal, standard_normal_log_prob
from training.distributions.logistic import standard_logistic_from_normal, standard_logistic_log_prob
from training.errors import ConfigError
from training.nn.couplings import CouplingStack

EM_BATCH = 1000  # codes at a time
EM_ITERATIONS = 200  # it stops earlier once the mean log density gains less than 1e-3


class Prior(nn.Module, ABC):
    """Base of priors p(z): a draw takes ``noise_dim`` standard normal numbers P, and a uniform one if ``choice``."""

    family: ClassVar[str]
    choice: ClassVar[bool] = False

    def __init__(self, noise_dim: int) -> None:
        super().__init__()
        self.noise_dim = noise_dim

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of z [...,L] -> [...] float64, nats."""

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        """Noise [M,P], and choice [M] uniform in [0,1) -> z [M,L] float32. Raises NotImplementedError: no prior."""
        raise NotImplementedError("a model without a prior has no draws")


class StandardNormal(Prior):
    """The standard normal prior N(0, I)."""

    family = "standard_normal"

    def log_prob(self, z: Tensor) -> Tensor:
        return standard_normal_log_prob(z).double().sum(-1)

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        return noise


class NoPrior(Prior):
    """No prior: the model cannot be sampled, and log p(z) is given as 0."""

    family = "none"

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z[..., 0], dtype=torch.float64)


class GaussianPrior(Prior):
    """A normal prior N(loc, A Aᵀ), fitted to the training codes after the encoder (Ghosh et al. 2020, sec. 4)."""

    family = "gaussian"

    def __init__(self, latent_dim: int) -> None:
        super().__init__(latent_dim)
        self.loc: Tensor
        self.factor: Tensor
        self.inverse_factor: Tensor
        self.register_buffer("loc", torch.zeros(latent_dim, dtype=torch.float64))
        self.register_buffer("factor", torch.eye(latent_dim, dtype=torch.float64))
        self.register_buffer("inverse_factor", torch.eye(latent_dim, dtype=torch.float64))

    @property
    def distribution(self) -> MultivariateNormal:
        """p(z)."""
        return MultivariateNormal(self.loc, self.factor, self.inverse_factor)

    @torch.no_grad()
    def set_moments(self, loc: Tensor, covariance: Tensor) -> None:
        """Mean [L] and covariance [L,L]; axes that do not vary get a millionth of the largest standard deviation."""
        floor = float(torch.diagonal(covariance).max()) * 1e-12 or 1e-12
        factor = torch.linalg.cholesky(covariance + floor * torch.eye(len(loc), dtype=covariance.dtype))
        self.loc.copy_(loc)
        self.factor.copy_(factor)
        self.inverse_factor.copy_(torch.linalg.inv(factor))

    def log_prob(self, z: Tensor) -> Tensor:
        return self.distribution.log_prob(z)

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        return self.distribution.sample(noise).float()


class MixtureOfGaussians(Prior):
    """Base of mixtures Σ_j w_j N_j, of whose components one uniform choice picks one."""

    choice = True

    @property
    @abstractmethod
    def distribution(self) -> Mixture:
        """p(z) as it stands."""

    def log_prob(self, z: Tensor) -> Tensor:
        return self.distribution.log_prob(z)

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        assert choice is not None, "a mixture wants a choice"
        return self.distribution.sample(noise, choice).float()


class VampPrior(MixtureOfGaussians):
    """A mixture of posteriors, (1/J) Σ_j q(z|u_j) with pseudo-inputs u_j learned (Tomczak & Welling 2018, eq. 9).

    Components are given by ``set_components`` before each use, for they are the encoder's; in a served graph they are
    constants.
    """

    family = "vamp"

    def __init__(self, latent_dim: int, numbers: int, components: int) -> None:
        super().__init__(latent_dim)
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

    @property
    def distribution(self) -> Mixture:
        weights = torch.full_like(self.loc[:, 0], 1 / len(self.loc))
        return Mixture(weights, Normal(self.loc, self.scale))


class FittedMixture(MixtureOfGaussians):
    """Σ_j w_j N(loc_j, A_j A_jᵀ), by EM on training codes (ex-post density estimation, Ghosh et al. 2020, sec. 4).

    It plays no part in training, so that its log density bounds no evidence. Until ``fit`` it is N(0, I).
    """

    family = "gaussian_mixture"

    def __init__(self, latent_dim: int, config: MixtureConfig) -> None:
        super().__init__(latent_dim)
        self.config = config
        count, identity = config.components, torch.eye(latent_dim, dtype=torch.float64)
        self.weights: Tensor
        self.loc: Tensor
        self.factor: Tensor
        self.inverse_factor: Tensor
        self.register_buffer("weights", torch.full((count,), 1 / count, dtype=torch.float64))
        self.register_buffer("loc", torch.zeros(count, latent_dim, dtype=torch.float64))
        self.register_buffer("factor", identity.repeat(count, 1, 1))
        self.register_buffer("inverse_factor", identity.repeat(count, 1, 1))

    @property
    def distribution(self) -> Mixture:
        return Mixture(self.weights, MultivariateNormal(self.loc, self.factor, self.inverse_factor))

    @torch.no_grad()
    def fit(self, codes: Tensor, seed: int) -> str:
        """EM on codes [n,L], standardised meanwhile so that no scale of them is special; what came of it, in words.

        Raises ConfigError: fewer codes than components.
        """
        count = self.config.components
        if len(codes) < count:
            raise ConfigError(f"model.autoencoder.mixture.components: {count} of {len(codes)} codes, expected no more")
        shift, unit = codes.double().mean(0), codes.double().std(0, correction=0)
        unit = torch.where(unit > 0, unit, 1.0)
        kind = {"full": "full", "diagonal": "diag"}[self.config.covariance]
        mixture = GaussianMixture(count, covariance_type=kind, max_iter=EM_ITERATIONS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # said below
            mixture.fit(((codes.double() - shift) / unit).numpy())
        covariances = mixture.covariances_ if kind == "full" else np.stack([np.diag(c) for c in mixture.covariances_])
        self.weights.copy_(torch.from_numpy(mixture.weights_))
        self.loc.copy_(shift + unit * torch.from_numpy(mixture.means_))
        self.factor.copy_(unit.unsqueeze(-1) * torch.linalg.cholesky(torch.from_numpy(covariances)))
        self.inverse_factor.copy_(torch.linalg.inv(self.factor))
        ended = f"after {mixture.n_iter_} iterations" if mixture.converged_ else f"not converged in {EM_ITERATIONS}"
        mean = float(torch.cat([self.log_prob(part) for part in codes.split(EM_BATCH)]).mean())
        return f"{count} Gaussians fitted to {len(codes)} codes, {ended}: log p(z) {mean:.2f} nats on average"


class FlowPrior(Prior):
    """z = f(ε) with f a stack of affine couplings (Dinh et al. 2017; as a VAE's prior: Huang et al. 2017).

    log p(z) = log N(f⁻¹(z); 0, I) + log |det ∂f⁻¹/∂z|. Starts as N(0, I).
    """

    family = "flow"

    def __init__(self, latent_dim: int, steps: int, hidden: int) -> None:
        super().__init__(latent_dim)
        self.flow = CouplingStack(latent_dim, steps, hidden)

    def log_prob(self, z: Tensor) -> Tensor:
        noise, ladj = self.flow.inverse_and_ladj(z)
        return standard_normal_log_prob(noise).double().sum(-1) + ladj

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        return self.flow.call_and_ladj(noise)[0]


class LogisticSources(Prior):
    """Π_i p(s_i), p(s) = e^{−s}/(1 + e^{−s})²: infomax (Bell & Sejnowski 1995); tails are heavier than N's."""

    family = "logistic"

    def log_density(self, s: Tensor) -> Tensor:
        """log p(s) of sources [...,L], element by element, in their dtype."""
        return standard_logistic_log_prob(s)

    def choose(self, sources: Tensor) -> bool:
        """Fit the kinds of the densities to sources [B,L]; True if any changed. Logistic ones are all of one kind."""
        return False

    def log_prob(self, z: Tensor) -> Tensor:
        return self.log_density(z.double()).sum(-1)

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        return standard_logistic_from_normal(noise.double()).float()


class ExtendedSources(LogisticSources):
    """Logistic sources, and sub-Gaussian ones: ½N(−1, 1) + ½N(1, 1) (extended infomax, Lee et al. 1999, eq. 2.14).

    A source of the second kind takes the sign of a normal number for its side. ``mixed`` [L] is 1 for these.
    """

    family = "extended_logistic"

    def __init__(self, latent_dim: int) -> None:
        super().__init__(2 * latent_dim)
        self.mixed: Tensor
        self.register_buffer("mixed", torch.zeros(latent_dim))

    def log_density(self, s: Tensor) -> Tensor:
        size = s.abs()
        mixture = standard_normal_log_prob(size - 1) + torch.log1p(torch.exp(-2 * size)) - math.log(2)
        return super().log_density(s) + self.mixed * (mixture - super().log_density(s))

    @torch.no_grad()
    def choose(self, sources: Tensor) -> bool:
        """Take the density under which separation is stable, by these sources [B,L] (Lee et al. 1999, eq. 2.33).

        Returns whether any changed.
        """
        u = (sources - sources.mean(0)) / sources.std(0)
        squashed = torch.tanh(u)
        mixed = ((1 - squashed**2).mean(0) < (squashed * u).mean(0)).to(self.mixed.dtype)
        changed = bool((mixed != self.mixed).any())
        self.mixed.copy_(mixed)
        return changed

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        inner, side = noise.double().chunk(2, -1)
        logistic, mixture = standard_logistic_from_normal(inner), inner + torch.sign(side)
        return (logistic + self.mixed * (mixture - logistic)).float()


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
