"""What every model here is: an encoder q(z|x), a decoder p(x|z), a prior p(z), and log p(x), a bound on it, or neither.

Shapes: N images, K posterior samples an image, M latents, L latent dimensions, E noise numbers a sample, C×H×W numbers
an image (vectors are 1×1×D, signals C×1×T). The methods mirror the graphs of service.bundle.manifest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from training.data.dataset import Dataset
from training.models.likelihoods import Likelihood, Parameters
from training.models.priors import Prior
from training.nn.networks import Shape

Statistics = tuple[Tensor, ...]
"""What the encoder makes of a target, before any noise: the parameters of q(z|x), each [N,…]."""


class Encoded(NamedTuple):
    """Outputs of encoder.onnx; see service.bundle.manifest."""

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
    """What an objective needs, float32, nats: three log densities [N,K], the rate by group [N,G], z [N,K,L].

    ``kl`` is KL(q ‖ p): analytic, by latent dimension (G = L), where both are diagonal Gaussians; analytic, by layer,
    in a ladder; otherwise log q − log p averaged over the samples (G = 1).
    """

    log_p_x: Tensor
    log_p_z: Tensor
    log_q: Tensor
    kl: Tensor
    z: Tensor


class LatentVariableModel(nn.Module, ABC):
    """Base of all families; ``evidence``, ``posterior_family`` and ``moments`` are the manifest's words.

    ``title``: the family in words. ``convolutional``: its networks are convolutions whatever ``model.network.kind``
    says. ``leaves_axes_out``: it keeps fewer axes than the data have, or its residual is rounding.
    ``weighs_samples``: its objective may be a bound of several weighted posterior samples. ``kl_groups``: what the
    groups of Terms.kl are.

    ``closed_form`` models are solved by ``finish`` alone; the others are trained by gradient on ``forward``'s terms,
    and may add in ``finish`` what is fitted once the weights stand.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    evidence: Literal["bound", "exact", "none"] = "bound"
    posterior_family: str = "diagonal_gaussian"
    moments: Literal["exact", "base", "point"] = "exact"
    closed_form: ClassVar[bool] = False
    convolutional: ClassVar[bool] = False
    leaves_axes_out: ClassVar[bool] = False
    weighs_samples: ClassVar[bool] = False
    kl_groups: ClassVar[Literal["dimension", "layer"]] = "dimension"

    shape: Shape
    latent_dim: int
    likelihood: Likelihood
    prior: Prior

    @property
    @abstractmethod
    def noise_dim(self) -> int:
        """Standard normal numbers E that one posterior sample takes."""

    @abstractmethod
    def infer(self, target: Tensor) -> Statistics:
        """Target [N,C,H,W] -> the parameters of q(z|x)."""

    @abstractmethod
    def draw(self, target: Tensor, statistics: Statistics, noise: Tensor) -> Encoded:
        """Posterior parameters and noise [N,K,E] -> Encoded, log q in float64."""

    @abstractmethod
    def parameters_at(self, z: Tensor) -> Parameters:
        """Latents [M,L] -> likelihood parameters, each [M,C,H,W]."""

    @abstractmethod
    def forward(self, x: Tensor, noise: Tensor, dither: Tensor | None = None, detach_q: bool = False) -> Terms:
        """The terms of an objective at K = noise.shape[1] samples.

        ``detach_q`` evaluates log q with its parameters held constant, so that its gradient flows through z alone
        (sticking the landing, Roeder et al. 2017; DReG, Tucker et al. 2019).
        """

    def encode(self, x: Tensor, noise: Tensor, dither: Tensor | None = None) -> Encoded:
        """Values x [N,C,H,W] (pixels in [0,1]), noise [N,K,E], dither [N,C,H,W] -> Encoded."""
        target = self.likelihood.target(x, dither)
        return self.draw(target, self.infer(target), noise)

    def decode(self, z: Tensor) -> Decoded:
        """Latents [M,L] -> Decoded."""
        parameters = self.parameters_at(z)
        return Decoded(self.likelihood.mean(parameters), parameters)

    def density(self, target: Tensor, z: Tensor, parameters: Parameters) -> Density:
        """Target [N,C,H,W], z [N,K,L], parameters each [N,K,C,H,W] -> Density."""
        log_p_x_map = self.likelihood.log_prob(target.unsqueeze(1), parameters)
        return Density(self.likelihood.total(log_p_x_map), log_p_x_map, self.prior.log_prob(z))

    def observe(self, parameters: Parameters, noise: Tensor) -> Tensor:
        """Parameters and noise, each [M,C,H,W] -> a draw x ~ p(x|z) [M,C,H,W]."""
        return self.likelihood.sample(parameters, noise)

    def initialise(self, mean: Tensor, examples: Tensor) -> None:
        """Start from the training mean [C,H,W] and some training images [B,C,H,W]."""

    def finish(self, dataset: Dataset, seed: int, say: Callable[[str], None]) -> None:
        """Fit on the training split what gradients do not; ``say`` reports progress in words."""
