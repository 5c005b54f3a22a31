"""The hierarchical VAE: several stochastic layers at several resolutions; its parts are in nn.ladder_blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.distributions import Distribution, Draw, Normal, Posterior, standard_normal_log_prob, unflattened
from training.errors import ConfigError
from training.models.base import KL, LatentVariableModel, Terms
from training.models.likelihoods import build_density
from training.models.priors import Prior
from training.nn.ladder_blocks import BottomUp, PosteriorLayer, TopDown
from training.nn.networks import Shape, Upsample


def flattened(parts: list[Tensor]) -> Tensor:
    """Every layer's [M,c,h,w'] -> [M,L], top first."""
    return torch.cat([part.flatten(1) for part in parts], 1)


class LadderPrior(Prior):
    """p(z) = Π_i N(z_i; loc_i(z_{>i}), scale_i(z_{>i})²), by a pass down the network that the decoder shares."""

    family = "ladder"

    def __init__(self, top_down: TopDown) -> None:
        super().__init__(sum(top_down.sizes))
        self.top_down = top_down

    def log_prob(self, z: Tensor) -> Tensor:
        layers = self.top_down.split(z.reshape(-1, self.noise_dim))
        log_p: list[Tensor] = []

        def choose(i: int, h: Tensor, prior: Normal) -> Tensor:
            log_p.append(prior.log_prob(layers[i]))
            return layers[i]

        self.top_down(layers[0].shape[0], choose)
        return flattened(log_p).double().sum(-1).reshape(z.shape[:-1])

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        layers = self.top_down.split(noise)
        drawn: list[Tensor] = []

        def choose(i: int, h: Tensor, prior: Normal) -> Tensor:
            drawn.append(prior.sample(layers[i]))
            return drawn[i]

        self.top_down(noise.shape[0], choose)
        return flattened(drawn)

    def features(self, z: Tensor) -> Tensor:
        """Latents [M,L] -> features [M,w,h,w'] at the end of the pass."""
        layers = self.top_down.split(z)
        h: Tensor = self.top_down(z.shape[0], lambda i, h, prior: layers[i])
        return h


class Descent:
    """One pass down the posterior: each layer's z [M,c,h,w'], top first, q's scale there, and log densities in nats.

    ``h`` [M,w,h,w'] are the features at the end of the pass, which the image is decoded from.
    """

    def __init__(self) -> None:
        self.z: list[Tensor] = []
        self.scale: list[Tensor] = []
        self.log_p_z: list[Tensor] = []
        self.log_q_z: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.h: Tensor

    def draw(self, prior: Normal, relative: Normal, noise: Tensor) -> Tensor:
        """z_i = loc + scale·u with u ~ N(δ, s²) = ``relative``: p and q share the factor ``scale`` of the prior."""
        u = relative.sample(noise)
        z = prior.sample(u)
        log_scale = torch.log(prior.scale)
        self.z.append(z)
        self.scale.append(prior.scale * relative.scale)
        self.log_p_z.append(standard_normal_log_prob(u) - log_scale)
        self.log_q_z.append(relative.log_prob_of_draw(noise) - log_scale)
        self.kl.append(relative.kl_to_standard())
        return z


class LadderPosterior(Posterior):
    """q(z|x) = Π_i q(z_i|z_{>i}, x): layers from the top down, each with its features of the pass up, [N,2w,h,w'].

    ``loc`` [N,L] is the path of zero noise, ``scale`` q's deviations along it.
    """

    def __init__(self, top_down: TopDown, layers: list[PosteriorLayer], laterals: list[Tensor]) -> None:
        self._top_down, self._layers, self._laterals = top_down, layers, laterals

    def descend(self, noise: Tensor) -> Descent:
        """Noise [N,K,L] -> one pass down with all N·K rows."""
        samples, descent = noise.shape[1], Descent()
        layers = self._top_down.split(noise.flatten(0, 1))
        laterals = [part.unsqueeze(1).expand(-1, samples, -1, -1, -1).flatten(0, 1) for part in self._laterals]

        def choose(i: int, h: Tensor, prior: Normal) -> Tensor:
            return descent.draw(prior, self._layers[i](h, laterals[i]), layers[i])

        descent.h = self._top_down(layers[0].shape[0], choose)
        return descent

    def rsample(self, noise: Tensor) -> Draw:
        descent = self.descend(noise)
        z, log_q_z = (flattened(parts).unflatten(0, noise.shape[:2]) for parts in (descent.z, descent.log_q_z))
        return Draw(z, log_q_z.double().sum(-1))

    @property
    def loc(self) -> Tensor:  # type: ignore[override]  # computed, and never set
        """z of zero noise [N,L]."""
        return flattened(self._along_zero_noise().z)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Standard deviations of q along the path of zero noise [N,L]."""
        return flattened(self._along_zero_noise().scale)

    def _along_zero_noise(self) -> Descent:
        rows = self._laterals[0]
        return self.descend(rows.new_zeros(len(rows), 1, sum(self._top_down.sizes)))

    def with_moments(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """loc, scale, z, log q(z|x) as the base's, by one descent: the path of zero noise is an extra sample."""
        paths = torch.cat([torch.zeros_like(noise[:, :1]), noise], 1)
        descent = self.descend(paths)
        z, scale, log_q_z = (
            flattened(parts).unflatten(0, paths.shape[:2]) for parts in (descent.z, descent.scale, descent.log_q_z)
        )
        return z[:, 0], scale[:, 0], z[:, 1:], log_q_z[:, 1:].double().sum(-1)


class Ladder(LatentVariableModel):
    """A hierarchical VAE, q(z|x) = Π_i q(z_i|z_{>i}, x) on the pass down that p(z) takes; z is all layers, top first.

    ``loc`` is the path of zero noise and ``scale`` q's deviations along it. ``kl`` is analytic in each layer at the
    parents drawn, averaged over the K samples: [N, layers]. Raises ConfigError: no likelihood, or too small an image.

    >>> from training.config import LadderConfig
    >>> ladder = Ladder((1, 8, 8), ModelConfig(family="ladder", ladder=LadderConfig(latents=[1, 2], layers=[1, 1])))
    >>> ladder.latent_dim, ladder.decode(torch.zeros(3, 24)).mean.shape
    (24, torch.Size([3, 1, 8, 8]))
    """

    family = "ladder"
    title = "hierarchical variational autoencoder"
    convolutional = True
    weighs_samples = True
    kl_groups = "layer"
    posterior_family = "ladder"
    moments = "base"

    def __init__(self, shape: Shape, config: ModelConfig) -> None:
        super().__init__()
        self.shape = shape
        self.likelihood = build_density(config.likelihood, shape)
        top_down = TopDown(shape, config.ladder)
        self.prior: LadderPrior = LadderPrior(top_down)
        self.latent_dim = self.noise_dim = self.prior.noise_dim
        self.bottom_up = BottomUp(shape[0], config.ladder)
        self.levels = [layer.level for layer in top_down.layer_shapes]
        self.posteriors = nn.ModuleList(PosteriorLayer(layer) for layer in top_down.layer_shapes)
        raw = (self.likelihood.raw, shape[0])
        self.head = Upsample(config.ladder.channels[0], raw[0] * raw[1], shape[1:])
        self.bias = nn.Parameter(torch.zeros(*raw, *shape[1:]))

    def encode(self, target: Tensor) -> LadderPosterior:
        features = self.bottom_up(self.likelihood.network_input(target))
        layers = [layer for layer in self.posteriors if isinstance(layer, PosteriorLayer)]
        laterals = [layer.lateral(features[level]) for layer, level in zip(layers, self.levels, strict=True)]
        return LadderPosterior(self.prior.top_down, layers, laterals)

    def _decode_features(self, h: Tensor) -> Distribution:
        raw = self.head(h).float().unflatten(1, self.bias.shape[:2])
        p: Distribution = self.likelihood(raw + self.bias)
        return p

    def decode(self, z: Tensor) -> Distribution:
        return self._decode_features(self.prior.features(z))

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, stop_gradient_q: bool = False) -> Terms:
        """The terms of an objective as the base has them, all in float32, by one pass down.

        Raises ConfigError for ``stop_gradient_q``: the parameters of a layer's q depend on the z of those above.
        """
        if stop_gradient_q:
            raise ConfigError("a ladder's log q has no parameters that could be held constant while its z move")
        target = self.likelihood.target(x, dither)
        descent, rows = self.encode(target).descend(noise), noise.shape[:2]
        p = unflattened(self._decode_features(descent.h), rows)
        log_p_x_given_z = self.likelihood.log_prob(target.unsqueeze(1), p).sum((-3, -2, -1))
        log_p_z, log_q_z, z = (
            flattened(parts).unflatten(0, rows) for parts in (descent.log_p_z, descent.log_q_z, descent.z)
        )
        kl = torch.stack([part.flatten(1).sum(1) for part in descent.kl], 1).unflatten(0, rows).mean(1)
        return Terms(log_p_x_given_z, log_p_z.sum(-1), log_q_z.sum(-1), KL(kl, analytic=True), z)

    @torch.no_grad()
    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Start p(x) at the training mean."""
        self.likelihood.initialise(self.bias.view(-1), mean)
