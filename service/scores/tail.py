"""Tail: how improbable a score as high as this one is among inliers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.bundle.manifest import DETECTORS
from service.errors import BundleFormatError
from service.scores.detector_arrays import Arrays, ArraySpec, check_arrays
from service.scores.piecewise_linear import PiecewiseLinear

MAX_KNOTS = 256
"""Most of the fitted scores that are kept."""
FIRST_OF_TAIL = 0.9
"""Quantile from which on the probability is taken for exponential."""
MIN_EXCESS = 1e-6
"""Mean excess, relative to 1 + the largest |score|, that rounding alone may cause."""


@dataclass(frozen=True, eq=False)
class Tail:
    """−log P(S ≥ s) of one score S of inliers, nats.

    Inside the fitted scores the probability is the share of them that are as high; from their 90% quantile u on it
    falls as exp(−(s − u)/σ), σ the mean excess over u of those beyond (Pickands 1975, with shape 0).

    ``knots``: some of the fitted scores, not falling, float64 [K], 1 ≤ K ≤ MAX_KNOTS. ``surprisals``: −log P at each
    knot, nats, float64 [K]. ``scale``: σ > 0, float64.
    """

    knots: np.ndarray
    surprisals: np.ndarray
    scale: np.float64

    def surprisal(self, scores: np.ndarray) -> np.ndarray:
        """−log P(S ≥ s) of each score s, float64 [N]: float64 [N]."""
        beyond = np.maximum(scores - self.knots[-1], 0.0) / self.scale
        return np.interp(scores, self.knots, self.surprisals) + beyond

    def curve(self) -> PiecewiseLinear:
        """The same function for many scores at once, equal but for rounding."""
        return PiecewiseLinear(self.knots, self.surprisals, 1 / float(self.scale))


def fit_tails(scores: np.ndarray) -> tuple[Tail, ...]:
    """Fit the tails of P scores, a column each, to finite float64 [n,P], n ≥ 2, of inliers that no score was fitted to.

    The excesses are summed row by row for all scores together: with another order σ would have other last bits.
    """
    ordered = np.sort(scores, axis=0)
    n = len(ordered)
    below = min(math.ceil(FIRST_OF_TAIL * n), n - 1)
    picked = np.unique(np.linspace(0, below - 1, min(below, MAX_KNOTS)).astype(int))
    excess = (ordered[below:] - ordered[below - 1]).mean(axis=0)
    scales = np.maximum(excess, MIN_EXCESS * (1 + np.abs(ordered).max(axis=0)))
    # The index of the first of equal scores says how many scores are at least as high.
    return tuple(
        Tail(column[picked], -np.log(1 - np.searchsorted(column, column[picked]) / n), scale)
        for column, scale in zip(ordered.T, scales, strict=True)
    )


def tail_arrays(tails: Sequence[Tail]) -> Arrays:
    """Stack the fields of P tails as a file holds them: ``knots`` and ``surprisals`` [P,K], ``scale`` [P]."""
    return {name: np.stack([getattr(tail, name) for tail in tails]) for name in ("knots", "surprisals", "scale")}


def tails_from_arrays(arrays: Arrays, count: int, file: str = DETECTORS) -> tuple[Tail, ...]:
    """Make ``count`` tails of what ``tail_arrays`` gives. Raises BundleFormatError, which names ``file``."""
    table = ArraySpec((count, range(1, MAX_KNOTS + 1)), order="not falling")
    specs = {"knots": table, "surprisals": table, "scale": ArraySpec((count,), positive=True)}
    check_arrays("tail", arrays, specs, file)
    if arrays["knots"].shape != arrays["surprisals"].shape:
        raise BundleFormatError(f"{file}: a tail has other surprisals than knots")
    with np.errstate(over="ignore"):
        spans = arrays["knots"][:, -1] - arrays["knots"][:, 0]
    if not np.isfinite(spans).all():
        raise BundleFormatError(f"{file}: a tail's knots are further apart than float64 can tell")
    return tuple(map(Tail, arrays["knots"], arrays["surprisals"], arrays["scale"]))
