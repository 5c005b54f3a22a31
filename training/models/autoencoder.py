"""The deterministic autoencoder (Hinton & Salakhutdinov 2006) with a prior fitted afterwards (Ghosh et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.distributions import Distribution
from training.models.base import Reconstruction, Rows
from training.models.likelihoods import initialise_head
from training.models.moments import first_rows
from training.models.priors import FittedMixture, NoPrior, Prior
from training.nn.networks import Shape, build_decoder, build_encoder

MAX_CODES = 100_000  # of the training split, its first ones: a mixture has far fewer numbers to find
BATCH = 256


class Autoencoder(Reconstruction):
    """z = f(x) and a reconstruction g(z), both gated networks, minimising a squared error or a cross-entropy.

    No likelihood, and no prior while it trains. ``autoencoder.prior`` mixture then fits Gaussians to the training
    codes, for there to be something to sample from: such samples are g of a draw from that mixture, without the noise
    of an observation, and log p(z) bounds nothing.

    >>> from training.config import LikelihoodConfig
    >>> config = ModelConfig(latent_dim=2, likelihood=LikelihoodConfig(family="squared_error"))
    >>> Autoencoder((1, 8, 8), config).decode(torch.zeros(3, 2)).mean.shape
    torch.Size([3, 1, 8, 8])
    """

    family = "autoencoder"
    title = "deterministic autoencoder"

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__(shape, config)
        self.encoder, features = build_encoder(shape, config.network)
        self.head = nn.Linear(features, config.latent_dim)
        self.decoder = build_decoder(config.latent_dim, shape, self.likelihood.raw, config.network)
        self.prior: Prior = NoPrior(config.latent_dim)
        if config.autoencoder.prior == "mixture":
            self.prior = FittedMixture(config.latent_dim, config.autoencoder.mixture)

    def code(self, target: Tensor) -> Tensor:
        z: Tensor = self.head(self.encoder(self.likelihood.network_input(target))).float()
        return z

    def decode(self, z: Tensor) -> Distribution:
        p: Distribution = self.likelihood(self.decoder(z))
        return p

    @torch.no_grad()
    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Start every reconstruction at the training mean."""
        initialise_head(self.decoder, self.likelihood, mean)

    @torch.no_grad()
    def finish(self, train: Rows, validation: Rows, seed: int) -> Iterator[str]:
        """Fit the mixture to the codes of the training rows, or of the first MAX_CODES of them."""
        if isinstance(self.prior, FittedMixture):
            batches = first_rows(train.batches(BATCH), MAX_CODES)
            codes = torch.cat([self.code(self.likelihood.target(x, None)) for x in batches])
            yield self.prior.fit(codes, seed)
