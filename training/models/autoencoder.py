"""The deterministic autoencoder (Hinton & Salakhutdinov 2006) with a prior fitted afterwards (Ghosh et al. 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.data.batches import pixel_batches
from training.data.dataset import Dataset
from training.models.base import Statistics
from training.models.likelihoods import Parameters, initialise_head
from training.models.mixtures import MixturePrior
from training.models.priors import NoPrior, Prior
from training.models.reconstruction import Reconstruction
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
            self.prior = MixturePrior(config.latent_dim, config.autoencoder.mixture)

    def infer(self, target: Tensor) -> Statistics:
        """Target [N,C,H,W] -> the code [N,L]."""
        return (self.head(self.encoder(self.likelihood.network_input(target))).float(),)

    def parameters_at(self, z: Tensor) -> Parameters:
        return self.likelihood.parameters_from(self.decoder(z))

    @torch.no_grad()
    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Start every reconstruction at the training mean."""
        initialise_head(self.decoder, self.likelihood, mean)

    @torch.no_grad()
    def finish(self, dataset: Dataset, seed: int, say: Callable[[str], None]) -> None:
        """Fit the mixture to the codes of the training split, or of its first MAX_CODES."""
        if isinstance(self.prior, MixturePrior):
            say(self.prior.fit(self._codes(dataset), seed))

    def _codes(self, dataset: Dataset) -> Tensor:
        indices = dataset.splits["train"][:MAX_CODES]
        batches = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
        return torch.cat([self.infer(self.likelihood.target(x, None))[0] for x in pixel_batches(dataset, batches)])
