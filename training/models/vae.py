"""The variational autoencoder (Kingma & Welling 2014; Rezende et al. 2014) with one stochastic layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.likelihoods import Parameters, build_likelihood
from training.networks import Shape, build_decoder, build_encoder
from training.posteriors import DiagonalGaussian, kl_to_standard_normal, log_normal, reparameterise
from training.priors import log_standard_normal


class Encoded(NamedTuple):
    """Outputs of encoder.onnx; see service.bundle."""

    target: Tensor
    loc: Tensor
    scale: Tensor
    z: Tensor
    log_q: Tensor


class Decoded(NamedTuple):
    """Outputs of decoder.onnx: E[x|z] [M,C,H,W] and the likelihood's parameters, each [M,C,H,W]."""

    mean: Tensor
    parameters: Parameters


class Density(NamedTuple):
    """Outputs of density.onnx: log p(x|z) [N,K] float64, by pixel [N,K,C,H,W] float32, log p(z) [N,K] float64."""

    log_p_x: Tensor
    log_p_x_map: Tensor
    log_p_z: Tensor


class Terms(NamedTuple):
    """What an objective needs, float32, nats: three log densities [N,K], analytic KL by dimension [N,L], z [N,K,L]."""

    log_p_x: Tensor
    log_p_z: Tensor
    log_q: Tensor
    kl: Tensor
    z: Tensor


class VAE(nn.Module):
    """p(z) = N(0, I), p(x|z) by the decoder, q(z|x) = N(loc(x), diag(scale(x)²)).

    >>> from training.config import ModelConfig
    >>> vae = VAE((1, 8, 8), ModelConfig(latent_dim=2))
    >>> vae.decode(torch.zeros(3, 2)).mean.shape
    torch.Size([3, 1, 8, 8])
    """

    family = "vae"

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        self.latent_dim = config.latent_dim
        self.likelihood = build_likelihood(config.likelihood)
        self.encoder, features = build_encoder(shape, config.network)
        self.posterior = DiagonalGaussian(features, config.latent_dim)
        self.decoder = build_decoder(config.latent_dim, shape, self.likelihood.raw, config.network)

    @property
    def noise_dim(self) -> int:
        """Standard normal numbers E that one posterior sample takes."""
        return self.posterior.noise_dim

    def infer(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Target [N,C,H,W] -> loc and scale of q(z|x), each [N,L]."""
        return self.posterior(self.encoder(2 * target - 1))

    def parameters_at(self, z: Tensor) -> Parameters:
        """Latents [M,L] -> likelihood parameters, each [M,C,H,W]."""
        return self.likelihood.parameters_from(self.decoder(z))

    def encode(self, x: Tensor, noise: Tensor, dither: Tensor | None = None) -> Encoded:
        """Pixels x [N,C,H,W] in [0,1], noise [N,K,E], dither [N,C,H,W] -> Encoded."""
        target = self.likelihood.target(x, dither)
        return self.draw(target, *self.infer(target), noise)

    @staticmethod
    def draw(target: Tensor, loc: Tensor, scale: Tensor, noise: Tensor) -> Encoded:
        """Posterior loc and scale [N,L] and noise [N,K,L] -> Encoded, with log q(z|x) by the change of variables."""
        z = reparameterise(loc, scale, noise)
        log_q = (log_standard_normal(noise) - torch.log(scale).unsqueeze(1)).double().sum(-1)
        return Encoded(target, loc, scale, z, log_q)

    def decode(self, z: Tensor) -> Decoded:
        """Latents [M,L] -> Decoded."""
        parameters = self.parameters_at(z)
        return Decoded(self.likelihood.mean(parameters), parameters)

    def density(self, target: Tensor, z: Tensor, parameters: Parameters) -> Density:
        """Target [N,C,H,W], z [N,K,L], parameters each [N,K,C,H,W] -> Density."""
        log_p_x_map = self.likelihood.log_prob(target.unsqueeze(1), parameters)
        log_p_x = log_p_x_map.sum((-3, -2, -1), dtype=torch.float64)
        return Density(log_p_x, log_p_x_map, log_standard_normal(z).double().sum(-1))

    def observe(self, parameters: Parameters, noise: Tensor) -> Tensor:
        """Parameters and noise, each [M,C,H,W] -> a draw x ~ p(x|z) [M,C,H,W] in [0,1]."""
        return self.likelihood.sample(parameters, noise)

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, detach_q: bool = False) -> Terms:
        """The terms of an objective at K = noise.shape[1] samples.

        ``detach_q`` evaluates log q with its parameters held constant, so that its gradient flows through z alone
        (sticking the landing, Roeder et al. 2017; DReG, Tucker et al. 2019).
        """
        target = self.likelihood.target(x, dither)
        loc, scale = self.infer(target)
        z = reparameterise(loc, scale, noise)
        parameters = self.parameters_at(z.flatten(0, 1))
        unflat = tuple(p.unflatten(0, z.shape[:2]) for p in parameters)
        log_p_x = self.likelihood.log_prob(target.unsqueeze(1), unflat).sum((-3, -2, -1))
        q = (loc.detach(), scale.detach()) if detach_q else (loc, scale)
        log_q = log_normal(z, q[0].unsqueeze(1), q[1].unsqueeze(1)).sum(-1)
        return Terms(log_p_x, log_standard_normal(z).sum(-1), log_q, kl_to_standard_normal(loc, scale), z)

    @torch.no_grad()
    def initialise(self, mean: Tensor) -> None:
        """Start p(x) at the training mean [C,H,W] in [0,1]: the decoder's last layer gets its bias."""
        head = [m for m in self.decoder.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        if head.bias is None:
            return
        if isinstance(head, nn.Conv2d):  # one bias for the four sub-pixels and all positions of a channel
            mean = mean.mean((-2, -1)).repeat_interleave(head.out_channels // self.likelihood.raw // self.shape[0])
        self.likelihood.initialise(head.bias, mean)
