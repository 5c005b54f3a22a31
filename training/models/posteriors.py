"""Approximate posteriors: modules whose forward maps an encoder's features to the distribution q(z|x)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import PosteriorConfig
from training.distributions import (
    DiagonalGaussianPosterior,
    HouseholderPosterior,
    Posterior,
    Transform,
    TransformedPosterior,
    reflect,
)
from training.nn.masked import AutoregressiveNetwork
from training.nn.precision import full_precision

MIN_SLOPE = 1e-3
"""A planar step keeps at least so much of any length along w: float32 could not tell less from a lost dimension."""
PLANAR_SHIFT = math.log(math.e - 1)
"""softplus of it is 1."""
MAX_DIAGONAL = 0.995
"""Bound of |r_mm| and |r̃_mm| in a Sylvester step: its determinant's factors stay above 1 − 0.995² ≈ 0.01."""
GATE_BIAS = 2.0
"""IAF's gates start at σ(2) = 0.88, nearly open (Kingma et al. 2016, Section 4)."""


class PosteriorHead(nn.Module, ABC):
    """Features [N,F] -> q(z|x), drawn from ``noise_dim`` standard normal numbers E a sample.

    ``moments``: ``exact`` if loc and scale are mean and standard deviations, ``base`` if they are the image of the base
    distribution's mean and the base's deviations. ``evaluable``: log q can be had at any z, not only at a draw.
    """

    family: ClassVar[str]
    moments: ClassVar[Literal["exact", "base"]] = "exact"
    evaluable: ClassVar[bool] = False
    noise_dim: int

    @abstractmethod
    def forward(self, features: Tensor) -> Posterior:
        """Features [N,F] -> q(z|x), parameters float32."""


class DiagonalGaussian(PosteriorHead):
    """q(z|x) = N(loc, diag(scale²)), loc and scale by one linear head on the encoder's features [N,F]."""

    family = "diagonal_gaussian"
    evaluable = True

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, 2 * latent_dim)
        self.noise_dim = latent_dim

    def forward(self, features: Tensor) -> DiagonalGaussianPosterior:
        """Features [N,F] -> q with scale in (e^-7, e^3)."""
        loc, log_scale = self.head(features).float().chunk(2, -1)
        return DiagonalGaussianPosterior(loc, torch.exp(log_scale.clamp(-7, 3)))


class Householder(PosteriorHead):
    """q(z|x) = N(loc, Q diag(scale²) Qᵀ) with Q = H_V … H_1 and H_v = I − 2 v vᵀ / ‖v‖² (Tomczak & Welling 2016).

    The V vectors are linear in the encoder's features, not chained. Q is orthogonal, so |det Q| = 1. Starts as the
    diagonal Gaussian: reflections along the axes change signs of the noise only.
    """

    family = "householder"
    evaluable = True

    def __init__(self, features: int, latent_dim: int, vectors: int) -> None:
        super().__init__()
        self.noise_dim = latent_dim
        self.base = DiagonalGaussian(features, latent_dim)
        axes = torch.arange(vectors) % latent_dim
        self.vectors = constant_linear(features, F.one_hot(axes, latent_dim).float().flatten())

    def forward(self, features: Tensor) -> HouseholderPosterior:
        base: DiagonalGaussianPosterior = self.base(features)
        vectors = unit(self.vectors(features).float().unflatten(-1, (-1, self.noise_dim)))
        return HouseholderPosterior(base.loc, base.scale, vectors)


class FlowPosterior(PosteriorHead):
    """z_T = f_T ∘ … ∘ f_1(z_0) with z_0 ~ N(loc, diag(scale²)); parameters of the steps depend on x."""

    moments = "base"

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.noise_dim = latent_dim
        self.base = DiagonalGaussian(features, latent_dim)

    @abstractmethod
    def transform(self, features: Tensor) -> Transform:
        """Features [N,F] -> the T steps, parameters float32."""

    def forward(self, features: Tensor) -> TransformedPosterior:
        return TransformedPosterior(self.base(features), self.transform(features))


