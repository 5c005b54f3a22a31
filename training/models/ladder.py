"""The hierarchical VAE: several stochastic layers at several resolutions; its parts are in nn.ladder_blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.errors import ConfigError
from training.models.base import Encoded, LatentVariableModel, Statistics, Terms
from training.models.likelihoods import Parameters, build_likelihood
from training.models.posteriors import HALF_LOG_2PI, kl_to_standard_normal, log_normal
from training.models.priors import Prior
from training.nn.ladder_blocks import BottomUp, Normal, PosteriorLayer, TopDown
from training.nn.networks import Shape, Upsample


def flattened(parts: list[Tensor]) -> Tensor:
    """Every layer's [M,c,h,w] -> [M,L], top first."""
    return torch.cat([part.flatten(1) for part in parts], 1)


class LadderPrior(Prior):
    """p(z) = Π_i N(z_i; loc_i(z_{>i}), scale_i(z_{>i})²), a pass down the network that the decoder goes down too."""

    family = "ladder"

    def __init__(self, top_down: TopDown) -> None:
        super().__init__()
        self.top_down = top_down
        self.noise_dim = sum(top_down.sizes)

    def log_prob(self, z: Tensor) -> Tensor:
        layers = self.top_down.split(z.reshape(-1, self.noise_dim))
        found: list[Tensor] = []

        def choose(i: int, h: Tensor, prior: Normal) -> Tensor:
            found.append(log_normal(layers[i], *prior))
            return layers[i]

        self.top_down(layers[0].shape[0], choose)
        return flattened(found).double().sum(-1).reshape(z.shape[:-1])

    def sample(self, noise: Tensor, choice: Tensor | None = None) -> Tensor:
        layers = self.top_down.split(noise)
        drawn: list[Tensor] = []

        def choose(i: int, h: Tensor, prior: Normal) -> Tensor:
            drawn.append(prior.loc + prior.scale * layers[i])
            return drawn[i]

        self.top_down(noise.shape[0], choose)
        return flattened(drawn)

    def features(self, z: Tensor) -> Tensor:
        """Latents [M,L] -> features [M,w,h,w'] at the end of the pass."""
        layers = self.top_down.split(z)
        h: Tensor = self.top_down(z.shape[0], lambda i, h, prior: layers[i])
        return h


class Descent:
    """What is noted on the way down the posterior, for each layer [M,c,h,w], top first; nats by element."""

    def __init__(self) -> None:
        self.z: list[Tensor] = []
        self.scale: list[Tensor] = []
        self.log_p: list[Tensor] = []
        self.log_q: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.h: Tensor

    def note(self, prior: Normal, relative: Normal, noise: Tensor) -> Tensor:
        """Draw z_i = loc + scale·u, u = δ + s·ε, with the densities of the draw; p and q share the factor ``scale``."""
        u = relative.loc + relative.scale * noise
        log_volume = torch.log(prior.scale) + HALF_LOG_2PI
        z = prior.loc + prior.scale * u
        self.z.append(z)
        self.scale.append(prior.scale * relative.scale)
        self.log_p.append(-0.5 * u**2 - log_volume)
        self.log_q.append(-0.5 * noise**2 - torch.log(relative.scale) - log_volume)
        self.kl.append(kl_to_standard_normal(*relative))
        return z


class Ladder(LatentVariableModel):
    """q(z|x) = Π_i q(z_i|z_{>i}, x), drawn on one way down with features of the way up; z is all layers, top first.

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
        self.likelihood = build_likelihood(config.likelihood, shape)
        if self.likelihood.family == "delta" or self.likelihood.measure == "none":
            raise ConfigError(
                f"model.likelihood.family: a ladder bounds log p(x), of which {self.likelihood.family!r} is none"
            )
        top_down = TopDown(shape, config.ladder)
        self.prior: LadderPrior = LadderPrior(top_down)
        self.latent_dim = self.prior.noise_dim
        self.bottom_up = BottomUp(shape[0], config.ladder)
        self.levels = [layer.level for layer in top_down.layer_shapes]
        self.posteriors = nn.ModuleList(PosteriorLayer(layer) for layer in top_down.layer_shapes)
        raw = (self.likelihood.raw, shape[0])
        self.head = Upsample(config.ladder.channels[0], raw[0] * raw[1], shape[1:])
        self.bias = nn.Parameter(torch.zeros(*raw, *shape[1:]))

    @property
    def noise_dim(self) -> int:
        return self.latent_dim

    def infer(self, target: Tensor) -> Statistics:
        """Target [N,C,H,W] -> what each layer's posterior takes from the way up, [N,2w,h,w] each, top first."""
        features = self.bottom_up(self.likelihood.network_input(target))
        return tuple(self._posterior(i).lateral(features[level]) for i, level in enumerate(self.levels))

    def _posterior(self, i: int) -> PosteriorLayer:
        layer = self.posteriors[i]
        assert isinstance(layer, PosteriorLayer)
        return layer

    def _descend(self, statistics: Statistics, noise: Tensor) -> Descent:
        """Noise [N,K,L] -> the way down of all N·K rows."""
        samples, descent = noise.shape[1], Descent()
        layers = self.prior.top_down.split(noise.flatten(0, 1))
        laterals = [part.unsqueeze(1).expand(-1, samples, -1, -1, -1).flatten(0, 1) for part in statistics]

        def choose(i: int, h: Tensor, prior: Normal) -> Tensor:
            return descent.note(prior, self._posterior(i)(h, laterals[i]), layers[i])

        descent.h = self.prior.top_down(layers[0].shape[0], choose)
        return descent

    def _parameters_of(self, h: Tensor) -> Parameters:
        raw = self.head(h).float().unflatten(1, self.bias.shape[:2])
        return self.likelihood.parameters_from(raw + self.bias)

    def parameters_at(self, z: Tensor) -> Parameters:
        return self._parameters_of(self.prior.features(z))

    def draw(self, target: Tensor, statistics: Statistics, noise: Tensor) -> Encoded:
        """The path of zero noise goes down beside the K draws, as one more of them."""
        paths = torch.cat([torch.zeros_like(noise[:, :1]), noise], 1)
        descent = self._descend(statistics, paths)
        z, scale, log_q = (
            flattened(parts).unflatten(0, paths.shape[:2]) for parts in (descent.z, descent.scale, descent.log_q)
        )
        return Encoded(target, z[:, 0], scale[:, 0], z[:, 1:], log_q[:, 1:].double().sum(-1))

    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, detach_q: bool = False) -> Terms:
        """See the base; raises ConfigError for ``detach_q``, which a chain of conditionals has no use for."""
        if detach_q:
            raise ConfigError("a ladder's log q has no parameters that could be held constant while its z move")
        target = self.likelihood.target(x, dither)
        descent = self._descend(self.infer(target), noise)
        rows = noise.shape[:2]
        parameters = tuple(p.unflatten(0, rows) for p in self._parameters_of(descent.h))
        log_p_x = self.likelihood.log_prob(target.unsqueeze(1), parameters).sum((-3, -2, -1))
        log_p_z, log_q, z = (flattened(parts).unflatten(0, rows) for parts in (descent.log_p, descent.log_q, descent.z))
        kl = torch.stack([part.flatten(1).sum(1) for part in descent.kl], 1).unflatten(0, rows).mean(1)
        return Terms(log_p_x, log_p_z.sum(-1), log_q.sum(-1), kl, z)

    @torch.no_grad()
    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Start p(x) at the training mean."""
        self.likelihood.initialise(self.bias.view(-1), mean)
