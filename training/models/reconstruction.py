"""What deterministic models share: an encoder that is a function, and a reconstruction error in place of log p(x|z)."""

from __future__ import annotations

import torch
from torch import Tensor

from training.config import ModelConfig
from training.errors import ConfigError
from training.models.base import Encoded, LatentVariableModel, Statistics, Terms
from training.models.likelihoods import FAMILIES, build_likelihood
from training.nn.networks import Shape


class Reconstruction(LatentVariableModel):
    """Base of models with one code z an example: every posterior sample is a copy of it, and there is no evidence.

    Raises ConfigError: a likelihood where a reconstruction error is expected.
    """

    evidence = "none"
    posterior_family = "deterministic"
    moments = "point"

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        self.latent_dim = config.latent_dim
        self.likelihood = build_likelihood(config.likelihood, shape)
        if self.likelihood.measure != "none":
            errors = " or ".join(name for name, cls in FAMILIES.items() if cls.measure == "none")
            raise ConfigError(
                f"model.likelihood.family: a model of family {config.family!r} is trained on a reconstruction error, "
                f"expected {errors}, got {config.likelihood.family!r}"
            )

    @property
    def noise_dim(self) -> int:
        """1, as the contract wants one; nothing depends on it."""
        return 1

    def draw(self, target: Tensor, statistics: Statistics, noise: Tensor) -> Encoded:
        """The code [N,L] as ``loc`` and K times as z; scale and log q are 0."""
        (z,) = statistics
        samples = z.unsqueeze(1) + 0 * noise  # K copies, and the noise stays an input of the graph
        return Encoded(target, z, torch.zeros_like(z), samples, 0 * noise[..., 0].double())

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, detach_q: bool = False) -> Terms:
        """log_p_x is minus the error, of one z an example however many are asked for; the other terms are 0."""
        target = self.likelihood.target(x, dither)
        (z,) = self.infer(target)
        errors = self.likelihood.log_prob(target, self.parameters_at(z)).sum((-3, -2, -1)).unsqueeze(1)
        nothing = torch.zeros_like(errors)
        copies = (-1, noise.shape[1])
        return Terms(
            log_p_x=errors.expand(copies),
            log_p_z=nothing.expand(copies),
            log_q=nothing.expand(copies),
            kl=nothing,
            z=z.unsqueeze(1).expand(*copies, -1),
        )
