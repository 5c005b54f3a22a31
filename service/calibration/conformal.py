"""Conformal p-values: the share of inliers that score at least as high (Vovk et al. 2005; Bates et al. 2023, eq. 2).

For a new inlier, exchangeable with the calibration images, P(p ≤ α) ≤ α for every α: flagging p ≤ α has a
false-positive rate of at most α, whatever the model. The probability is over the calibration images too. Given n of
them, scores without ties and l = ⌊α(n + 1)⌋, the rate is a draw from Beta(l, n + 1 − l) (Vovk 2012).

Beside the calibration scores of all images there can be those of named groups, such as the class of an image or the
camera that took it. An image of a group is compared with that group's scores alone, so that the false-positive rate is
kept within every group (Mondrian conformal prediction: Vovk et al. 2005, section 4.5), not only on average over them.
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

MIN_RATE = 1e-9
SEPARATOR = "@"  # between score and group in a key; the manifest forbids it in names of scores (bundle.Name)
GROUP = re.compile(r"\w(?:[\w .+-]*[\w+])?")
GROUP_LENGTH = 64  # characters of a group's name after ``normalise_group``


def calibration_key(score_name: str, group: str | None = None) -> str:
    """Return the key in calibration.npz of a score: SCORE for all images, SCORE@GROUP for those of a group.

    A group's name is 1 to 64 letters of any script, digits, and _ . + - or spaces within. It is normalised (NFC), since
    file systems differ in how they store an accent.

    Raises:
        InvalidInput: the group's name is none.
    """
    if group is None:
        return score_name
    name = normalise_group(group)
    if len(name) > GROUP_LENGTH or not GROUP.fullmatch(name):
        raise InvalidInput(
            f"a group's name is 1 to {GROUP_LENGTH} letters, digits, and _ . + - or spaces within: {group[:80]!r}"
        )
    return f"{score_name}{SEPARATOR}{name}"


def normalise_group(group: str) -> str:
    """Bring a group's name to Unicode's composed form (NFC), so that it is the same however its accents were typed."""
    return unicodedata.normalize("NFC", group)


class Calibrator:
    """Computes p-values and thresholds from the scores of held-out inliers; ``name in calibrator`` tells which scores.

    Args:
        scores: by ``calibration_key``, float64 [n] each, n ≥ 1, finite and ascending. A group's key needs its score's
            key beside it.

    Raises:
        BundleFormatError: the scores are not of that kind.

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
        """Read a bundle's calibration, empty if it has none.

        Raises:
            BundleFormatError: the scores are malformed, or some are not defined by the manifest.
        """
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
        """Return the names of the groups that have calibration scores of their own for a score, sorted."""
        prefix = score_name + SEPARATOR
        return sorted(key.removeprefix(prefix) for key in self._scores if key.startswith(prefix))

    def scores(self, score_name: str) -> np.ndarray:
        """Return the calibration scores of all images, float64 [n], ascending.

        Raises:
            UnsupportedVerb: the score has none.
        """
        return self._calibration(score_name)

    def n(self, score_name: str, group: str | None = None) -> int:
        """Return the number n of calibration scores.

        Raises:
            UnsupportedVerb: the score is not calibrated.
            InvalidInput: the group is unknown.
        """
        return len(self._calibration(score_name, group))

    def p_values(self, score_name: str, scores: np.ndarray, groups: Sequence[str | None] | None = None) -> np.ndarray:
        """Return the p-value (1 + #{calibration ≥ s}) / (n + 1) of each score s, float64 [N] in (0, 1].

        Args:
            scores: float64 [N]; infinities are allowed.
            groups: for each score the group whose calibration scores it is compared with; None stands for all images.

        Raises:
            UnsupportedVerb: the score is not calibrated.
            InvalidInput: a score is NaN, a group is unknown, or the groups are not as many as the scores.
        """
        calibration, scores = self._calibration(score_name), np.asarray(scores, np.float64)
        if np.isnan(scores).any():
            raise InvalidInput("a score is NaN, which has no p-value")
        if groups is None:
            return p_values(calibration, scores)
        if len(groups) != len(scores):
            raise InvalidInput(f"{len(groups)} groups for {len(scores)} scores: expected one, or null, for each")
        if len(set(groups)) == 1:
            return p_values(self._calibration(score_name, groups[0]), scores)
        p = np.empty(len(scores))
        for group in set(groups):
            members = np.array([name == group for name in groups])
            p[members] = p_values(self._calibration(score_name, group), scores[members])
        return p

    def counts(self, score_name: str, scores: np.ndarray, group: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return #{calibration > s} and #{calibration ≥ s} of each score s, int64 [N] each. Raises as ``p_values``."""
        calibration, scores = self._calibration(score_name, group), np.asarray(scores, np.float64)
        if np.isnan(scores).any():
            raise InvalidInput("a score is NaN, which has no p-value")
        above, at_least = (len(calibration) - calibration.searchsorted(scores, side) for side in ("right", "left"))
        return above, at_least

    def threshold(self, score_name: str, false_positive_rate: float, group: str | None = None) -> float:
        """Return the smallest score, in its own unit, with p-value ≤ rate: p ≤ rate exactly when score ≥ threshold.

        Raises:
            UnsupportedVerb: the score is not calibrated.
            InvalidInput: the group is unknown, the rate is outside [1e-9, 1), or so small that no score could reach it
                with this many calibration scores.
        """
        calibration = self._calibration(score_name, group)
        n, rate = len(calibration), _checked_rate(false_positive_rate)
        max_above = max_calibration_above(n, rate)
        if max_above < 0:
            described = score_name if group is None else f"{score_name} of group {group!r}"
            raise InvalidInput(
                f"a false-positive rate of {rate:g} needs at least {min_calibration_size(rate)} calibration scores, "
                f"{described} has {n}: ask for {1 / (n + 1):.3g} or more"
            )
        # At most max_above calibration scores are ≥ s exactly when s lies above the next lower one.
        return float(np.nextafter(calibration[n - 1 - max_above], np.inf))

    def thresholds(self, score_name: str, false_positive_rate: float) -> dict[str, float]:
        """Return the ``threshold`` of every group by name. Raises as ``threshold`` does, for any of them."""
        return {group: self.threshold(score_name, false_positive_rate, group) for group in self.groups(score_name)}

    def _calibration(self, score_name: str, group: str | None = None) -> np.ndarray:
        """Return the calibration scores of a score and a group, float64 [n]. Raises as ``n`` does."""
        if score_name not in self:
            raise UnsupportedVerb(f"score {score_name!r} has no calibration here; calibrated: {self.names or 'none'}")
        key = calibration_key(score_name, group)
        if key not in self._scores:
            groups = self.groups(score_name)
            raise InvalidInput(f"{score_name} has no calibration of group {group!r}; known groups: {groups or 'none'}")
        return self._scores[key]


def p_values(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return (1 + #{calibration ≥ s}) / (n + 1) of each score s, float64 [N], for ascending ``calibration`` [n]."""
    return p_values_from_counts(len(calibration) - np.searchsorted(calibration, scores, side="left"), len(calibration))


def p_values_from_counts(at_least: np.ndarray, n: int) -> np.ndarray:
    """Return (1 + at_least) / (n + 1), float64 [N], for counts #{calibration ≥ s} among n calibration scores."""
    p: np.ndarray = (1.0 + at_least) / (n + 1.0)
    return p


def _check_key(key: str, scores: dict[str, np.ndarray]) -> None:
    """Raise BundleFormatError unless a key is SCORE, or SCORE@GROUP beside SCORE."""
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
    if not MIN_RATE <= rate < 1:
        raise InvalidInput(f"false_positive_rate is {rate}, expected a number from {MIN_RATE:g} to below 1")
    return float(rate)


def max_calibration_above(n: int, rate: float) -> int:
    """Return the largest m with (1 + m)/(n + 1) ≤ rate in the arithmetic of ``p_values``; below 0 if there is none.

    A score is flagged at that rate if at most m of n calibration scores are as high.
    """
    m = math.floor(rate * (n + 1)) + 1  # rounding can be off by one either way, so start above and step down
    while m >= 0 and (1.0 + m) / (n + 1.0) > rate:
        m -= 1
    return min(m, n - 1)


def min_calibration_size(rate: float) -> int:
    """Return the smallest n with 1/(n + 1) ≤ rate, the calibration scores that it takes to flag anything."""
    n = max(1, math.ceil(1 / rate) - 2)
    while 1.0 / (n + 1.0) > rate:
        n += 1
    return n
