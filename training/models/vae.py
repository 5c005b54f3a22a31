"""The variational autoencoder (Kingma & Welling 2014; Rezende et al. 2014) with one stochastic layer."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from training.config import ModelConfig
from training.errors import ConfigError
from training.models.base import Encoded, LatentVariableModel, Statistics, Terms
from training.models.likelihoods import Parameters, build_likelihood, initialise_head
from training.models.posteriors import DiagonalGaussian, build_posterior, kl_to_standard_normal
from training.models.priors import StandardNormal, VampPrior, build_prior
from training.nn.networks import Shape, build_decoder, build_encoder


class VAE(LatentVariableModel):
    """p(z) by the prior, p(x|z) by the decoder and the likelihood, q(z|x) by the encoder and the posterior.

    >>> from training.config import ModelConfig
    >>> vae = VAE((1, 8, 8), ModelConfig(latent_dim=2))
    >>> vae.decode(torch.zeros(3, 2)).mean.shape
    torch.Size([3, 1, 8, 8])
    """

    family = "vae"
    title = "variational autoencoder"
    weighs_samples = True

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        self.latent_dim = config.latent_dim
        self.likelihood = build_likelihood(config.likelihood, shape)
        self.encoder, features = build_encoder(shape, config.network)
        self.posterior = build_posterior(config.posterior, features, config.latent_dim)
        self.posterior_family, self.moments = self.posterior.family, self.posterior.moments
        self.decoder = build_decoder(config.latent_dim, shape, self.likelihood.raw, config.network)
        if config.prior.family == "vamp" and config.likelihood.values == "reals":
            raise ConfigError("model.prior.family: 'vamp' learns pseudo-inputs in [0, 1], for pixels only; try 'flow'")
        self.prior = build_prior(config.prior, config.latent_dim, shape)

    @property
    def noise_dim(self) -> int:
        return self.posterior.noise_dim

    def train(self, mode: bool = True) -> Self:
        """As everywhere; in eval mode a VampPrior's components are constants, those of the weights at this moment."""
        super().train(mode)
        if not mode and isinstance(self.prior, VampPrior):
            with torch.no_grad():
                self._place_components(self.prior)
        return self

    def _place_components(self, prior: VampPrior) -> None:
        loc, scale = self.posterior.moments_of(self.infer(prior.pseudo_inputs().unflatten(1, self.shape)))
        prior.set_components(loc, scale)

    def infer(self, target: Tensor) -> Statistics:
        """Target [N,C,H,W] -> the parameters of q(z|x)."""
        return self.posterior(self.encoder(self.likelihood.network_input(target)))

    def parameters_at(self, z: Tensor) -> Parameters:
        return self.likelihood.parameters_from(self.decoder(z))

    def draw(self, target: Tensor, statistics: Statistics, noise: Tensor) -> Encoded:
        z, log_q = self.posterior.sample(statistics, noise)
        return Encoded(target, *self.posterior.moments_of(statistics), z, log_q)

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, detach_q: bool = False) -> Terms:
        target = self.likelihood.target(x, dither)
        statistics = self.infer(target)
        z, log_q = self.posterior.sample(statistics, noise)
        if detach_q:
            log_q = self.posterior.log_prob(tuple(value.detach() for value in statistics), z)
        if self.training and isinstance(self.prior, VampPrior):
            self._place_components(self.prior)
        parameters = self.parameters_at(z.flatten(0, 1))
        unflat = tuple(p.unflatten(0, z.shape[:2]) for p in parameters)
        log_p_x = self.likelihood.log_prob(target.unsqueeze(1), unflat).sum((-3, -2, -1))
        log_p_z, log_q = self.prior.log_prob(z).float(), log_q.float()
        return Terms(log_p_x, log_p_z, log_q, self._rate(statistics, log_q - log_p_z), z)

    def _rate(self, statistics: Statistics, sampled: Tensor) -> Tensor:
        """KL(q ‖ p): analytic by dimension [N,L] where it is known, else the mean of the sampled one, [N,1]."""
        if isinstance(self.prior, StandardNormal) and isinstance(self.posterior, DiagonalGaussian):
            return kl_to_standard_normal(*self.posterior.moments_of(statistics))
        return sampled.mean(1, keepdim=True)

    @torch.no_grad()
    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Start p(x) at the training mean (the decoder's last layer gets its bias), a VampPrior at training images."""
        if isinstance(self.prior, VampPrior):
            self.prior.start_at(examples.flatten(1))
        initialise_head(self.decoder, self.likelihood, mean)
