"""Detectors by a Gaussian of a row's statistics: norms of the likelihood path, and statistics of the forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from service.bundle.manifest import Manifest, ScoreDefinition
from service.scores.detector_arrays import ArraySpec, ArraySpecs
from service.scores.detectors.base import Detector
from service.scores.forward_pass import (
    ForwardPass,
    StatisticsFunction,
    path_statistics,
    statistic_names,
    statistics,
    table,
)
from service.scores.gaussian import QUANTILES, Gaussian, normalised, quantiles


@dataclass(frozen=True, eq=False)
class GaussianDetector(Detector):
    """Detector by a Gaussian of S statistics: ``loc``, ``scale`` [S] and ``whitening`` [S,S], float64."""

    loc: np.ndarray
    scale: np.ndarray
    whitening: np.ndarray

    @cached_property
    def _gaussian(self) -> Gaussian:
        return Gaussian(self.loc, self.scale, self.whitening)


@dataclass(frozen=True, eq=False)
class LikelihoodPath(GaussianDetector):
    """Distance of the likelihood path's norms, made Gaussian by their quantiles, from those of inliers.

    By the definition's method: log of Mahalanobis' squared distance over the number of norms, or COPOD (Li et al. 2020,
    arXiv:2009.09463). See service.scores.forward_pass.path_statistics. Of the norms ``quantiles``, float64 [S,Q],
    rising, and ``skewness``, float64 [S].
    """

    quantiles: np.ndarray
    skewness: np.ndarray

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        size = len(statistic_names(path_statistics, manifest))
        grid = ArraySpec((size, range(2, QUANTILES + 1)), order="rising")
        return {"quantiles": grid, "skewness": ArraySpec((size,)), **_gaussian_specs(size)}

    @classmethod
    def fit(cls, passes: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        rows = _table(path_statistics, passes, manifest)
        grid = quantiles(rows)
        # A statistic that never changes is mapped to 0 by quantiles as close as is allowed: one deviation there is 1.
        gaussian = Gaussian.fit(np.array([normalised(row, grid) for row in rows]), least=1.0)
        centred = rows - rows.mean(axis=0)
        skewness = (centred**3).mean(axis=0) / np.maximum(rows.std(axis=0) ** 3, 1e-12)
        return cls(definition, manifest, gaussian.loc, gaussian.scale, gaussian.whitening, grid, skewness)

    def score(self, rows: ForwardPass) -> np.ndarray:
        return np.array([self._score(values) for values in table(path_statistics, rows, self.manifest)])

    def _score(self, values: np.ndarray) -> float:
        if self.definition.method == "copod":
            return _copod(values, self.quantiles, self.skewness)
        distance = float(self._gaussian.distance(normalised(values, self.quantiles)))
        return math.log(distance / len(values) + 1e-12)


@dataclass(frozen=True, eq=False)
class PassStatistics(GaussianDetector):
    """Log of Mahalanobis' squared distance over the number of statistics (service.scores.forward_pass.statistics)."""

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        return _gaussian_specs(len(statistic_names(statistics, manifest)))

    @classmethod
    def fit(cls, passes: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        gaussian = Gaussian.fit(_table(statistics, passes, manifest))
        return cls(definition, manifest, gaussian.loc, gaussian.scale, gaussian.whitening)

    def score(self, rows: ForwardPass) -> np.ndarray:
        values = table(statistics, rows, self.manifest)
        logs: np.ndarray = np.log(self._gaussian.distance(values) / values.shape[1] + 1e-12)
        return logs


def _gaussian_specs(size: int) -> ArraySpecs:
    """Requirements on the arrays of a Gaussian of ``size`` statistics."""
    return {"loc": ArraySpec((size,)), "scale": ArraySpec((size,), positive=True), "whitening": ArraySpec((size, size))}


def _table(kind: StatisticsFunction, passes: Sequence[ForwardPass], manifest: Manifest) -> np.ndarray:
    return np.concatenate([table(kind, batch, manifest) for batch in passes])


def _copod(values: np.ndarray, grid: np.ndarray, skewness: np.ndarray) -> float:
    """COPOD score of one row's statistics [S] (Li et al. 2020, alg. 1), from quantiles [S,Q] and skewness [S].

    It is the largest of Σ −log F, Σ −log(1 − F), and Σ over the tail that each skewness points to.
    """
    count = grid.shape[1]
    below = np.array([np.searchsorted(knots, value, "right") for knots, value in zip(grid, values, strict=True)])
    above = np.array([count - np.searchsorted(knots, value, "left") for knots, value in zip(grid, values, strict=True)])
    left, right = -np.log((below + 1) / (count + 1)), -np.log((above + 1) / (count + 1))
    return float(max(left.sum(), right.sum(), np.where(skewness < 0, left, right).sum()))