@dataclass(frozen=True, eq=False)
class PlanarTransform(Transform):
    """T steps z + û tanh(wᵀz + b): û and w [N,T,L], b and the slope 1 + wᵀû [N,T,1]."""

    u: Tensor
    w: Tensor
    b: Tensor
    slope: Tensor

    def call_and_ladj(self, z: Tensor) -> tuple[Tensor, Tensor]:
        factors = []
        for t in range(self.u.shape[1]):
            u, w, b, slope = (value[:, t].unsqueeze(1) for value in (self.u, self.w, self.b, self.slope))
            h = torch.tanh((z * w).sum(-1, keepdim=True) + b)
            z = z + u * h
            factors.append(h**2 + (1 - h**2) * slope)  # 1 + (1 − h²) wᵀû, without a difference that could vanish
        return z, torch.log(torch.cat(factors, -1)).double().sum(-1)


class Planar(FlowPosterior):
    """f(z) = z + û tanh(wᵀz + b), û the u for which f is invertible (Rezende & Mohamed 2015, eq. 10 and App. A.1).

    û = u + (m(wᵀu) − wᵀu) w / ‖w‖² has wᵀû = m(wᵀu) > −1. Unlike the paper's, this m, a shifted softplus, has m(0) = 0:
    u = 0, where training starts, is the identity, and û stays small where w is.
    """

    family = "planar"

    def __init__(self, features: int, latent_dim: int, steps: int) -> None:
        super().__init__(features, latent_dim)
        self.steps = steps
        self.shift = constant_linear(features, torch.zeros(steps * latent_dim))
        self.direction = nn.Linear(features, steps * latent_dim)
        nn.init.normal_(self.direction.bias, 0.0, latent_dim**-0.5)  # so that wᵀz is of order one
        self.offset = nn.Linear(features, steps)

    def transform(self, features: Tensor) -> PlanarTransform:
        u = self.shift(features).float().unflatten(-1, (self.steps, -1))
        w = self.direction(features).float().unflatten(-1, (self.steps, -1))
        along = (w * u).sum(-1, keepdim=True)
        slope = MIN_SLOPE + (1 - MIN_SLOPE) * F.softplus(along + PLANAR_SHIFT)
        squared = (w**2).sum(-1, keepdim=True).clamp(min=1e-12)
        b = self.offset(features).float().unsqueeze(-1)
        return PlanarTransform(u + (slope - 1 - along) * w / squared, w, b, slope)


@dataclass(frozen=True, eq=False)
class SylvesterTransform(Transform):
    """T steps z + Q R tanh(R̃ Qᵀz + b): Q [N,T,L,M], R and R̃ [N,T,M,M], b and r_mm·r̃_mm [N,T,M]."""

    frames: Tensor
    upper: Tensor
    other: Tensor
    b: Tensor
    diagonal: Tensor

    def call_and_ladj(self, z: Tensor) -> tuple[Tensor, Tensor]:
        factors = []
        parameters = (self.frames, self.upper, self.other, self.b, self.diagonal)
        with full_precision(z):
            for t in range(self.frames.shape[1]):
                frame, upper, other, b, diagonal = (value[:, t] for value in parameters)
                h = torch.tanh(z @ frame @ other.transpose(-2, -1) + b.unsqueeze(1))
                z = z + h @ upper.transpose(-2, -1) @ frame.transpose(-2, -1)
                factors.append(1 + (1 - h**2) * diagonal.unsqueeze(1))
            return z, torch.log(torch.cat(factors, -1)).double().sum(-1)


