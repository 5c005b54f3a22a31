"""Posteriors q(z|x) of N rows, as an encoder gives them, and their reparameterised draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from training.distributions.multivariate_normal import MultivariateNormal
from training.distributions.normal import Normal, standard_normal_log_prob
from training.distributions.transform import Transform


class Draw(NamedTuple):
    """Samples z [N,K,L] float32 of q(z|x), and log q(z|x) at them, [N,K] float64, in nats."""

    z: Tensor
    log_q_z: Tensor


class Posterior(ABC):
    """q(z|x) of N rows: ``loc`` and ``scale`` [N,L] (the head's ``moments`` says of what), and draws."""

    loc: Tensor
    scale: Tensor

    @abstractmethod
    def rsample(self, noise: Tensor) -> Draw:
        """Draws from standard normal noise [N,K,E], through which gradients flow (Kingma & Welling 2014, sec. 2.4)."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z|x) [N,K] float64 at any z [N,K,L], in nats. Raises NotImplementedError where it is not known."""
        raise NotImplementedError(f"{type(self).__name__}: log q is known at its own draws only")

    def stop_gradient(self) -> Self:
        """The same q, its parameters held constant. Raises NotImplementedError where log q is not known at any z."""
        raise NotImplementedError(f"{type(self).__name__}: log q is known at its own draws only")

    def with_moments(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """loc, scale, z, log q(z|x): what the encoder's graph gives."""
        return self.loc, self.scale, *self.rsample(noise)


@dataclass(frozen=True, eq=False)
class DiagonalGaussianPosterior(Posterior):
    """q(z|x) = N(loc, diag(scale²)) with loc, scale [N,L]."""

    loc: Tensor
    scale: Tensor

    @property
    def normal(self) -> Normal:
        """The distribution, with an axis of samples: parameters [N,1,L]."""
        return Normal(self.loc.unsqueeze(1), self.scale.unsqueeze(1))

    def rsample(self, noise: Tensor) -> Draw:
        return Draw(self.normal.sample(noise), _log_prob_of_draw(self.scale, noise))

    def log_prob(self, z: Tensor) -> Tensor:
        return self.normal.log_prob(z).double().sum(-1)

    def stop_gradient(self) -> Self:
        return type(self)(self.loc.detach(), self.scale.detach())


@dataclass(frozen=True, eq=False)
class HouseholderPosterior(Posterior):
    """q(z|x) = N(loc, Q diag(s²) Qᵀ) with s ``base_scale`` [N,L] and Q = H_V … H_1 of unit ``vectors`` [N,V,L]."""

    loc: Tensor
    base_scale: Tensor
    vectors: Tensor

    @property
    def scale(self) -> Tensor:  # type: ignore[override]  # computed, and never set
        """Marginal standard deviations [N,L]."""
        factor = reflect(torch.diag_embed(self.base_scale), self.vectors)  # rows s_k Q e_k: factorᵀ·factor is Σ
        return torch.sqrt((factor**2).sum(1))

    @property
    def _base(self) -> Normal:
        return Normal(torch.zeros_like(self.loc).unsqueeze(1), self.base_scale.unsqueeze(1))

    def rsample(self, noise: Tensor) -> Draw:
        log_q_z = _log_prob_of_draw(self.base_scale, noise)  # |det Q| = 1
        return Draw(self.loc.unsqueeze(1) + reflect(self.base_scale.unsqueeze(1) * noise, self.vectors), log_q_z)

    def log_prob(self, z: Tensor) -> Tensor:
        turned = reflect(z - self.loc.unsqueeze(1), self.vectors.flip(1))
        return self._base.log_prob(turned).double().sum(-1)

    def stop_gradient(self) -> Self:
        return type(self)(self.loc.detach(), self.base_scale.detach(), self.vectors.detach())


@dataclass(frozen=True, eq=False)
class TransformedPosterior(Posterior):
    """z = f(z_0) with z_0 ~ ``base`` and f the ``transform``: log q(z|x) = log q(z_0|x) − log |det ∂f/∂z_0|.

    Rezende & Mohamed 2015, eq. 7. ``loc`` is the image of the base's mean, ``scale`` the base's.
    """

    base: DiagonalGaussianPosterior
    transform: Transform

    @property
    def loc(self) -> Tensor:  # type: ignore[override]  # computed, and never set
        """f of the base's mean, [N,L]."""
        return self.transform.call_and_ladj(self.base.loc.unsqueeze(1))[0].squeeze(1)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The base's standard deviations [N,L]."""
        return self.base.scale

    def rsample(self, noise: Tensor) -> Draw:
        z_0, log_q_z = self.base.rsample(noise)
        z, ladj = self.transform.call_and_ladj(z_0)
        return Draw(z, log_q_z - ladj)


@dataclass(frozen=True, eq=False)
class FullGaussianPosterior(Posterior):
    """q(z|x) = N(mean, A Aᵀ) in float64, mean [N,L] and one A [L,L] for all rows.

    Draws are rounded to float32, and log q is taken at the rounded ones.
    """

    mean: Tensor
    factor: Tensor
    inverse_factor: Tensor

    @property
    def _normal(self) -> MultivariateNormal:
        return MultivariateNormal(self.mean.unsqueeze(1), self.factor, self.inverse_factor)

    @property
    def loc(self) -> Tensor:  # type: ignore[override]
        """The mean [N,L] in float32."""
        return self.mean.float()

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Marginal standard deviations [N,L] in float32, the same for every row."""
        return self._normal.scale.float().expand_as(self.mean)

    def rsample(self, noise: Tensor) -> Draw:
        z = self._normal.sample(noise).float()
        return Draw(z, self.log_prob(z))

    def log_prob(self, z: Tensor) -> Tensor:
        return self._normal.log_prob(z)


@dataclass(frozen=True, eq=False)
class PointPosterior(Posterior):
    """z [N,L] as a function of x: every draw is a copy of it, noise has no numbers, and ``log_q_z`` [N] is given.

    It is 0 for a deterministic encoder, and −log |det ∂z/∂x| for a bijection.
    """

    loc: Tensor
    log_q_z: Tensor

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """Zeros [N,L]."""
        return torch.zeros_like(self.loc)

    def rsample(self, noise: Tensor) -> Draw:
        copies = noise.shape[1]
        return Draw(self.loc.unsqueeze(1).expand(-1, copies, -1), self.log_q_z.unsqueeze(1).expand(-1, copies))


def reflect(rows: Tensor, vectors: Tensor) -> Tensor:
    """H_V … H_1 r with H_v = I − 2 v vᵀ for each row r of [...,R,L], unit vectors [...,V,L] -> [...,R,L].

    Products and sums of elements, which autocast leaves in float32.
    """
    for v in vectors.unsqueeze(-2).unbind(-3):
        rows = torch.addcmul(rows, (rows * v).sum(-1, keepdim=True), v, value=-2)
    return rows


def _log_prob_of_draw(scale: Tensor, noise: Tensor) -> Tensor:
    """log N(loc + s ε; loc, diag(s²)) of scale s [N,L] and noise ε [N,K,L] -> [N,K] float64.

    The logarithm stands before the axis of samples: a scale is an exponential, and the export folds log(exp(a)) to a.
    """
    return (standard_normal_log_prob(noise) - torch.log(scale).unsqueeze(1)).double().sum(-1)
