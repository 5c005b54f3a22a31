"""Conformal p-values: how often an inlier scores at least as high (Vovk et al. 2005; Bates et al. 2023, eq. 2).

For a new inlier, exchangeable with the calibration images, P(p ≤ α) ≤ α for every α: flagging p ≤ α has a
false-positive rate of at most α, whatever the model. The probability is over the calibration images too. Given n of
them, scores without ties and l = ⌊α(n + 1)⌋, the rate is a draw from Beta(l, n + 1 − l) (Vovk 2012).

Beside all calibration scores, those of named groups can stand (the class of an image, the camera it comes from). An
image of a group is compared with that group's alone, so that the promise holds within every group (Mondrian
conformal: Vovk et al. 2005, section 4.5) and not only on average over them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from service.bundle.files import Bundle
from service.bundle.manifest import CALIBRATION
from service.errors import BundleFormatError, InvalidInput, UnsupportedVerb

LEAST_RATE = 1e-9
SEPARATOR = "@"  # no name of a score may hold it: bundle.Name
GROUP = re.compile(r"\w(?:[\w .+-]*[\w+])?")
GROUP_LENGTH = 64  # of its name as ``composed``


def calibration_key(score_name: str, group: str | None = None) -> str:
    """Key of calibration.npz: SCORE for all images, SCORE@GROUP for those of a group.

    Raises InvalidInput for a group's name that is not 1 to 64 letters, digits, and _ . + - or spaces within. Letters
    of any script will do; they are normalised (NFC), since file systems differ in how they write an accent.
    """
    if group is None:
        return score_name
    name = composed(group)
    if len(name) > GROUP_LENGTH or not GROUP.fullmatch(name):
        raise InvalidInput(
            f"a group's name is 1 to {GROUP_LENGTH} letters, digits, and _ . + - or spaces within: {group[:80]!r}"
        )
    return f"{score_name}{SEPARATOR}{name}"


def composed(group: str) -> str:
    """A group's name with every accent part of its letter (NFC): one name, however it was typed."""
    return unicodedata.normalize("NFC", group)


