"""A Gaussian of a few statistics, fitted to held-out rows, and the quantile transform that makes them Gaussian."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

QUANTILES = 257
CONSTANT = 1e-6
"""Deviation, relative to 1 + |mean|, that rounding alone may cause."""
MIN_DEVIATION = 1e-3
"""Deviation, relative to 1 + |mean|, that a statistic which never changes is given."""
MIN_KNOT = 1e-4
"""Least deviation, relative to 1 + |median|, of a statistic that is made Gaussian."""
FAR = 1e100
"""Distance in deviations at which an infinite statistic is taken to lie."""


def shrunk_covariance(rows: np.ndarray) -> np.ndarray:
    """Covariance [S,S] of standardised rows [n,S], shrunk towards the identity (Ledoit & Wolf 2004, sec. 3.3).

    Always positive definite, even for fewer rows than statistics.
    """
    n, size = rows.shape
    centred = rows - rows.mean(axis=0)
    sample = centred.T @ centred / n
    level = np.trace(sample) / size
    distance = ((sample - level * np.eye(size)) ** 2).sum()
    if n < 2 or distance == 0:
        return max(level, 1e-6) * np.eye(size)
    spread = ((centred**2).T @ (centred**2) / n - sample**2).sum() / n
    share = min(1.0, spread / distance)
    return (1 - share) * sample + (share * level + 1e-6) * np.eye(size)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean, deviation [S] and a whitening [S,S] of standardised statistics; ``distance`` is Mahalanobis' squared.

    Sums here are of a row alone and in a fixed order, never a matrix product's: the same number in any batch.
    """

    loc: np.ndarray
    scale: np.ndarray
    whitening: np.ndarray

    @classmethod
    def fit(cls, rows: np.ndarray, least: float = MIN_DEVIATION) -> Gaussian:
        """Fit to rows float64 [n,S].

        A statistic that never changes has no deviation to estimate: it is given ``least`` times 1 + |its value|, and is
        taken for independent of the others.
        """
        loc, scale = rows.mean(axis=0), rows.std(axis=0)
        constant = scale <= CONSTANT * (1 + np.abs(loc))
        scale = np.where(constant, least * (1 + np.abs(loc)), scale)
        covariance = np.eye(len(loc))
        varies = np.flatnonzero(~constant)
        if len(varies):
            standardised = (rows[:, varies] - loc[varies]) / scale[varies]
            covariance[np.ix_(varies, varies)] = shrunk_covariance(standardised)
        return cls(loc, scale, np.linalg.inv(np.linalg.cholesky(covariance)))

    def distance(self, rows: np.ndarray) -> np.ndarray:
        """Squared Mahalanobis distance (s − μ)ᵀ Σ⁻¹ (s − μ) of each row s, float64 […,S]: float64 […]."""
        standardised = np.clip((rows - self.loc) / self.scale, -FAR, FAR)
        white = (self.whitening * standardised[..., None, :]).sum(axis=-1)
        squares: np.ndarray = (white**2).sum(axis=-1)
        return squares


def quantiles(rows: np.ndarray) -> np.ndarray:
    """Quantiles [S,Q] of each statistic of rows [n,S], at the levels (i + ½)/Q, Q at most QUANTILES; strictly rising.

    Quantiles that coincide, all of them where a statistic never changes, are drawn apart by MIN_KNOT a deviation.
    """
    count = min(QUANTILES, len(rows) + 2)
    grid = np.quantile(rows, _levels(count), axis=0).T
    least = MIN_KNOT * (1 + np.abs(np.median(grid, axis=1, keepdims=True)))
    return np.ascontiguousarray(grid + least * _normal_quantiles(count))


def normalised(row: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Statistics of one row [S], mapped by their quantiles [S,Q] to those of N(0, 1), linearly beyond the last ones."""
    z = _normal_quantiles(grid.shape[1])
    return np.array([_mapped(value, knots, z) for value, knots in zip(row, grid, strict=True)])


def _levels(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


@lru_cache(maxsize=8)
def _normal_quantiles(count: int) -> np.ndarray:
    z = np.array([NormalDist().inv_cdf(level) for level in _levels(count)])
    z.setflags(write=False)
    return z


def _mapped(value: float, knots: np.ndarray, z: np.ndarray) -> float:
    deviation = float(knots[-1] - knots[0]) / float(z[-1] - z[0])
    beyond = max(value - float(knots[-1]), 0.0) + min(value - float(knots[0]), 0.0)
    return float(np.interp(value, knots, z)) + beyond / deviation
