"""Training objectives, to be maximised, written as the papers write them. All values in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.config import Config, ObjectiveConfig
from training.errors import ConfigError
from training.models.base import Terms
from training.models.posteriors import POSTERIORS
from training.models.registry import FAMILIES


def check_objective(config: Config) -> None:
    """Raise ConfigError where the objective is not defined for the configured model or posterior."""
    kind, family = config.objective.kind, FAMILIES[config.model.family]
    if kind != "elbo" and not family.weighs_samples:
        raise ConfigError(
            f"objective.kind {kind!r} weighs samples of q(z|x); family {family.family!r} has none to weigh: take 'elbo'"
        )
    if kind == "dreg" and family.kl_groups == "layer":
        raise ConfigError(
            "objective.kind 'dreg' is for one stochastic layer: in a ladder each layer's z sets the parameters of the "
            "layers below it; take 'elbo' or 'iwae'"
        )
    if kind == "dreg" and not POSTERIORS[config.model.posterior.family].evaluable:
        known = " or ".join(repr(name) for name, cls in POSTERIORS.items() if cls.evaluable)
        raise ConfigError(
            "objective.kind 'dreg' needs log q(z|x) with its parameters held constant: expected "
            f"model.posterior.family {known}, whose density is known at any z, got {config.model.posterior.family!r}"
        )


def elbo(terms: Terms, beta: float = 1.0, free_bits: float = 0.0) -> Tensor:
    """E_q[log p(x|z)] − β Σ_j max(λ, KL_j), averaged over the batch; KL as terms.kl has it.

    β: Higgins et al. 2017. λ = ``free_bits`` nats for each group's batch mean: Kingma et al. 2016, eq. 15. Without it
    there is no floor: a sampled KL may be negative, and so is a bijection's −log p(x) where the density exceeds 1.
    """
    rate = terms.kl.per_group.mean(0)
    if free_bits:
        rate = rate.clamp(min=free_bits)
    return terms.log_p_x_given_z.mean() - beta * rate.sum()


def iwae(terms: Terms, beta: float = 1.0) -> Tensor:
    """log (1/K) Σ w_k with log w = log p(x|z) + β(log p(z) − log q(z|x)) at sampled z (Burda et al. 2016, eq. 8)."""
    log_w = terms.log_p_x_given_z + beta * (terms.log_p_z - terms.log_q_z)
    return (torch.logsumexp(log_w, 1) - math.log(log_w.shape[1])).mean()


def dreg(terms: Terms, beta: float = 1.0) -> Tensor:
    """The IWAE bound with doubly reparameterised gradients (Tucker et al. 2019, eq. 7).

    The terms are those of ``stop_gradient_q``. The decoder sees Σ w̃ ∂log w, and the encoder Σ w̃ (1 − β + β w̃)
    ∂log w/∂z ∂z/∂φ, which is the paper's Σ w̃² at β = 1: log q enters log w β-fold, and so does its score term.
    A hook on z multiplies by the second factor.
    """
    log_w = terms.log_p_x_given_z + beta * (terms.log_p_z - terms.log_q_z)
    weights = torch.softmax(log_w.detach(), 1)
    if terms.z.requires_grad:
        terms.z.register_hook(lambda gradient: ((1 - beta) + beta * weights).unsqueeze(-1) * gradient)
    surrogate = (weights * log_w).sum(1).mean()
    bound = (torch.logsumexp(log_w.detach(), 1) - math.log(log_w.shape[1])).mean()
    return surrogate + (bound - surrogate.detach())


def objective(terms: Terms, config: ObjectiveConfig, beta: float) -> Tensor:
    """The configured objective, a scalar."""
    if config.kind == "elbo":
        return elbo(terms, beta, config.free_bits)
    return iwae(terms, beta) if config.kind == "iwae" else dreg(terms, beta)
