"""Linear-Gaussian models, t = W z + μ + ε with z ~ N(0, I): probabilistic PCA and factor analysis, log p(x) exact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.distributions import HALF_LOG_2PI, Distribution, FullGaussianPosterior, Normal
from training.errors import ConfigError
from training.models.base import Joint, LatentVariableModel, Rows
from training.models.likelihoods import GaussianLikelihood
from training.models.moments import Axes, principal_axes, target_axes, target_moments
from training.models.priors import StandardNormal
from training.nn.networks import Shape

ROWS = 1000  # at a time


class LinearGaussian(LatentVariableModel):
    """t = W z + μ + ε, ε ~ N(0, Ψ), Ψ diagonal, of the target t [D], with the exact posterior for encoder.

    q(z|x) = N(G (t − μ), R Rᵀ) with G = M⁻¹ Wᵀ Ψ⁻¹, R Rᵀ = M⁻¹ and M = I + Wᵀ Ψ⁻¹ W (Bishop 2006, eq. 12.66 and
    sec. 12.2.4), so that log p(x|z) + log p(z) − log q(z|x) is log p(x) at every z. For that to hold in the graphs, the
    posterior is that of W, μ and Ψ as rounded to float32, it is computed in float64, and log q is taken at the float32
    z that the decoder will see.
    """

    evidence = "exact"
    posterior_family = "full_gaussian"
    closed_form = True
    scale: str  # of the Gaussian likelihood

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__()
        numbers, latent_dim = math.prod(shape), config.latent_dim
        if (config.likelihood.family, config.likelihood.scale) != ("gaussian", self.scale):
            raise ConfigError(
                f"model.likelihood: {self.family} expects family gaussian with scale {self.scale}, "
                f"got {config.likelihood.family} with {config.likelihood.scale}"
            )
        if latent_dim >= numbers:
            raise ConfigError(
                f"model.latent_dim: {self.family} of {numbers} numbers expects 1 to {numbers - 1}, got {latent_dim}"
            )
        self.shape, self.latent_dim, self.noise_dim = shape, latent_dim, latent_dim
        self.narrowest = config.likelihood.min_scale
        self.likelihood: GaussianLikelihood = GaussianLikelihood(config.likelihood, shape, closed_form=True)
        self.prior = StandardNormal(latent_dim)
        self.weight = nn.Parameter(torch.zeros(numbers, latent_dim))
        self.loc = nn.Parameter(torch.zeros(numbers))
        self.gain: Tensor
        self.factor: Tensor
        self.inverse_factor: Tensor
        self.register_buffer("gain", torch.zeros(latent_dim, numbers, dtype=torch.float64))
        self.register_buffer("factor", torch.eye(latent_dim, dtype=torch.float64))
        self.register_buffer("inverse_factor", torch.eye(latent_dim, dtype=torch.float64))

    def encode(self, target: Tensor) -> FullGaussianPosterior:
        """Target [N,C,H,W] -> q(z|x), whose covariance is the same for every row."""
        mean = (target.flatten(1).double() - self.loc.double()) @ self.gain.T
        return FullGaussianPosterior(mean, self.factor, self.inverse_factor)

    def decode(self, z: Tensor) -> Distribution:
        raw = z.double() @ self.weight.double().T + self.loc.double()
        p: Distribution = self.likelihood(raw.unflatten(1, (1, *self.shape)))
        return p

    def joint(self, target: Tensor, z: Tensor, p: Distribution) -> Joint:
        """The parts of log p(x,z), log p(x|z) by residuals in float64: float32 would lose what makes it exact."""
        exact = Normal(*(parameter.double() for parameter in self.likelihood.parameters_of(p)))
        log_prob_map = self.likelihood.log_prob(target.unsqueeze(1).double(), exact)
        return Joint(self.likelihood.total(log_prob_map), log_prob_map.float(), self.prior.log_prob(z))

    def log_marginal(self, target: Tensor) -> Tensor:
        """log N(t; μ, W Wᵀ + Ψ) of targets [N,C,H,W] -> [N] float64, nats, of reals the density of x itself.

        By Woodbury's identity and the matrix determinant lemma, of which M⁻¹ = R Rᵀ is all that is needed.
        """
        scale = self._scales()
        residual = (target.flatten(1).double() - self.loc.double()) / scale
        explained = residual @ (self.weight.double() / scale.unsqueeze(1)) @ self.factor
        quadratic = (residual**2).sum(1) - (explained**2).sum(1)
        log_volume = torch.log(scale).sum() - torch.log(torch.diagonal(self.factor)).sum()
        return -0.5 * quadratic - log_volume - len(scale) * HALF_LOG_2PI + self.likelihood.log_volume

    def _scales(self) -> Tensor:
        """Ψ^½ [D] float64, as the likelihood gives it."""
        p: Normal = self.likelihood(torch.zeros(1, 1, *self.shape))
        return p.scale.flatten().double()

    @torch.no_grad()
    def set_values(self, weight: Tensor, loc: Tensor, scale: Tensor) -> None:
        """Take W [D,L], μ [D] and Ψ^½ (0-dim or [D]), and the posterior that follows from them."""
        self.weight.copy_(weight)
        self.loc.copy_(loc)
        self.likelihood.set_scale(scale.reshape(self.likelihood.log_scale.shape))
        scaled = self.weight.double() / self._scales().unsqueeze(1)
        precision = torch.eye(self.latent_dim, dtype=torch.float64) + scaled.T @ scaled
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        self.gain.copy_(covariance @ (scaled / self._scales().unsqueeze(1)).T)
        self.factor.copy_(torch.linalg.cholesky(covariance))
        self.inverse_factor.copy_(torch.linalg.inv(self.factor))


def ppca(axes: Axes, latent_dim: int, narrowest: float) -> tuple[Tensor, float]:
    """W [D,L] and σ of maximum likelihood among σ ≥ ``narrowest`` (Tipping & Bishop 1999, eqs. 7 and 8, R = I).

    σ² is the mean of the variances that are left out, W the axes kept, each √(λ − σ²) long: given σ, that W is the best
    one, and the likelihood falls on either side of the mean, so that a floor above it is where the maximum lies.
    """
    variance = max(float(axes.variances[latent_dim:].mean()), narrowest**2)
    lengths = torch.sqrt((axes.variances[:latent_dim] - variance).clamp(min=0))
    return axes.axes[:, :latent_dim] * lengths, math.sqrt(variance)


class PPCA(LinearGaussian):
    """Probabilistic PCA, ε ~ N(0, σ² I), solved by the principal axes of the training split.

    The dither of dequantised pixels enters the covariance as its expectation, 1/(12·256²) on the diagonal. z are the
    principal components, whitened and shrunk. Raises ConfigError: another likelihood than the Gaussian of one shared
    scale, or L ≥ D.

    >>> from training.config import LikelihoodConfig
    >>> ppca = PPCA((1, 8, 8), ModelConfig(latent_dim=2, likelihood=LikelihoodConfig(family="gaussian")))
    >>> ppca.decode(torch.zeros(3, 2)).mean.shape
    torch.Size([3, 1, 8, 8])
    """

    family = "ppca"
    title = "probabilistic principal component analysis"
    leaves_axes_out = True
    scale = "shared"

    @torch.no_grad()
    def finish(self, train: Rows, validation: Rows, seed: int) -> Iterator[str]:
        axes = target_axes(train.batches(ROWS), len(train), self.likelihood)
        weight, sigma = ppca(axes, self.latent_dim, self.narrowest)
        self.set_values(weight, axes.mean, torch.tensor(sigma, dtype=torch.float64))
        explained = float(weight.pow(2).sum() + sigma**2 * self.latent_dim) / float(axes.variances.sum())
        yield f"{self.latent_dim} axes hold {explained:.1%} of the variance of {axes.count} rows, σ = {sigma:.4g}"


def em_step(covariance: Tensor, weight: Tensor, variance: Tensor, floor: float) -> tuple[Tensor, Tensor, float]:
    """W [D,L] and ψ [D] -> the next ones, and the training rows' mean log p(t) at the given ones, nats.

    EM on the covariance S [D,D] alone (Rubin & Thayer 1982; Bishop 2006, eqs. 12.66 to 12.70). The M step itself keeps
    ψ ≥ ``floor``: given W, the expected log-likelihood has one maximum in each ψ.
    """
    scaled = weight / variance.unsqueeze(1)
    precision = torch.eye(weight.shape[1], dtype=weight.dtype) + weight.T @ scaled
    cholesky = torch.linalg.cholesky(precision)
    gain = torch.cholesky_solve(scaled.T, cholesky)
    cross = covariance @ gain.T  # E[(t − μ) zᵀ]
    log_volume = torch.log(variance).sum() + 2 * torch.log(torch.diagonal(cholesky)).sum()
    trace = (torch.diagonal(covariance) / variance).sum() - (scaled * cross).sum()
    log_p = -0.5 * (log_volume + trace) - len(variance) * HALF_LOG_2PI
    second = torch.cholesky_inverse(cholesky) + gain @ cross  # E[z zᵀ]
    updated = torch.linalg.solve(second, cross, left=False)
    residual = torch.diagonal(covariance) - (updated * cross).sum(1)
    return updated, residual.clamp(min=floor), float(log_p)


def identified(weight: Tensor, variance: Tensor) -> Tensor:
    """W rotated so that Wᵀ Ψ⁻¹ W is diagonal, largest first: the same density, and factors that can be told apart."""
    _, axes = principal_axes(weight.T @ (weight / variance.unsqueeze(1)))
    rotated = weight @ axes
    largest = rotated.gather(0, rotated.abs().argmax(0, keepdim=True))
    return rotated * torch.where(largest < 0, -1.0, 1.0)


class FactorAnalysis(LinearGaussian):
    """Factor analysis, ε ~ N(0, diag ψ), by EM from PPCA's solution; √ψ ≥ ``likelihood.min_scale``.

    EM never lowers the likelihood; it stops when an iteration gains less than ``factor.tolerance`` nats a row. The
    dither enters as in PPCA. Raises ConfigError: another likelihood than the Gaussian of a diagonal scale, or L ≥ D.
    """

    family = "fa"
    title = "factor analysis"
    leaves_axes_out = True
    scale = "diagonal"

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__(shape, config)
        self.options = config.factor

    @torch.no_grad()
    def finish(self, train: Rows, validation: Rows, seed: int) -> Iterator[str]:
        moments = target_moments(train.batches(ROWS), self.likelihood)
        axes = Axes(moments.count, moments.mean, *principal_axes(moments.covariance))
        weight, sigma = ppca(axes, self.latent_dim, self.narrowest)
        variance = torch.full_like(moments.mean, sigma**2)
        iterations, log_p, gain = 0, -math.inf, math.inf
        while gain >= self.options.tolerance and iterations < self.options.iterations:
            before = log_p
            weight, variance, log_p = em_step(moments.covariance, weight, variance, self.narrowest**2)
            iterations, gain = iterations + 1, log_p - before
        self.set_values(identified(weight, variance), moments.mean, torch.sqrt(variance))
        log_p += float(self.likelihood.log_volume)
        yield f"EM: {iterations} iterations, mean log p(x) of {moments.count} training rows {log_p:.4f} nats"