class Calibrator:
    """Held-out inlier scores by ``calibration_key``: sorted float64 [n] each; ``name in calibrator`` tells the scores.

    >>> calibrator = Calibrator({"elbo": np.arange(99.0), "elbo@dark": np.arange(90.0, 99.0)})
    >>> calibrator.p_values("elbo", np.array([98.0, -1.0, 98.0]), [None, None, "dark"])
    array([0.02, 1.  , 0.2 ])
    """

    def __init__(self, scores: dict[str, np.ndarray]) -> None:
        for key, values in scores.items():
            _check_key(key, scores)
            if values.dtype != np.float64 or values.ndim != 1 or len(values) == 0:
                raise BundleFormatError(f"calibration of {key}: expected float64 [n], n ≥ 1")
            if not np.isfinite(values).all() or (np.diff(values) < 0).any():
                raise BundleFormatError(f"calibration of {key}: expected finite scores in ascending order")
        self._scores = scores
        self.names = sorted(key for key in scores if SEPARATOR not in key)
        """Names of the calibrated scores."""

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Calibrator:
        """The bundle's calibration, empty where it has none. Raises BundleFormatError when it is no such thing."""
        if bundle.manifest.calibration is None:
            return cls({})
        calibrator = cls(bundle.arrays(CALIBRATION))
        unknown = sorted(set(calibrator.names) - set(bundle.manifest.scores))
        if unknown:
            raise BundleFormatError(f"{CALIBRATION} holds scores that the manifest does not define: {unknown}")
        return calibrator

    def __contains__(self, score_name: str) -> bool:
        return score_name in self.names

    def groups(self, score_name: str) -> list[str]:
        """Names of the groups that have a calibration of their own for this score."""
        prefix = score_name + SEPARATOR
        return sorted(key.removeprefix(prefix) for key in self._scores if key.startswith(prefix))

    def scores(self, score_name: str) -> np.ndarray:
        """Those of all images, float64 [n], ascending. Raises UnsupportedVerb for a score without any."""
        return self._of(score_name)

    def n(self, score_name: str, group: str | None = None) -> int:
        """Number of calibration scores. Raises UnsupportedVerb for a score without any, InvalidInput for a group."""
        return len(self._of(score_name, group))

    def least_p(self, score_name: str, group: str | None = None) -> float:
        """The smallest p-value that so many calibration scores can give, 1/(n + 1). Raises as ``n``."""
        return 1.0 / (self.n(score_name, group) + 1.0)

    def p_values(self, score_name: str, scores: np.ndarray, groups: Sequence[str | None] | None = None) -> np.ndarray:
        """(1 + #{calibration ≥ s}) / (n + 1) of each score s: float64 [N] in (0, 1].

        ``groups`` names for each score the group whose calibration it is held against; None means all images.
        Raises UnsupportedVerb for a score that is not calibrated, InvalidInput for NaN or an unknown group.
        """
        calibration, scores = self._of(score_name), np.asarray(scores, np.float64)
        if np.isnan(scores).any():
            raise InvalidInput("a score is NaN, which has no p-value")
        if groups is None:
            return p_values(calibration, scores)
        if len(groups) != len(scores):
            raise InvalidInput(f"{len(groups)} groups for {len(scores)} scores: expected one, or null, for each")
        if len(set(groups)) == 1:
            return p_values(self._of(score_name, groups[0]), scores)
        p = np.empty(len(scores))
        for group in set(groups):
            members = np.array([of == group for of in groups])
            p[members] = p_values(self._of(score_name, group), scores[members])
        return p

    def counts(self, score_name: str, scores: np.ndarray, group: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """#{calibration > s} and #{calibration ≥ s} of each score s: int64 [N] twice. Raises as ``p_values``."""
        calibration, scores = self._of(score_name, group), np.asarray(scores, np.float64)
        if np.isnan(scores).any():
            raise InvalidInput("a score is NaN, which has no p-value")
        above, at_least = (len(calibration) - calibration.searchsorted(scores, side) for side in ("right", "left"))
        return above, at_least

    def threshold(self, score_name: str, false_positive_rate: float, group: str | None = None) -> float:
        """The smallest score, in nats, whose p-value is at most the rate: p ≤ rate exactly when score ≥ threshold.

        Raises UnsupportedVerb for a score that is not calibrated, InvalidInput for an unknown group, a rate outside
        [1e-9, 1) or one so small that no score could reach it with this many calibration scores.
        """
        calibration = self._of(score_name, group)
        n, rate = len(calibration), _checked_rate(false_positive_rate)
        allowed = allowed_above(n, rate)
        if allowed < 0:
            whose = score_name if group is None else f"{score_name} of group {group!r}"
            raise InvalidInput(
                f"a false-positive rate of {rate:g} needs at least {needed(rate)} calibration scores, "
                f"{whose} has {n}: ask for {1 / (n + 1):.3g} or more"
            )
        # At most `allowed` calibration scores are ≥ s exactly when s lies above the next one down.
        return float(np.nextafter(calibration[n - 1 - allowed], np.inf))

    def thresholds(self, score_name: str, false_positive_rate: float) -> dict[str, float]:
        """``threshold`` of every group, by name. Raises as ``threshold``, for the first group that is too small."""
        return {group: self.threshold(score_name, false_positive_rate, group) for group in self.groups(score_name)}

    def _of(self, score_name: str, group: str | None = None) -> np.ndarray:
        if score_name not in self:
            raise UnsupportedVerb(f"score {score_name!r} has no calibration here; calibrated: {self.names or 'none'}")
        key = calibration_key(score_name, group)
        if key not in self._scores:
            known = self.groups(score_name)
            raise InvalidInput(f"{score_name} has no calibration of group {group!r}; known groups: {known or 'none'}")
        return self._scores[key]


def p_values(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(1 + #{calibration ≥ s}) / (n + 1), float64 [N], against sorted ``calibration`` [n]."""
    return p_values_of(len(calibration) - np.searchsorted(calibration, scores, side="left"), len(calibration))


def p_values_of(at_least: np.ndarray, n: int) -> np.ndarray:
    """(1 + #{calibration ≥ s}) / (n + 1), float64 [N], where so many of n calibration scores are at least as great."""
    p: np.ndarray = (1.0 + at_least) / (n + 1.0)
    return p


def smoothed(calibration: np.ndarray, scores: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """(#{calibration > s} + U (1 + #{calibration = s})) / (n + 1) with U ~ U(0, 1]: float64 [N] in (0, 1].

    The randomised p-value (Vovk et al. 2005, eq. 2.20): of a new inlier exactly uniform, ties or not, where
    ``p_values`` is only never too small. For tests of uniformity; verdicts must not depend on a draw. Against one
    fixed calibration the p-values of many inliers are independent, but follow its law, within O(1/√n) of uniform.

    Args:
        calibration: sorted, float64 [n].
        scores: float64 [N], no NaN.
        random: a stream of the caller's own seed; N draws are taken from it.
    """
    above = len(calibration) - np.searchsorted(calibration, scores, side="right")
    at_least = len(calibration) - np.searchsorted(calibration, scores, side="left")
    u = 1.0 - random.random_sample(np.shape(scores))
    return (above + u * (1.0 + at_least - above)) / (len(calibration) + 1.0)


def _check_key(key: str, scores: dict[str, np.ndarray]) -> None:
    score_name, separator, group = key.partition(SEPARATOR)
    if not separator:
        return
    try:
        well_formed = calibration_key(score_name, group) == key
    except InvalidInput:
        well_formed = False
    if not well_formed or score_name not in scores:
        raise BundleFormatError(f"calibration of {key[:160]!r}: expected SCORE or SCORE{SEPARATOR}GROUP beside SCORE")


def _checked_rate(rate: float) -> float:
    if not LEAST_RATE <= rate < 1:
        raise InvalidInput(f"false_positive_rate is {rate}, expected a number from {LEAST_RATE:g} to below 1")
    return float(rate)


def allowed_above(n: int, rate: float) -> int:
    """The largest m with (1 + m)/(n + 1) ≤ rate as p_values computes it, below 0 when there is none."""
    m = math.floor(rate * (n + 1)) + 1  # rounding can be one off either way; from above, step down to the truth
    while m >= 0 and (1.0 + m) / (n + 1.0) > rate:
        m -= 1
    return min(m, n - 1)


def needed(rate: float) -> int:
    """The smallest n with 1/(n + 1) ≤ rate: so many calibration scores can answer it."""
    n = max(1, math.ceil(1 / rate) - 2)
    while 1.0 / (n + 1.0) > rate:
        n += 1
    return n
