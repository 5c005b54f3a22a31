"""Conformal p-values: how often an inlier scores at least as high (Vovk et al. 2005; Bates et al. 2023, eq. 2).

For a new inlier, exchangeable with the calibration images, P(p ≤ α) ≤ α for every α: flagging p ≤ α has a
false-positive rate of at most α, whatever the model.
"""

from __future__ import annotations

import math

import numpy as np

from service.bundle import CALIBRATION, Bundle
from service.errors import BundleFormatError, InvalidInput, UnsupportedVerb

LEAST_RATE = 1e-9


class Calibrator:
    """Held-out inlier scores by score name: sorted float64 [n] each; ``name in calibrator`` tells which are there.

    >>> Calibrator({"elbo": np.arange(99.0)}).p_values("elbo", np.array([98.0, -1.0]))
    array([0.02, 1.  ])
    """

    def __init__(self, scores: dict[str, np.ndarray]) -> None:
        for name, values in scores.items():
            if values.dtype != np.float64 or values.ndim != 1 or len(values) == 0:
                raise BundleFormatError(f"calibration of {name}: expected float64 [n], n ≥ 1")
            if not np.isfinite(values).all() or (np.diff(values) < 0).any():
                raise BundleFormatError(f"calibration of {name}: expected finite scores in ascending order")
        self._scores = scores

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Calibrator:
        """The bundle's calibration, empty where it has none. Raises BundleFormatError when it is no such thing."""
        if bundle.manifest.calibration is None:
            return cls({})
        scores = bundle.arrays(CALIBRATION)
        unknown = sorted(set(scores) - set(bundle.manifest.scores))
        if unknown:
            raise BundleFormatError(f"{CALIBRATION} holds scores that the manifest does not define: {unknown}")
        return cls(scores)

    def __contains__(self, score_name: str) -> bool:
        return score_name in self._scores

    @property
    def names(self) -> list[str]:
        """Names of the calibrated scores."""
        return sorted(self._scores)

    def n(self, score_name: str) -> int:
        """Number of calibration scores. Raises UnsupportedVerb for a score that is not calibrated."""
        return len(self._of(score_name))

    def p_values(self, score_name: str, scores: np.ndarray) -> np.ndarray:
        """(1 + #{calibration ≥ s}) / (n + 1) of each score s: float64 [N] in (0, 1].

        Raises UnsupportedVerb for a score that is not calibrated, InvalidInput for NaN.
        """
        calibration, scores = self._of(score_name), np.asarray(scores, np.float64)
        if np.isnan(scores).any():
            raise InvalidInput("a score is NaN, which has no p-value")
        above = len(calibration) - np.searchsorted(calibration, scores, side="left")
        return (1.0 + above) / (len(calibration) + 1.0)

    def threshold(self, score_name: str, false_positive_rate: float) -> float:
        """The smallest score, in nats, whose p-value is at most the rate: p ≤ rate exactly when score ≥ threshold.

        Raises UnsupportedVerb for a score that is not calibrated, InvalidInput for a rate outside [1e-9, 1) or one so
        small that no score could reach it with this many calibration scores.
        """
        calibration = self._of(score_name)
        n, rate = len(calibration), _checked_rate(false_positive_rate)
        allowed = _allowed_above(n, rate)
        if allowed < 0:
            raise InvalidInput(
                f"a false-positive rate of {rate:g} needs at least {_needed(rate)} calibration scores, "
                f"{score_name} has {n}: ask for {1 / (n + 1):.3g} or more"
            )
        # At most `allowed` calibration scores are ≥ s exactly when s lies above the next one down.
        return float(np.nextafter(calibration[n - 1 - allowed], np.inf))

    def _of(self, score_name: str) -> np.ndarray:
        if score_name not in self._scores:
            raise UnsupportedVerb(f"score {score_name!r} has no calibration here; calibrated: {self.names or 'none'}")
        return self._scores[score_name]


def _checked_rate(rate: float) -> float:
    if not LEAST_RATE <= rate < 1:
        raise InvalidInput(f"false_positive_rate is {rate}, expected a number from {LEAST_RATE:g} to below 1")
    return float(rate)


def _allowed_above(n: int, rate: float) -> int:
    """The largest m with (1 + m)/(n + 1) ≤ rate as p_values computes it, below 0 when there is none."""
    m = math.floor(rate * (n + 1)) + 1  # rounding can be one off either way; from above, step down to the truth
    while m >= 0 and (1.0 + m) / (n + 1.0) > rate:
        m -= 1
    return min(m, n - 1)


def _needed(rate: float) -> int:
    """The smallest n with 1/(n + 1) ≤ rate."""
    n = max(1, math.ceil(1 / rate) - 2)
    while 1.0 / (n + 1.0) > rate:
        n += 1
    return n
