"""The variational autoencoder (Kingma & Welling 2014; Rezende et al. 2014) with one stochastic layer."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from training.config import ModelConfig
from training.distributions import DiagonalGaussianPosterior, Distribution, Normal, Posterior
from training.errors import ConfigError
from training.models.base import KL, LatentVariableModel, Terms
from training.models.likelihoods import build_density, initialise_head
from training.models.posteriors import build_posterior
from training.models.priors import StandardNormal, VampPrior, build_prior
from training.nn.networks import Shape, build_decoder, build_encoder


class VAE(LatentVariableModel):
    """p(z) by the prior, p(x|z) by the decoder and the likelihood, q(z|x) by the encoder and the posterior.

    Raises ConfigError: a likelihood without a density, or a prior that is not for such rows.

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
        self.likelihood = build_density(config.likelihood, shape)
        self.encoder, features = build_encoder(shape, config.network)
        self.posterior = build_posterior(config.posterior, features, config.latent_dim)
        self.posterior_family, self.moments = self.posterior.family, self.posterior.moments
        self.noise_dim = self.posterior.noise_dim
        self.decoder = build_decoder(config.latent_dim, shape, self.likelihood.raw, config.network)
        if config.prior.family == "vamp" and config.likelihood.values == "reals":
            raise ConfigError("model.prior.family: 'vamp' learns pseudo-inputs in [0, 1], for pixels only; try 'flow'")
        self.prior = build_prior(config.prior, config.latent_dim, shape)

    def train(self, mode: bool = True) -> Self:
        """Set train or eval mode; eval mode fixes a VampPrior's components at those of the present weights."""
        super().train(mode)
        if not mode and isinstance(self.prior, VampPrior):
            with torch.no_grad():
                self._set_components(self.prior)
        return self

    def _set_components(self, prior: VampPrior) -> None:
        q = self.encode(prior.pseudo_inputs().unflatten(1, self.shape))
        prior.set_components(q.loc, q.scale)

    def encode(self, target: Tensor) -> Posterior:
        q: Posterior = self.posterior(self.encoder(self.likelihood.network_input(target)))
        return q

    def decode(self, z: Tensor) -> Distribution:
        p: Distribution = self.likelihood(self.decoder(z))
        return p

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, stop_gradient_q: bool = False) -> Terms:
        """The terms of an objective as the base has them, log p(x|z) summed in float32."""
        target = self.likelihood.target(x, dither)
        q = self.encode(target)
        z, log_q_z = q.rsample(noise)
        if stop_gradient_q:
            log_q_z = q.stop_gradient().log_prob(z)
        if self.training and isinstance(self.prior, VampPrior):
            self._set_components(self.prior)
        p = self.decode_samples(z)
        log_p_x_given_z = self.likelihood.log_prob(target.unsqueeze(1), p).sum((-3, -2, -1))
        log_p_z, log_q_z = self.prior.log_prob(z).float(), log_q_z.float()
        return Terms(log_p_x_given_z, log_p_z, log_q_z, self._kl(q, log_q_z - log_p_z), z)

    def _kl(self, q: Posterior, sampled: Tensor) -> KL:
        """KL(q ‖ p), analytic by dimension where it is known, else the mean of the sampled log q − log p [N,K]."""
        if isinstance(self.prior, StandardNormal) and isinstance(q, DiagonalGaussianPosterior):
            return KL(Normal(q.loc, q.scale).kl_to_standard(), analytic=True)
        return KL(sampled.mean(1, keepdim=True), analytic=False)

    @torch.no_grad()
    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Start p(x) at the training mean (the decoder's last layer gets its bias), a VampPrior at training images."""
        if isinstance(self.prior, VampPrior):
            self.prior.start_at(examples.flatten(1))
        initialise_head(self.decoder, self.likelihood, mean)
