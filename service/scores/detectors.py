"""Scores that are fitted to held-out inliers: definitions, one class each. No outlier, label or gradient is used.

A detector is fitted by ``fit`` from rows that the calibration does not see, kept as arrays in detectors.npz, and gives
each row of service.scores.forward_pass one number, higher for what is more anomalous. A row's score is that of the row
alone.

    typicality   |−elbo − its mean|: in a typical set, or not (Nalisnick et al. 2019, arXiv:1906.02994, for one row)
    complexity   −elbo beyond what the code length explains (Serra et al. 2020, arXiv:1909.11480), the slope fitted to
                 the inliers, because a length in one code and a likelihood in another are not on one scale
    debiased     −elbo of the contrast-stretched image without the part that no reconstruction could have saved, by
                 pixel (after Chauhan et al. 2022, arXiv:2108.08760; here the best that was reached at each level)
    path         norms of x − x̂, μ, σ made Gaussian and joined by Mahalanobis distance, or joined by COPOD (Li et al.
                 2020, arXiv:2009.09463)
    latent       density of the encoded inliers, by the distance to the nearest (Loftsgaarden & Quesenberry 1965)
    residual     x − x̂ in units of its deviation at each place: log of the mean square
    statistics   Mahalanobis distance of service.scores.forward_pass.statistics, log of the mean square
    combination  Σ −log of its parts' tail probabilities (Fisher 1932), the tails fitted beyond their 90% quantile by
                 an exponential (Pickands 1975, with shape 0)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Self

import numpy as np

from service.bundle.files import Bundle
from service.bundle.manifest import DETECTORS, FITTED, Manifest, ScoreDefinition
from service.errors import BundleFormatError
from service.pixels import unit_levels
from service.scores import bounds as estimators
from service.scores import forward_pass as measured
from service.scores.detector_arrays import Arrays, Spec, Specs, check_arrays
from service.scores.forward_pass import Measured, path_statistics, statistic_names, statistics, table
from service.scores.gaussian import QUANTILES, Gaussian, normalised, quantiles
from service.scores.nearest_neighbours import Neighbours
from service.scores.piecewise_linear import PiecewiseLinear

REFERENCE_NUMBERS = 2**18  # of encoded inliers that a bundle is given: a megabyte
MOST_REFERENCE_NUMBERS = 2**24  # that a bundle may bring: every row that is scored is compared with all of them
NEIGHBOURS = 5
TAIL = 0.9  # quantile from which a tail is taken for exponential
LEVELS = 256
RESERVED = "@"  # before the keys of detectors.npz that are of no score (but of the map): no score's name holds it
STRETCH = (5, 95)  # percentiles of an image that contrast stretching sends to 0 and 1
BEST = 0.95  # quantile of the log-likelihoods at a level that counts as the best that can be reached
LEAST_RESIDUAL = 1e-3  # by the mean |x|, or by 1 where x is 0: what counts as one deviation at least of a residual
LEAST_EXCESS = 1e-6  # by 1 + the largest |score|: a mean excess that rounding alone may cause
SHARED_UNITS: Mapping[str, tuple[int, ...]] = {"image": (0, 1, 2), "signal": (1, 2), "vector": ()}
"""By kind of input: the axes of [C,H,W] along which the numbers are in one unit (a backbone's features are, all)."""


class Detector(ABC):
    """Fitted numbers of one score."""

    stretched: ClassVar[bool] = False
    """Whether it looks at contrast-stretched images."""

    def __init__(self, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> None:
        """Raises BundleFormatError for arrays that are none of such a detector's."""
        check_arrays(definition.estimator, arrays, self.specs(manifest))
        self.arrays, self.definition, self.manifest = arrays, definition, manifest

    @classmethod
    @abstractmethod
    def specs(cls, manifest: Manifest) -> Specs:
        """The arrays that it has for such a model."""

    @classmethod
    @abstractmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        """From held-out inliers, a batch each of ``parts``."""

    @abstractmethod
    def score(self, rows: Measured) -> np.ndarray:
        """Scores of N rows, float64 [N]."""


class Typicality(Detector):
    """|−elbo − E[−elbo]|, nats."""

    @classmethod
    def specs(cls, manifest: Manifest) -> Specs:
        return {"mean": Spec(())}

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        return cls({"mean": np.array(_surprisals(parts).mean())}, definition, manifest)

    def score(self, rows: Measured) -> np.ndarray:
        return np.abs(_surprisal(rows) - float(self.arrays["mean"]))


class Complexity(Detector):
    """−elbo − (a L(x) + b), nats: the line fitted by least squares to the inliers."""

    @classmethod
    def specs(cls, manifest: Manifest) -> Specs:
        return {"line": Spec((2,))}

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        surprisals = _surprisals(parts)
        lengths = np.concatenate([part.code_lengths for part in parts])
        spread = lengths - lengths.mean()
        varies = spread.std() > 1e-9 * lengths.mean()  # more than rounding alone may cause
        slope = float(spread @ (surprisals - surprisals.mean()) / (spread @ spread)) if varies else 0.0
        return cls({"line": np.array([slope, surprisals.mean() - slope * lengths.mean()])}, definition, manifest)

    def score(self, rows: Measured) -> np.ndarray:
        slope, intercept = self.arrays["line"]
        beyond: np.ndarray = _surprisal(rows) - (slope * rows.code_lengths + intercept)
        return beyond


class Debiased(Detector):
    """rate + Σ over pixels of (best log p at the pixel's level − log p), nats, of the stretched image."""

    stretched = True

    @classmethod
    def specs(cls, manifest: Manifest) -> Specs:
        return {"best": Spec((manifest.signature.shape[0], LEVELS))}

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

    def score(self, rows: Measured) -> np.ndarray:
        best = [levels[_levels(rows.x[:, channel])] for channel, levels in enumerate(self.arrays["best"])]
        total: np.ndarray = sum(each.reshape(len(rows.x), -1).sum(axis=1) for each in best)
        return _surprisal(rows) + total


class Path(Detector):
    """Norms of the likelihood path, made Gaussian by their quantiles; see
    service.scores.forward_pass.path_statistics."""

    def __init__(self, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> None:
        super().__init__(arrays, definition, manifest)
        self._gaussian = Gaussian(arrays["loc"], arrays["scale"], arrays["whitening"])

    @classmethod
    def specs(cls, manifest: Manifest) -> Specs:
        size = len(statistic_names(path_statistics, manifest))
        grid = Spec((size, range(2, QUANTILES + 1)), order="rising")
        return {"quantiles": grid, "skewness": Spec((size,)), **_gaussian_specs(size)}

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        rows = _table(path_statistics, parts, manifest)
        grid = quantiles(rows)
        # What never changes stands at 0 with quantiles that are least drawn apart: a deviation there is one here.
        gaussian = Gaussian.fit(np.array([normalised(row, grid) for row in rows]), least=1.0)
        centred = rows - rows.mean(axis=0)
        skewness = (centred**3).mean(axis=0) / np.maximum(rows.std(axis=0) ** 3, 1e-12)
        return cls({"quantiles": grid, "skewness": skewness, **_gaussian_arrays(gaussian)}, definition, manifest)

    def score(self, rows: Measured) -> np.ndarray:
        return np.array([self._score(values) for values in table(path_statistics, rows, self.manifest)])

    def _score(self, values: np.ndarray) -> float:
        if self.definition.method == "copod":
            return _copod(values, self.arrays["quantiles"], self.arrays["skewness"])
        distance = float(self._gaussian.distance(normalised(values, self.arrays["quantiles"])))
        return math.log(distance / len(values) + 1e-12)


class Latent(Detector):
    """L log r, nats up to a constant: r is the mean distance of loc to its nearest neighbours among encoded inliers.

    The inliers are training images, say; the bundle carries their codes.
    """

    def __init__(self, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> None:
        super().__init__(arrays, definition, manifest)
        self._neighbours = Neighbours(arrays["reference"], NEIGHBOURS)

    @classmethod
    def specs(cls, manifest: Manifest) -> Specs:
        latent_dim = manifest.signature.latent_dim
        return {"reference": Spec((range(1, max(2, MOST_REFERENCE_NUMBERS // latent_dim) + 1), latent_dim))}

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        return cls.of(np.concatenate([part.loc for part in parts]), definition, manifest)

    @classmethod
    def of(cls, codes: np.ndarray, definition: ScoreDefinition, manifest: Manifest) -> Self:
        """From the inliers' codes, float32 [m,L]."""
        return cls({"reference": np.ascontiguousarray(codes, np.float32)}, definition, manifest)

    def score(self, rows: Measured) -> np.ndarray:
        locs = rows.loc
        finite = np.isfinite(locs).all(axis=1)
        nearest = self._neighbours.distances(np.where(finite[:, None], locs, np.float32(0)))
        logs: np.ndarray = locs.shape[1] * np.log(nearest.mean(axis=1) + 1e-12)
        # What the encoder has sent to infinity is infinitely far; of NaN nothing is known.
        return np.where(finite, logs, np.where(np.isnan(locs).any(axis=1), np.nan, np.inf))


class Residual(Detector):
    """log of the mean of ((x − x̂ − m)/s)² over places, m and s the inliers' mean and deviation at each.

    The variance of a place is raised by the mean variance of the places that share its unit, lest places that never
    change decide alone: all of an image and of its features, a channel of a signal. Each number of a vector has a unit
    of its own.
    """

    @classmethod
    def specs(cls, manifest: Manifest) -> Specs:
        return {"mean": Spec(manifest.signature.shape), "scale": Spec(manifest.signature.shape, positive=True)}

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        return cls(residual_moments(((part.x, part.mean) for part in parts), manifest), definition, manifest)

    def score(self, rows: Measured) -> np.ndarray:
        squares = self.deviations(rows.x, rows.mean) ** 2
        logs: np.ndarray = np.log(squares.reshape(len(squares), -1).mean(axis=1) + 1e-12)
        return logs

    def deviations(self, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """(x − x̂ − m)/s of one row or of many, float64."""
        return (x.astype(np.float64) - mean - self.arrays["mean"]) / self.arrays["scale"]


class Statistics(Detector):
    """log of Mahalanobis' squared distance over the number of statistics; see
    service.scores.forward_pass.statistics."""

    def __init__(self, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> None:
        super().__init__(arrays, definition, manifest)
        self._gaussian = Gaussian(**arrays)

    @classmethod
    def specs(cls, manifest: Manifest) -> Specs:
        return _gaussian_specs(len(statistic_names(statistics, manifest)))

    @classmethod
    def fit(cls, parts: Sequence[Measured], definition: ScoreDefinition, manifest: Manifest) -> Self:
        gaussian = Gaussian.fit(_table(statistics, parts, manifest))
        return cls(_gaussian_arrays(gaussian), definition, manifest)

    def score(self, rows: Measured) -> np.ndarray:
        values = table(statistics, rows, self.manifest)
        logs: np.ndarray = np.log(self._gaussian.distance(values) / values.shape[1] + 1e-12)
        return logs


class Combination:
    """Σ over parts of −log P(part ≥ score) for an inlier, nats; fitted to the parts' scores of held-out inliers.

    Inside the fitted scores the probability is the share of them that are as high; from their 90% quantile u on it
    falls as exp(−(s − u)/σ), σ the mean excess over u of those beyond.
    """

    def __init__(self, arrays: Arrays, parts: int, file: str = DETECTORS) -> None:
        """Raises BundleFormatError, which names ``file``, for arrays that are none of a combination of so many."""
        table = Spec((parts, range(1, LEVELS + 1)), order="not falling")
        specs = {"knots": table, "surprisals": table, "scale": Spec((parts,), positive=True)}
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
        """From the parts' finite scores of inliers that no part was fitted to, float64 [n,P] with n ≥ 2."""
        ordered = np.sort(scores, axis=0)
        n = len(ordered)
        below = min(math.ceil(TAIL * n), n - 1)
        picked = np.unique(np.linspace(0, below - 1, min(below, LEVELS)).astype(int))
        knots = np.ascontiguousarray(ordered[picked].T)
        # among equal scores the first tells how many are at least as high
        first = [np.searchsorted(part, at) for part, at in zip(ordered.T, knots, strict=True)]
        excess = (ordered[below:] - ordered[below - 1]).mean(axis=0)
        scale = np.maximum(excess, LEAST_EXCESS * (1 + np.abs(ordered).max(axis=0)))
        return cls({"knots": knots, "surprisals": -np.log(1 - np.array(first) / n), "scale": scale}, scores.shape[1])

    def score(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Σ −log tail probability, float64 [N], of the parts' scores, [N] each."""
        return np.sum([self._surprisal(index, scores) for index, scores in enumerate(parts)], axis=0)

    def curves(self) -> list[PiecewiseLinear]:
        """−log tail probability of each part, a function of its score, for many scores at once."""
        return [
            PiecewiseLinear(knots, surprisals, 1 / float(scale))
            for knots, surprisals, scale in zip(*map(self.arrays.get, ("knots", "surprisals", "scale")), strict=True)
        ]

    def _surprisal(self, index: int, scores: np.ndarray) -> np.ndarray:
        knots, surprisals = self.arrays["knots"][index], self.arrays["surprisals"][index]
        beyond = np.maximum(scores - knots[-1], 0.0) / self.arrays["scale"][index]
        return np.interp(scores, knots, surprisals) + beyond


def is_stretched(definition: ScoreDefinition) -> bool:
    """Whether the score looks at contrast-stretched images."""
    return definition.estimator in CLASSES and CLASSES[definition.estimator].stretched


CLASSES: Mapping[str, type[Detector]] = {
    "typicality": Typicality,
    "complexity": Complexity,
    "debiased": Debiased,
    "path": Path,
    "latent": Latent,
    "residual": Residual,
    "statistics": Statistics,
}


def detector_arrays(bundle: Bundle) -> Arrays:
    """What the bundle's detectors.npz holds, for ``load_detectors`` and service.scores.maps.anomaly_map; nothing where
    there is none."""
    return bundle.arrays(DETECTORS) if DETECTORS in bundle.manifest.files else {}


def load_detectors(manifest: Manifest, arrays: Arrays) -> dict[str, Detector | Combination]:
    """The detectors of the manifest's fitted scores, by score name, from ``detector_arrays``.

    Raises BundleFormatError for arrays that are not those of the manifest's scores: other names, shapes or dtypes,
    numbers that are not finite, scales that are not positive, quantiles that do not rise.
    """
    own = FITTED - {"peak"}  # whose numbers are the map's
    fitted = {name: score for name, score in manifest.scores.items() if score.estimator in own}
    if not fitted:
        return {}
    found: dict[str, Arrays] = {name: {} for name in fitted}
    for key, array in arrays.items():
        if key.startswith(RESERVED):
            continue
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


def residual_moments(parts: Iterable[tuple[np.ndarray, np.ndarray]], manifest: Manifest) -> Arrays:
    """``mean`` and ``scale`` of x − x̂ by place, float32 [C,H,W], as Residual raises it; from x and x̂ [n,C,H,W]."""
    total, squares, size = (np.zeros(manifest.signature.shape) for _ in range(3))
    count = 0
    for x, decoded in parts:
        residual = x.astype(np.float64) - decoded
        total, squares = total + residual.sum(axis=0), squares + (residual**2).sum(axis=0)
        size += np.abs(x).sum(axis=0, dtype=np.float64)
        count += len(x)
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0.0)
    shared = SHARED_UNITS[manifest.preprocessing.kind]
    size = size.mean(axis=shared, keepdims=True) / count
    least = (LEAST_RESIDUAL * np.where(size > 0, size, 1.0)) ** 2
    scale = np.sqrt(variance + np.maximum(variance.mean(axis=shared, keepdims=True), least))
    return {"mean": mean.astype(np.float32), "scale": scale.astype(np.float32)}


def stretched(x: np.ndarray) -> np.ndarray:
    """Images [N,C,H,W] after contrast stretching: the 5th and 95th percentile of each become 0 and 1, in 8 bits.

    An image without contrast stays as it is.
    """
    out = np.empty_like(x)
    for image, result in zip(x, out, strict=True):
        low, high = np.percentile(image, STRETCH)
        scaled = (image - low) / (high - low) if high - low > 1 / LEVELS else image
        result[...] = unit_levels(np.rint(np.clip(scaled, 0, 1) * (LEVELS - 1)))
    return out


def _gaussian_specs(size: int) -> Specs:
    return {"loc": Spec((size,)), "scale": Spec((size,), positive=True), "whitening": Spec((size, size))}


def _gaussian_arrays(gaussian: Gaussian) -> Arrays:
    return {"loc": gaussian.loc, "scale": gaussian.scale, "whitening": gaussian.whitening}


def _surprisal(rows: Measured) -> np.ndarray:
    """−elbo of each row, nats: float64 [N]."""
    return -estimators.mean(rows.log_w)


def _surprisals(parts: Sequence[Measured]) -> np.ndarray:
    return np.concatenate([_surprisal(part) for part in parts])


def _table(kind: measured.Statistics, parts: Sequence[Measured], manifest: Manifest) -> np.ndarray:
    return np.concatenate([table(kind, part, manifest) for part in parts])


def _levels(x: np.ndarray) -> np.ndarray:
    return np.rint(x * (LEVELS - 1)).astype(np.intp)


def _copod(values: np.ndarray, grid: np.ndarray, skewness: np.ndarray) -> float:
    """max of Σ −log F, Σ −log(1 − F), and Σ of the tail that each skewness points to (Li et al. 2020, alg. 1)."""
    count = grid.shape[1]
    below = np.array([np.searchsorted(knots, value, "right") for knots, value in zip(grid, values, strict=True)])
    above = np.array([count - np.searchsorted(knots, value, "left") for knots, value in zip(grid, values, strict=True)])
    left, right = -np.log((below + 1) / (count + 1)), -np.log((above + 1) / (count + 1))
    return float(max(left.sum(), right.sum(), np.where(skewness < 0, left, right).sum()))
