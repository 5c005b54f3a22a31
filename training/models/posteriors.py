"""Approximate posteriors q(z|x): parameters from the encoder's features, draws from noise, log q at the draws."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import PosteriorConfig
from training.nn.masked import AutoregressiveNetwork

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
MIN_SLOPE = 1e-3
"""A planar step keeps at least so much of any length along w: float32 could not tell less from a lost dimension."""
PLANAR_SHIFT = math.log(math.e - 1)
"""softplus of it is 1."""
MAX_DIAGONAL = 0.995
"""Bound of |r_mm| and |r̃_mm| in a Sylvester step: its determinant's factors stay above 1 − 0.995² ≈ 0.01."""
GATE_BIAS = 2.0
"""IAF's gates start at σ(2) = 0.88, nearly open (Kingma et al. 2016, Section 4)."""


class Posterior(nn.Module, ABC):
    """Features [N,F] -> parameters of q(z|x), and noise [N,K,E] -> draws.

    ``moments``: ``exact`` if ``moments_of`` gives mean and standard deviations, ``base`` if it gives the image of the
    base distribution's mean and the base's deviations. ``evaluable``: log q can be had at any z, not only at a draw.
    """

    family: str
    moments: Literal["exact", "base"] = "exact"
    evaluable: bool = False
    noise_dim: int

    @abstractmethod
    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> parameters, float32 [N,…] each."""

    @abstractmethod
    def moments_of(self, statistics: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Parameters -> loc, scale, each [N,L]; see ``moments``."""

    @abstractmethod
    def sample(self, statistics: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters and noise [N,K,E] -> z [N,K,L] and log q(z|x) [N,K] float64, nats."""

    def log_prob(self, statistics: tuple[Tensor, ...], z: Tensor) -> Tensor:
        """log q(z|x) [N,K] float64 at any z [N,K,L], where ``evaluable``."""
        raise NotImplementedError(f"{self.family}: log q is known at its own draws only")


class DiagonalGaussian(Posterior):
    """q(z|x) = N(loc, diag(scale²)), loc and scale by one linear head on the encoder's features [N,F]."""

    family = "diagonal_gaussian"
    evaluable = True

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, 2 * latent_dim)
        self.noise_dim = latent_dim

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> loc, scale, each [N,L] float32; scale in (e^-7, e^3)."""
        loc, log_scale = self.head(features).float().chunk(2, -1)
        return loc, torch.exp(log_scale.clamp(-7, 3))

    def moments_of(self, statistics: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        loc, scale = statistics
        return loc, scale

    def sample(self, statistics: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = statistics
        log_q = (-0.5 * noise**2 - HALF_LOG_2PI - torch.log(scale).unsqueeze(1)).double().sum(-1)
        return reparameterise(loc, scale, noise), log_q

    def log_prob(self, statistics: tuple[Tensor, ...], z: Tensor) -> Tensor:
        loc, scale = statistics
        return log_normal(z, loc.unsqueeze(1), scale.unsqueeze(1)).double().sum(-1)


class Householder(Posterior):
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

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> loc and base scale, each [N,L], unit vectors [N,V,L]."""
        loc, scale = self.base(features)
        return loc, scale, unit(self.vectors(features).float().unflatten(-1, (-1, self.noise_dim)))

    def moments_of(self, statistics: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        loc, scale, vectors = statistics
        factor = reflect(torch.diag_embed(scale), vectors)  # rows scale_k Q e_k: factorᵀ·factor is the covariance
        return loc, torch.sqrt((factor**2).sum(1))

    def sample(self, statistics: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale, vectors = statistics
        _, log_q = self.base.sample((loc, scale), noise)
        return loc.unsqueeze(1) + reflect(scale.unsqueeze(1) * noise, vectors), log_q

    def log_prob(self, statistics: tuple[Tensor, ...], z: Tensor) -> Tensor:
        loc, scale, vectors = statistics
        turned = reflect(z - loc.unsqueeze(1), vectors.flip(1))
        return log_normal(turned, torch.zeros_like(turned), scale.unsqueeze(1)).double().sum(-1)


class FlowPosterior(Posterior):
    """z_T = f_T ∘ … ∘ f_1(z_0) with z_0 ~ N(loc, diag(scale²)); parameters of the steps depend on x.

    log q(z_T|x) = log q(z_0|x) − Σ_t log |det ∂f_t/∂z| (Rezende & Mohamed 2015, eq. 7), the sums in float64.
    """

    moments = "base"

    def __init__(self, features: int, latent_dim: int) -> None:
        super().__init__()
        self.noise_dim = latent_dim
        self.base = DiagonalGaussian(features, latent_dim)

    @abstractmethod
    def amortise(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> parameters of the T steps, float32 [N,T,…] each."""

    @abstractmethod
    def transform(self, z: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """z_0 [N,K,L] -> z_T [N,K,L], Σ_t log |det ∂f_t/∂z| [N,K] float64."""

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> the base's loc and scale, each [N,L], and the steps' parameters."""
        return (*self.base(features), *self.amortise(features))

    def moments_of(self, statistics: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        loc, scale, *parameters = statistics
        return self.transform(loc.unsqueeze(1), tuple(parameters))[0].squeeze(1), scale

    def sample(self, statistics: tuple[Tensor, ...], noise: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale, *parameters = statistics
        start, log_q = self.base.sample((loc, scale), noise)
        z, log_det = self.transform(start, tuple(parameters))
        return z, log_q - log_det


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

    def amortise(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> û and w, each [N,T,L], b and 1 + wᵀû, each [N,T,1]."""
        u = self.shift(features).float().unflatten(-1, (self.steps, -1))
        w = self.direction(features).float().unflatten(-1, (self.steps, -1))
        along = (w * u).sum(-1, keepdim=True)
        slope = MIN_SLOPE + (1 - MIN_SLOPE) * F.softplus(along + PLANAR_SHIFT)
        squared = (w**2).sum(-1, keepdim=True).clamp(min=1e-12)
        return u + (slope - 1 - along) * w / squared, w, self.offset(features).float().unsqueeze(-1), slope

    def transform(self, z: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        factors = []
        for t in range(self.steps):
            u, w, b, slope = (value[:, t].unsqueeze(1) for value in parameters)
            h = torch.tanh((z * w).sum(-1, keepdim=True) + b)
            z = z + u * h
            factors.append(h**2 + (1 - h**2) * slope)  # 1 + (1 − h²) wᵀû, without a difference that could vanish
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

    def amortise(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> Q [N,T,L,M], R and R̃ [N,T,M,M], b and r_mm·r̃_mm, each [N,T,M]."""
        triangles = self.triangles(features).float().unflatten(-1, (self.steps, self.rank, self.rank))
        first, second, b = self.rest(features).float().unflatten(-1, (self.steps, 3, self.rank)).unbind(2)
        first, second = MAX_DIAGONAL * torch.tanh(first), MAX_DIAGONAL * torch.tanh(second)
        upper = torch.triu(triangles, 1) + torch.diag_embed(first)
        other = torch.triu(triangles.transpose(-2, -1), 1) + torch.diag_embed(second)
        return self._frames(features), upper, other, b, first * second

    def _frames(self, features: Tensor) -> Tensor:
        vectors = unit(self.vectors(features).float().unflatten(-1, (self.steps, -1, self.noise_dim)))
        axes = torch.eye(self.rank, self.noise_dim, device=vectors.device)
        return reflect(axes, vectors).transpose(-2, -1)

    def transform(self, z: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        factors = []
        with full_precision(z):
            for t in range(self.steps):
                frame, upper, other, b, diagonal = (value[:, t] for value in parameters)
                h = torch.tanh(z @ frame @ other.transpose(-2, -1) + b.unsqueeze(1))
                z = z + h @ upper.transpose(-2, -1) @ frame.transpose(-2, -1)
                factors.append(1 + (1 - h**2) * diagonal.unsqueeze(1))
            return z, torch.log(torch.cat(factors, -1)).double().sum(-1)


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

    def amortise(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features [N,F] -> context [N,T,H]."""
        return (self.context(features).float().unflatten(-1, (len(self.steps), -1)),)

    def transform(self, z: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        log_gates = []
        for step, context in zip(self.steps, parameters[0].unbind(1), strict=True):
            m, s = (value.float() for value in step(z, context))
            gate = s + GATE_BIAS
            z = torch.sigmoid(gate) * z + torch.sigmoid(-gate) * m
            log_gates.append(F.logsigmoid(gate))
        return z, torch.cat(log_gates, -1).double().sum(-1)


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


def reflect(rows: Tensor, vectors: Tensor) -> Tensor:
    """H_V … H_1 r with H_v = I − 2 v vᵀ for each row r of [...,R,L], unit vectors [...,V,L] -> [...,R,L].

    Products and sums of elements, which autocast leaves in float32.
    """
    for v in vectors.unsqueeze(-2).unbind(-3):
        rows = torch.addcmul(rows, (rows * v).sum(-1, keepdim=True), v, value=-2)
    return rows


def full_precision(z: Tensor) -> AbstractContextManager[object]:
    """Where autocast is on, a context that turns it off on z's device."""
    kind = z.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def reparameterise(loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """z = loc + scale·ε for noise ε [N,K,L] (Kingma & Welling 2014, eq. 10) -> [N,K,L]."""
    return loc.unsqueeze(1) + scale.unsqueeze(1) * noise


def log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """log N(z; loc, scale²) for each element, in nats."""
    return -0.5 * ((z - loc) / scale) ** 2 - torch.log(scale) - HALF_LOG_2PI


def kl_to_standard_normal(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale²) ‖ N(0, 1)) for each element, in nats (Kingma & Welling 2014, App. B)."""
    return 0.5 * (loc**2 + scale**2 - 1) - torch.log(scale)


def build_posterior(config: PosteriorConfig, features: int, latent_dim: int) -> Posterior:
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
