"""A Gaussian fitted to a few statistics of held-out rows, and the quantile transform that makes them Gaussian."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

QUANTILES = 257


def shrunk_covariance(rows: np.ndarray) -> np.ndarray:
    """Covariance [S,S] of standardised rows [n,S], shrunk towards the identity by Ledoit & Wolf (2004, sec. 3.3).

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


class Gaussian:
    """Mean, deviation [S] and a whitening [S,S] of standardised statistics; ``distance`` is Mahalanobis' squared."""

    def __init__(self, loc: np.ndarray, scale: np.ndarray, whitening: np.ndarray) -> None:
        self.loc, self.scale, self.whitening = loc, scale, whitening

    @classmethod
    def fit(cls, rows: np.ndarray) -> Gaussian:
        """Of rows float64 [n,S]; a statistic that never changes is judged by an absolute deviation of its own size."""
        loc, scale = rows.mean(axis=0), rows.std(axis=0)
        scale = np.where(scale > 1e-9 * (1 + np.abs(loc)), scale, 1e-3 * (1 + np.abs(loc)))
        covariance = shrunk_covariance((rows - loc) / scale)
        return cls(loc, scale, np.linalg.inv(np.linalg.cholesky(covariance)))

    def distance(self, row: np.ndarray) -> float:
        """(s − μ)ᵀ Σ⁻¹ (s − μ) of one row [S]."""
        white = (self.whitening * ((row - self.loc) / self.scale)).sum(axis=1)
        return float((white**2).sum())


def quantiles(rows: np.ndarray) -> np.ndarray:
    """Quantiles [S, at most QUANTILES] of each statistic of rows [n,S], at Φ's arguments of ``normal_grid``."""
    count = min(QUANTILES, len(rows) + 2)
    return np.quantile(rows, _levels(count), axis=0).T.copy()


def normalised(row: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Each statistic of one row [S] at its quantile of N(0, 1), by the quantiles [S,Q]; beyond them linearly on."""
    z = np.array([NormalDist().inv_cdf(level) for level in _levels(grid.shape[1])])
    return np.array([_mapped(value, knots, z) for value, knots in zip(row, grid, strict=True)])


def _levels(count: int) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


def _mapped(value: float, knots: np.ndarray, z: np.ndarray) -> float:
    inside = float(np.interp(value, knots, z))
    deviation = max(float(knots[-1] - knots[0]) / float(z[-1] - z[0]), TINY_DEVIATION * (1 + abs(float(knots[0]))))
    beyond = max(value - float(knots[-1]), 0.0) + min(value - float(knots[0]), 0.0)
    return inside + beyond / deviation


TINY_DEVIATION = 1e-6