class Sylvester(FlowPosterior):
    """f(z) = z + Q R tanh(R̃ Qᵀz + b), R and R̃ [M,M] upper triangular (van den Berg et al. 2018).

    |det ∂f/∂z| = Π_m (1 + tanh′_m r_mm r̃_mm), and |r_mm r̃_mm| < 1 makes f invertible. Q [L,M] are the first M
    columns of a product of Householder reflections, so orthonormal to rounding. Starts as the identity,
    with R = 0.
    """

    family = "sylvester"

    def __init__(self, features: int, latent_dim: int, steps: int, rank: int, vectors: int) -> None:
        super().__init__(features, latent_dim)
        self.steps, self.rank = steps, min(rank, latent_dim)
        self.vectors = constant_linear(features, torch.randn(steps * vectors * latent_dim))
        self.triangles = constant_linear(features, torch.zeros(steps * self.rank**2))
        start = torch.zeros(steps, 3, self.rank)
        start[:, 1] = 1.0  # r̃_mm: with R̃ at zero as well nothing would have a gradient
        self.rest = constant_linear(features, start.flatten())

    def transform(self, features: Tensor) -> SylvesterTransform:
        triangles = self.triangles(features).float().unflatten(-1, (self.steps, self.rank, self.rank))
        first, second, b = self.rest(features).float().unflatten(-1, (self.steps, 3, self.rank)).unbind(2)
        first, second = MAX_DIAGONAL * torch.tanh(first), MAX_DIAGONAL * torch.tanh(second)
        upper = torch.triu(triangles, 1) + torch.diag_embed(first)
        other = torch.triu(triangles.transpose(-2, -1), 1) + torch.diag_embed(second)
        return SylvesterTransform(self._frames(features), upper, other, b, first * second)

    def _frames(self, features: Tensor) -> Tensor:
        vectors = unit(self.vectors(features).float().unflatten(-1, (self.steps, -1, self.noise_dim)))
        axes = torch.eye(self.rank, self.noise_dim, device=vectors.device)
        return reflect(axes, vectors).transpose(-2, -1)


@dataclass(frozen=True, eq=False)
class AutoregressiveTransform(Transform):
    """T gated steps by the networks ``steps``, each with its part of the context [N,T,H]."""

    steps: nn.ModuleList
    context: Tensor

    def call_and_ladj(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_gates = []
        for step, context in zip(self.steps, self.context.unbind(1), strict=True):
            m, s = (value.float() for value in step(z, context))
            gate = s + GATE_BIAS
            z = torch.sigmoid(gate) * z + torch.sigmoid(-gate) * m
            log_gates.append(F.logsigmoid(gate))
        return z, torch.cat(log_gates, -1).double().sum(-1)


class InverseAutoregressive(FlowPosterior):
    """f(z) = σ(s) ⊙ z + (1 − σ(s)) ⊙ m, s_i and m_i functions of z_1 … z_{i−1} and x (Kingma et al. 2016, Alg. 1).

    log |det ∂f/∂z| = Σ_i log σ(s_i). Each step reverses the order of the one before. x enters by a context, linear in
    the encoder's features. Starts as a diagonal Gaussian, its base drawn together by the gates, σ(2) each.
    """

    family = "iaf"

    def __init__(self, features: int, latent_dim: int, steps: int, hidden: int) -> None:
        super().__init__(features, latent_dim)
        self.context = nn.Linear(features, steps * hidden)
        self.steps = nn.ModuleList(AutoregressiveNetwork(latent_dim, hidden, bool(t % 2)) for t in range(steps))

    def transform(self, features: Tensor) -> AutoregressiveTransform:
        context = self.context(features).float().unflatten(-1, (len(self.steps), -1))
        return AutoregressiveTransform(self.steps, context)


def constant_linear(features: int, start: Tensor) -> nn.Linear:
    """A dense layer on [N,F] that starts at the constant ``start`` [O]."""
    layer = nn.Linear(features, len(start))
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(start)
    return layer


def unit(vectors: Tensor) -> Tensor:
    """Vectors [...,L] of any length -> of length one; zero stays zero."""
    return vectors * torch.rsqrt((vectors**2).sum(-1, keepdim=True).clamp(min=1e-30))


POSTERIORS: dict[str, type[PosteriorHead]] = {
    cls.family: cls for cls in (DiagonalGaussian, Householder, Planar, Sylvester, InverseAutoregressive)
}
"""From ``model.posterior.family`` to the class that it names."""


def build_posterior(config: PosteriorConfig, features: int, latent_dim: int) -> PosteriorHead:
    """The configured posterior on F = ``features`` encoder features."""
    match config.family:
        case "householder":
            return Householder(features, latent_dim, config.vectors)
        case "sylvester":
            return Sylvester(features, latent_dim, config.steps, config.rank, config.vectors)
        case "planar":
            return Planar(features, latent_dim, config.steps)
        case "iaf":
            return InverseAutoregressive(features, latent_dim, config.steps, config.hidden)
        case "diagonal_gaussian":
            return DiagonalGaussian(features, latent_dim)
