"""Scores that are fitted to held-out inliers: definitions, one class each. No outlier, label or gradient is used.

A detector is fitted by ``fit`` from rows that the calibration does not see, kept as arrays in detectors.npz, and gives
each row of service.measured one number, higher for what is more anomalous. Rows are scored one at a time.

    typicality   |−elbo − its mean|: in a typical set, or not (Nalisnick et al. 2019, arXiv:1906.02994, eq. 5, one row)
    complexity   −elbo beyond what the code length explains (Serra et al. 2020, eq. 3), the slope fitted to the inliers,
                 because a length in one code and a likelihood in another are not on one scale
    debiased     −elbo of the contrast-stretched image without the part that no reconstruction could have saved, by
                 pixel (Chauhan et al. 2022, arXiv:2108.08760, sec. 3.1–3.3; the best that was reached at each level)
    path         norms of x − x̂, μ, σ made Gaussian, joined by Mahalanobis distance or by COPOD (Li et al. 2020)
    latent       density of the encoded inliers, by the distance to the nearest (Loftsgaarden & Quesenberry 1965)
    residual     x − x̂ in units of its deviation at each place: log of the mean square
    statistics   Mahalanobis distance of service.measured.statistics, log of the mean square
    combination  Σ −log of its parts' tail probabilities (Fisher 1932), the tails fitted beyond their 90% quantile by
                 an exponential (Pickands 1975, with shape 0)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Self

import numpy as np

from service import estimators
from service.bundle import DETECTORS, FITTED, Bundle, Manifest, ScoreDefinition
from service.codelength import code_length
from service.errors import BundleFormatError
from service.gaussian import Gaussian, normalised, quantiles
from service.measured import Measured, Row, path_statistics, statistics

Arrays = dict[str, np.ndarray]
REFERENCE_NUMBERS = 2**18  # of encoded inliers that a bundle carries: a megabyte
NEIGHBOURS = 5
TAIL = 0.9  # quantile from which a tail is taken for exponential
LEVELS = 256
STRETCH = (5, 95)  # percentiles of an image that contrast stretching sends to 0 and 1
BEST = 0.95  # quantile of the log-likelihoods at a level that counts as the best that can be reached


class Detector(ABC):
    """Fitted numbers of one score; ``parameters`` names the arrays."""

    parameters: ClassVar[tuple[str, ...]]
    stretched: ClassVar[bool] = False
    """Whether it looks at contrast-stretched images."""

    def __init__(self, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> None:
        if set(arrays) != set(self.parameters):
            raise BundleFormatError(
                f"{DETECTORS}: a {definition.estimator} has {sorted(arrays)}, expected {sorted(self.parameters)}"
            )
        for name, array in arrays.items():
            if array.dtype not in (np.float64, np.float32) or not np.isfinite(array).all():
                raise BundleFormatError(f"{DETECTORS}: {definition.estimator}.{name} is not finite floating point")
        self.arrays, self.definition, self.manifest = arrays, definition, manifest

    @classmethod
    @abstractmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        """From held-out inliers, a batch each of ``parts``."""

    @abstractmethod
    def score_row(self, row: Row) -> float:
        """The score of one row."""

    def score(self, rows: Measured) -> np.ndarray:
        """Scores of N rows, float64 [N]."""
        return np.array([self.score_row(rows.row(i)) for i in range(len(rows.x))], np.float64)


class Typicality(Detector):
    """|−elbo − E[−elbo]|, nats."""

    parameters = ("mean",)

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        return cls({"mean": np.array(_surprisals(parts).mean())}, definition, manifest)

    def score_row(self, row: Row) -> float:
        return abs(_surprisal(row) - float(self.arrays["mean"]))


class Complexity(Detector):
    """−elbo − (a L(x) + b), nats: the line fitted by least squares to the inliers."""

    parameters = ("line",)

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        surprisals = _surprisals(parts)
        lengths = np.array([code_length(x) for part in parts for x in part.x])
        spread = lengths - lengths.mean()
        slope = float(spread @ surprisals / (spread @ spread)) if spread.any() else 0.0
        return cls({"line": np.array([slope, surprisals.mean() - slope * lengths.mean()])}, definition, manifest)

    def score_row(self, row: Row) -> float:
        slope, intercept = self.arrays["line"]
        return float(_surprisal(row) - (slope * code_length(row.x) + intercept))


class Debiased(Detector):
    """rate + Σ over pixels of (best log p at the pixel's level − log p), nats, of the stretched image."""

    parameters = ("best",)
    stretched = True

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        channels = manifest.signature.shape[0]
        best = np.zeros((channels, LEVELS))
        for channel in range(channels):
            levels = np.concatenate([_levels(part.x[:, channel]).ravel() for part in parts])
            log_p = -np.concatenate([part.distortion[:, channel].ravel() for part in parts])
            known = np.unique(levels)
            order = np.argsort(levels, kind="stable")
            groups = np.split(log_p[order], np.searchsorted(levels[order], known[1:]))
            best[channel] = np.interp(np.arange(LEVELS), known, [np.quantile(group, BEST) for group in groups])
        return cls({"best": best}, definition, manifest)

    def score_row(self, row: Row) -> float:
        best = sum(float(levels[_levels(x)].sum()) for levels, x in zip(self.arrays["best"], row.x, strict=True))
        return _surprisal(row) + best


class Path(Detector):
    """Norms of the likelihood path, made Gaussian by their quantiles; see service.measured.path_statistics."""

    parameters = ("quantiles", "loc", "scale", "whitening", "skewness")

    def __init__(self, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> None:
        super().__init__(arrays, definition, manifest)
        self._gaussian = Gaussian(arrays["loc"], arrays["scale"], arrays["whitening"])

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        rows = np.array([_path(row, manifest) for row in _rows(parts)])
        grid = quantiles(rows)
        gaussian = Gaussian.fit(np.array([normalised(row, grid) for row in rows]))
        centred = rows - rows.mean(axis=0)
        skewness = (centred**3).mean(axis=0) / np.maximum(rows.std(axis=0) ** 3, 1e-12)
        arrays = {"loc": gaussian.loc, "scale": gaussian.scale, "whitening": gaussian.whitening}
        return cls({"quantiles": grid, "skewness": skewness, **arrays}, definition, manifest)

    def score_row(self, row: Row) -> float:
        values = _path(row, self.manifest)
        if self.definition.method == "copod":
            return _copod(values, self.arrays["quantiles"], self.arrays["skewness"])
        return math.log(self._gaussian.distance(normalised(values, self.arrays["quantiles"])) / len(values) + 1e-12)


class Latent(Detector):
    """L log r, nats up to a constant: r is the mean distance of loc to its nearest neighbours among encoded inliers.

    The inliers are training images, say; the bundle carries their codes.
    """

    parameters = ("reference",)

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        return cls.of(np.concatenate([part.loc for part in parts]), definition, manifest)

    @classmethod
    def of(cls, codes: np.ndarray, definition: ScoreDefinition, manifest: Manifest) -> Self:
        """From the inliers' codes, float32 [m,L]."""
        return cls({"reference": np.ascontiguousarray(codes, np.float32)}, definition, manifest)

    def score_row(self, row: Row) -> float:
        reference = self.arrays["reference"]
        squares = ((reference - row.loc) ** 2).sum(axis=1)
        count = min(NEIGHBOURS, len(squares))
        nearest = np.sort(np.partition(squares, count - 1)[:count].astype(np.float64))
        return len(row.loc) * math.log(float(np.sqrt(nearest).mean()) + 1e-12)


class Residual(Detector):
    """log of the mean of ((x − x̂ − m)/s)² over places, m and s the inliers' mean and deviation at each.

    The variance of a place is raised by the mean variance, lest places that never change decide alone.
    """

    parameters = ("mean", "scale")

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        total, squares = np.zeros(manifest.signature.shape), np.zeros(manifest.signature.shape)
        for part in parts:
            residual = part.x.astype(np.float64) - part.mean
            total, squares = total + residual.sum(axis=0), squares + (residual**2).sum(axis=0)
        count = sum(len(part.x) for part in parts)
        mean = total / count
        variance = np.maximum(squares / count - mean**2, 0.0)
        scale = np.sqrt(variance + max(float(variance.mean()), 1e-12))
        return cls({"mean": mean.astype(np.float32), "scale": scale.astype(np.float32)}, definition, manifest)

    def score_row(self, row: Row) -> float:
        return math.log(float((self.deviations(row.x, row.mean) ** 2).mean()) + 1e-12)

    def deviations(self, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """(x − x̂ − m)/s of one row or of many, float64."""
        return (x.astype(np.float64) - mean - self.arrays["mean"]) / self.arrays["scale"]


class Statistics(Detector):
    """log of Mahalanobis' squared distance over the number of statistics; see service.measured.statistics."""

    parameters = ("loc", "scale", "whitening")

    def __init__(self, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> None:
        super().__init__(arrays, definition, manifest)
        self._gaussian = Gaussian(**arrays)

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        gaussian = Gaussian.fit(np.array([_statistics(row, manifest) for row in _rows(parts)]))
        arrays = {"loc": gaussian.loc, "scale": gaussian.scale, "whitening": gaussian.whitening}
        return cls(arrays, definition, manifest)

    def score_row(self, row: Row) -> float:
        values = _statistics(row, self.manifest)
        return math.log(self._gaussian.distance(values) / len(values) + 1e-12)


class Combination:
    """Σ over parts of −log P(part ≥ score) for an inlier, nats; fitted to the parts' scores of held-out inliers.

    Inside the fitted scores the probability is the share of them that are as high; beyond the 90% quantile u it is
    0.1 exp(−(s − u)/σ), σ the mean excess.
    """

    parameters = ("knots", "surprisals", "scale")

    def __init__(self, arrays: Arrays, parts: int) -> None:
        if set(arrays) != set(self.parameters) or any(len(array) != parts for array in arrays.values()):
            raise BundleFormatError(f"{DETECTORS}: a combination of {parts} has {sorted(arrays)}")
        self.arrays = arrays

    @classmethod
    def fit(cls, scores: np.ndarray) -> Self:
        """From the parts' scores of inliers that no part was fitted to, float64 [n,P]."""
        ordered = np.sort(scores, axis=0)
        n = len(ordered)
        below = max(1, math.ceil(TAIL * n))
        share = 1 - np.arange(below) / n  # of the inliers that score at least as high
        surprisals = -np.log(share)
        knots = ordered[:below].T
        end = knots[:, -1:]
        excess = np.maximum(ordered[below - 1 :].T - end, 0.0).mean(axis=1)
        scale = np.maximum(excess, 1e-6 * (1e-6 + np.ptp(ordered, axis=0)) + 1e-9)
        picked = np.unique(np.linspace(0, below - 1, min(below, LEVELS)).astype(int))
        arrays = {"knots": knots[:, picked], "surprisals": np.tile(surprisals[picked], (len(knots), 1)), "scale": scale}
        return cls({name: np.ascontiguousarray(array) for name, array in arrays.items()}, scores.shape[1])

    def score(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Σ −log tail probability, float64 [N], of the parts' scores, [N] each."""
        return np.sum([self._surprisal(index, scores) for index, scores in enumerate(parts)], axis=0)

    def _surprisal(self, index: int, scores: np.ndarray) -> np.ndarray:
        knots, surprisals = self.arrays["knots"][index], self.arrays["surprisals"][index]
        beyond = np.maximum(scores - knots[-1], 0.0) / self.arrays["scale"][index]
        return np.interp(scores, knots, surprisals) + beyond


CLASSES: Mapping[str, type[Detector]] = {
    "typicality": Typicality,
    "complexity": Complexity,
    "debiased": Debiased,
    "path": Path,
    "latent": Latent,
    "residual": Residual,
    "statistics": Statistics,
}


def load_detectors(bundle: Bundle) -> dict[str, Detector | Combination]:
    """The detectors of the bundle's fitted scores, by score name. Raises BundleFormatError."""
    manifest = bundle.manifest
    fitted = {name: score for name, score in manifest.scores.items() if score.estimator in FITTED}
    if not fitted:
        return {}
    found: dict[str, Arrays] = {name: {} for name in fitted}
    for key, array in bundle.arrays(DETECTORS).items():
        name, _, parameter = key.rpartition("/")
        if name not in found:
            raise BundleFormatError(f"{DETECTORS} holds {key}, of no fitted score of the manifest")
        found[name][parameter] = array
    return {
        name: Combination(found[name], len(score.of))
        if score.estimator == "combination"
        else CLASSES[score.estimator](found[name], score, manifest)
        for name, score in fitted.items()
    }


def to_arrays(detectors: Mapping[str, Detector | Combination]) -> Arrays:
    """The content of detectors.npz: SCORE/PARAMETER -> array."""
    return {
        f"{name}/{parameter}": array for name, found in detectors.items() for parameter, array in found.arrays.items()
    }


def stretched(x: np.ndarray) -> np.ndarray:
    """Images [N,C,H,W] after contrast stretching: the 5th and 95th percentile of each become 0 and 1, in 8 bits.

    An image without contrast stays as it is.
    """
    out = np.empty_like(x)
    for image, result in zip(x, out, strict=True):
        low, high = np.percentile(image, STRETCH)
        scaled = (image - low) / (high - low) if high - low > 1 / LEVELS else image
        result[...] = np.rint(np.clip(scaled, 0, 1) * 255) / 255
    return out


def _rows(parts: Iterable[Measured]) -> Iterable[Row]:
    return (part.row(i) for part in parts for i in range(len(part.x)))


def _surprisal(row: Row) -> float:
    """−elbo, nats."""
    return -float(estimators.mean(row.log_p_x + row.log_p_z - row.log_q))


def _surprisals(parts: Sequence[Measured]) -> np.ndarray:
    return np.array([_surprisal(row) for row in _rows(parts)])


def _path(row: Row, manifest: Manifest) -> np.ndarray:
    return np.array(list(path_statistics(row, manifest).values()))


def _statistics(row: Row, manifest: Manifest) -> np.ndarray:
    return np.array(list(statistics(row, manifest).values()))


def _levels(x: np.ndarray) -> np.ndarray:
    return np.rint(x * (LEVELS - 1)).astype(np.intp)


def _copod(values: np.ndarray, grid: np.ndarray, skewness: np.ndarray) -> float:
    """max of Σ −log F, Σ −log(1 − F), and Σ of the tail that each skewness points to (Li et al. 2020, alg. 1)."""
    count = grid.shape[1]
    below = np.array([np.searchsorted(knots, value, "right") for knots, value in zip(grid, values, strict=True)])
    above = np.array([count - np.searchsorted(knots, value, "left") for knots, value in zip(grid, values, strict=True)])
    left, right = -np.log((below + 1) / (count + 1)), -np.log((above + 1) / (count + 1))
    return float(max(left.sum(), right.sum(), np.where(skewness < 0, left, right).sum()))
