"""What bijections share: x and z are each other's image, log p(x|z) = 0, and log q(z|x) = −log |det ∂z/∂x|."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.config import ModelConfig
from training.errors import ConfigError
from training.models.base import Encoded, LatentVariableModel, Statistics, Terms
from training.models.likelihoods import build_likelihood
from training.nn.networks import Shape


class BijectiveModel(LatentVariableModel):
    """Base of models with as many latents as numbers; ``infer`` gives z [N,L] and log |det ∂z/∂x| [N] float64.

    Raises ConfigError: another likelihood than delta.
    """

    evidence = "exact"
    posterior_family = "deterministic"
    moments = "point"

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__()
        if (name := config.likelihood.family) != "delta":
            raise ConfigError(
                f"model.likelihood.family: the decoder of family {config.family!r} is its inverse: expected delta, "
                f"got {name}"
            )
        self.shape, self.latent_dim = shape, math.prod(shape)
        self.likelihood = build_likelihood(config.likelihood, shape)

    @property
    def noise_dim(self) -> int:
        """1, as the contract wants one; nothing depends on it."""
        return 1

    def draw(self, target: Tensor, statistics: Statistics, noise: Tensor) -> Encoded:
        z, log_det = statistics
        samples = z.unsqueeze(1) + 0 * noise  # K copies, and the noise stays an input of the graph
        log_q = -log_det.unsqueeze(1) + 0 * noise[..., 0].double()
        return Encoded(target, z, torch.zeros_like(z), samples, log_q)

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, detach_q: bool = False) -> Terms:
        """The terms, K copies each; log q is what is learned, so ``detach_q`` changes nothing."""
        z, log_det = self.infer(self.likelihood.target(x, dither))
        log_q, log_p_z = (-log_det).unsqueeze(1), self.prior.log_prob(z).unsqueeze(1)
        copies = (-1, noise.shape[1])
        return Terms(
            log_p_x=torch.zeros_like(log_q.float()).expand(copies),
            log_p_z=log_p_z.float().expand(copies),
            log_q=log_q.float().expand(copies),
            kl=(log_q - log_p_z).float(),
            z=z.unsqueeze(1).expand(-1, noise.shape[1], -1),
        )
