"""Linear models without a likelihood: PCA in closed form, and the linear autoencoder that learns its subspace."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.distributions import Distribution
from training.errors import ConfigError
from training.models.base import Reconstruction, Rows
from training.models.moments import moments_of, target_axes, target_batches
from training.models.priors import GaussianPrior, NoPrior
from training.nn.networks import Shape

ROWS = 1000  # at a time


class LinearReconstruction(Reconstruction):
    """z = V (t − c) and its reconstruction U z + b, by squared error.

    ``linear.prior`` gaussian fits N to the training codes afterwards, for there to be something to sample from: it is
    no part of what was minimised. Raises ConfigError: another likelihood than squared_error, or L > D.
    """

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__(shape, config)
        numbers, latent_dim = math.prod(shape), config.latent_dim
        if config.likelihood.family != "squared_error":
            raise ConfigError(
                f"model.likelihood.family: {self.family} expects squared_error, got {config.likelihood.family}"
            )
        if latent_dim > numbers:
            raise ConfigError(
                f"model.latent_dim: {self.family} of {numbers} numbers expects 1 to {numbers}, got {latent_dim}"
            )
        self.prior = GaussianPrior(latent_dim) if config.linear.prior == "gaussian" else NoPrior(latent_dim)

    @abstractmethod
    def flat_code(self, target: Tensor) -> Tensor:
        """Targets [N,D] -> z [N,L]."""

    @abstractmethod
    def reconstruct(self, z: Tensor) -> Tensor:
        """z [M,L] -> targets [M,D]."""

    def code(self, target: Tensor) -> Tensor:
        return self.flat_code(target.flatten(1))

    def decode(self, z: Tensor) -> Distribution:
        p: Distribution = self.likelihood(self.reconstruct(z).unflatten(1, (1, *self.shape)))
        return p


class PCA(LinearReconstruction):
    """Principal component analysis: z = Vᵀ (t − μ) with the L axes of largest variance, uncorrelated and in that order.

    The axes are the right singular vectors of the centred training targets, computed as eigenvectors of their float64
    covariance, which needs D² memory whatever the number of rows. Each axis has its largest entry positive.

    >>> from training.config import LikelihoodConfig
    >>> pca = PCA((1, 8, 8), ModelConfig(latent_dim=2, likelihood=LikelihoodConfig(family="squared_error")))
    >>> pca.decode(torch.zeros(3, 2)).mean.shape
    torch.Size([3, 1, 8, 8])
    """

    family = "pca"
    title = "principal component analysis"
    leaves_axes_out = True
    closed_form = True

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__(shape, config)
        numbers = math.prod(shape)
        self.loc = nn.Parameter(torch.zeros(numbers))
        self.axes = nn.Parameter(torch.eye(numbers, self.latent_dim))

    def flat_code(self, target: Tensor) -> Tensor:
        return (target - self.loc) @ self.axes

    def reconstruct(self, z: Tensor) -> Tensor:
        return z @ self.axes.T + self.loc

    @torch.no_grad()
    def finish(self, train: Rows, validation: Rows, seed: int) -> Iterator[str]:
        axes = target_axes(train.batches(ROWS), len(train), self.likelihood)
        variances = axes.variances
        self.loc.copy_(axes.mean)
        self.axes.copy_(axes.axes[:, : self.latent_dim])
        kept = variances[: self.latent_dim]
        if isinstance(self.prior, GaussianPrior):
            self.prior.set_moments(torch.zeros_like(kept), torch.diag(kept))
        share = float(kept.sum() / variances.sum()) if variances.sum() > 0 else 1.0
        yield f"{self.latent_dim} axes hold {share:.1%} of the variance of {axes.count} rows"


class LinearAutoencoder(LinearReconstruction):
    """One affine layer each way, trained by gradient on the squared error.

    At its minimum the decoder's columns span the subspace of the first L principal axes (Baldi & Hornik 1989), in some
    basis of it: latents are not principal components.
    """

    family = "linear_autoencoder"
    title = "linear autoencoder"

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__(shape, config)
        numbers = math.prod(shape)
        self.encoder = nn.Linear(numbers, self.latent_dim)
        self.decoder = nn.Linear(self.latent_dim, numbers)

    def flat_code(self, target: Tensor) -> Tensor:
        z: Tensor = self.encoder(target).float()
        return z

    def reconstruct(self, z: Tensor) -> Tensor:
        target: Tensor = self.decoder(z)
        return target

    @torch.no_grad()
    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Start where the mean is encoded as 0 and decoded as itself."""
        start = self.likelihood.target(mean.unsqueeze(0), None).flatten()
        self.decoder.bias.copy_(start)
        self.encoder.bias.copy_(-self.encoder.weight @ start)

    @torch.no_grad()
    def finish(self, train: Rows, validation: Rows, seed: int) -> Iterator[str]:
        """Fit the prior to the training codes."""
        if isinstance(self.prior, GaussianPrior):
            targets = target_batches(train.batches(ROWS), self.likelihood)
            moments = moments_of(self.flat_code(batch) for batch in targets)
            self.prior.set_moments(moments.mean, moments.covariance)
            yield f"a Gaussian prior fitted to the codes of {moments.count} rows"
