"""The linear Gaussian model as a VAE: log p(x) and the posterior have closed forms."""

import numpy as np
import torch

from service.bundle.input_rules import Preprocessing
from training.config import LikelihoodConfig, ModelConfig
from training.data.dataset import Dataset
from training.distributions import DiagonalGaussianPosterior, Normal
from training.models.likelihoods import GaussianLikelihood
from training.models.vae import VAE

SHAPE = (1, 4, 5)


def noise_images(count=40):
    """Images of uniform noise, all of them in every split."""
    x = np.random.RandomState(0).random_sample((count, *SHAPE)).astype(np.float32)
    every = np.arange(count)
    return Dataset(
        name="noise",
        preprocessing=Preprocessing(mode="L", height=4, width=5),
        splits={"train": every, "validation": every, "calibration": every, "test": every},
        labels=None,
        label_names=None,
        fingerprint="0" * 64,
        skipped=[],
        dtype=x.dtype,
        store=x,
    )


class Continuous(GaussianLikelihood):
    """Evaluated at the pixels themselves: these are no levels."""

    def __init__(self, config, shape):
        super().__init__(config, shape)
        self.dither = False

    def target(self, x, dither):
        return x


class Linear(VAE):
    """x = W z + μ + σ ε. W has orthogonal columns unless ``mixed``, so that the posterior is diagonal.

    The encoder knows it; ``exact`` False widens it by half, ``offset`` shifts its mean.
    """

    def __init__(self, exact=True, mixed=None, offset=0.0):
        config = LikelihoodConfig(family="gaussian")
        super().__init__(SHAPE, ModelConfig(latent_dim=3, likelihood=config))
        self.likelihood = Continuous(config, SHAPE)
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(20, 3, generator=generator)).Q
        self.W = basis * torch.tensor([0.9, 0.5, 0.2])
        if mixed is not None:
            self.W = self.W @ mixed
        self.mu = torch.full((20,), 0.4)
        self.sigma = 0.3
        self.widen = 1.0 if exact else 1.5
        self.offset = offset

    @property
    def precision(self):
        """Of the posterior: I + WᵀW/σ², [3,3]."""
        return torch.eye(3) + self.W.T @ self.W / self.sigma**2

    def encode(self, target):
        loc = (target.flatten(1) - self.mu) @ self.W / self.sigma**2 @ torch.linalg.inv(self.precision)
        scale = (self.precision.diagonal().rsqrt() * self.widen).expand_as(loc)
        return DiagonalGaussianPosterior(loc + self.offset, scale)

    def decode(self, z):
        loc = (z @ self.W.T + self.mu).reshape(-1, *SHAPE)
        return Normal(loc, torch.full_like(loc, self.sigma))

    def log_evidence(self, x):
        covariance = self.W.double() @ self.W.double().T + self.sigma**2 * torch.eye(20, dtype=torch.float64)
        p = torch.distributions.MultivariateNormal(self.mu.double(), covariance)
        return p.log_prob(x.flatten(1).double()).numpy()
