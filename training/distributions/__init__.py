"""Distributions as plain tensor algebra that exports to ONNX: log_prob, sample from noise, mean."""

from training.distributions.bernoulli import Bernoulli
from training.distributions.continuous_bernoulli import ContinuousBernoulli
from training.distributions.delta import Delta
from training.distributions.distribution import Distribution, unflattened
from training.distributions.logistic import DiscretisedLogistic, LogisticMixture
from training.distributions.mixture import Mixture
from training.distributions.multivariate_normal import MultivariateNormal
from training.distributions.normal import HALF_LOG_2PI, Normal, standard_normal_log_prob
from training.distributions.posterior import (
    DiagonalGaussianPosterior,
    Draw,
    FullGaussianPosterior,
    HouseholderPosterior,
    PointPosterior,
    Posterior,
    TransformedPosterior,
    reflect,
)
from training.distributions.transform import Transform

__all__ = [
    "HALF_LOG_2PI",
    "Bernoulli",
    "ContinuousBernoulli",
    "Delta",
    "DiagonalGaussianPosterior",
    "DiscretisedLogistic",
    "Distribution",
    "Draw",
    "FullGaussianPosterior",
    "HouseholderPosterior",
    "LogisticMixture",
    "Mixture",
    "MultivariateNormal",
    "Normal",
    "PointPosterior",
    "Posterior",
    "Transform",
    "TransformedPosterior",
    "reflect",
    "standard_normal_log_prob",
    "unflattened",
]
