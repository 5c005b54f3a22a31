"""Combination of scores by their tail probabilities among inliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import numpy as np

from service.bundle.manifest import DETECTORS
from service.errors import BundleFormatError
from service.scores.detector_arrays import Arrays, ArraySpec, check_arrays
from service.scores.piecewise_linear import PiecewiseLinear

MAX_KNOTS = 256
"""Most of a part's fitted scores that are kept."""
TAIL = 0.9
"""Quantile from which on a tail is taken for exponential."""
MIN_EXCESS = 1e-6
"""Mean excess, relative to 1 + the largest |score|, that rounding alone may cause."""


class Combination:
    """Σ over parts of −log P(part ≥ score) for an inlier, nats; fitted to the parts' scores of held-out inliers.

    Inside the fitted scores the probability is the share of them that are as high; from their 90% quantile u on it
    falls as exp(−(s − u)/σ), σ the mean excess over u of those beyond.
    """

    def __init__(self, arrays: Arrays, parts: int, file: str = DETECTORS) -> None:
        """Raises BundleFormatError, which names ``file``, for arrays that are not those of so many parts."""
        table = ArraySpec((parts, range(1, MAX_KNOTS + 1)), order="not falling")
        specs = {"knots": table, "surprisals": table, "scale": ArraySpec((parts,), positive=True)}
        check_arrays("combination", arrays, specs, file)
        if arrays["knots"].shape != arrays["surprisals"].shape:
            raise BundleFormatError(f"{file}: a combination has other surprisals than knots")
        with np.errstate(over="ignore"):
            spans = arrays["knots"][:, -1] - arrays["knots"][:, 0]
        if not np.isfinite(spans).all():
            raise BundleFormatError(f"{file}: a combination's knots are further apart than float64 can tell")
        self.arrays = arrays

    @classmethod
    def fit(cls, scores: np.ndarray) -> Self:
        """Fit to finite scores of P parts, float64 [n,P] with n ≥ 2, of inliers that no part was fitted to."""
        ordered = np.sort(scores, axis=0)
        n = len(ordered)
        below = min(math.ceil(TAIL * n), n - 1)
        picked = np.unique(np.linspace(0, below - 1, min(below, MAX_KNOTS)).astype(int))
        knots = np.ascontiguousarray(ordered[picked].T)
        # The index of the first of equal scores says how many scores are at least as high.
        first = [np.searchsorted(part, at) for part, at in zip(ordered.T, knots, strict=True)]
        excess = (ordered[below:] - ordered[below - 1]).mean(axis=0)
        scale = np.maximum(excess, MIN_EXCESS * (1 + np.abs(ordered).max(axis=0)))
        return cls({"knots": knots, "surprisals": -np.log(1 - np.array(first) / n), "scale": scale}, scores.shape[1])

    def score(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Σ −log tail probability over the parts, nats, float64 [N], from the parts' scores, [N] each."""
        return np.sum([self._surprisal(index, scores) for index, scores in enumerate(parts)], axis=0)

    def curves(self) -> list[PiecewiseLinear]:
        """The functions that give −log tail probability of each part's score, for many scores at once."""
        return [
            PiecewiseLinear(knots, surprisals, 1 / float(scale))
            for knots, surprisals, scale in zip(*map(self.arrays.get, ("knots", "surprisals", "scale")), strict=True)
        ]

    def _surprisal(self, index: int, scores: np.ndarray) -> np.ndarray:
        """−log tail probability of the scores, [N], of the part with that index, float64 [N]."""
        knots, surprisals = self.arrays["knots"][index], self.arrays["surprisals"][index]
        beyond = np.maximum(scores - knots[-1], 0.0) / self.arrays["scale"][index]
        return np.interp(scores, knots, surprisals) + beyond
