"""Detectors: scores that are fitted to held-out inliers, one class each. No outlier, label or gradient is used.

A detector is fitted to rows that the calibration does not see, kept as arrays in detectors.npz, and gives each row of a
forward pass (service.scores.forward_pass) one number, higher for what is more anomalous. A row's score depends on that
row alone.

    typicality   |−elbo − its mean|: in a typical set, or not (Nalisnick et al. 2019, arXiv:1906.02994, for one row)
    complexity   −elbo beyond what the code length explains (Serra et al. 2020, arXiv:1909.11480), the slope fitted to
                 the inliers, because a length in one code and a likelihood in another are not on one scale
    debiased     −elbo of the contrast-stretched image without the part that no reconstruction could have saved, by
                 pixel (after Chauhan et al. 2022, arXiv:2108.08760; here the best that was reached at each level)
    path         norms of x − x̂, μ, σ made Gaussian and joined by Mahalanobis distance, or joined by COPOD (Li et al.
                 2020, arXiv:2009.09463)
    latent       density of the encoded inliers, by the distance to the nearest (Loftsgaarden & Quesenberry 1965)
    residual     x − x̂, each number in units of its deviation: log of the mean square
    statistics   Mahalanobis distance of service.scores.forward_pass.statistics, log of the mean square
    combination  Σ −log of its parts' tail probabilities (Fisher 1932; service.scores.tail)
"""

from service.scores.detectors.base import Detector
from service.scores.detectors.combination import Combination
from service.scores.detectors.gaussian_statistics import LikelihoodPath, PassStatistics
from service.scores.detectors.latent import REFERENCE_NUMBERS, Latent
from service.scores.detectors.likelihood import Complexity, Debiased, Typicality, stretched
from service.scores.detectors.registry import (
    CLASSES,
    RESERVED,
    detector_arrays,
    is_stretched,
    load_detectors,
    to_arrays,
)
from service.scores.detectors.residual import Residual, residual_moments

__all__ = [
    "CLASSES",
    "REFERENCE_NUMBERS",
    "RESERVED",
    "Combination",
    "Complexity",
    "Debiased",
    "Detector",
    "Latent",
    "LikelihoodPath",
    "PassStatistics",
    "Residual",
    "Typicality",
    "detector_arrays",
    "is_stretched",
    "load_detectors",
    "residual_moments",
    "stretched",
    "to_arrays",
]
