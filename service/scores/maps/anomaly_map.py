"""Where is the anomaly: a number by place, fitted to what held-out inliers show; no outlier or gradient is used.

Two things tell at each place: how far x lies from x̂ = E[x|loc], and how unlikely x is under p(x|loc).

    deviations   e = (x − x̂ − m) / s, m and s the inliers' mean and deviation there, in each channel
    energy       E = log G ∗ mean over channels of (G ∗ e)²: differences of one sign side by side, not fine texture
    excess       A = (E − f(t)) / g(t): E beyond what inliers show where x has the texture t, and in units of how much
                 they differ there; f and g fitted by least squares, quadratic in t
    texture      t = W ∗ |slope of x|, W ∗ (x − G' ∗ x)², W ∗ x̂ and the mean |slope| of all of x, in units of s's root
                 mean square, logs but for the third: a busy cloth is badly reconstructed everywhere, and none the worse
    distortion   B = G ∗ Σ over channels of −log p(x|loc)
    map          −log P(A) − log P(B), tail probabilities among all places of inliers (Fisher 1932), standardised:
                 mean 0 and deviation 1 over the inliers' places
    peak         a row's score: the mean of the PEAK highest places of its map

G is a Gaussian of SIGMA places, or size/64 where that is more: 4 pixels at 256, as is usual (Defard et al. 2021, PaDiM,
sec. 4.2); W one of WIDE, G' of NARROW such sigmas. A vector's places are no neighbours: nothing is averaged there, no
texture is known, and B is standardised by place, too. z is loc throughout: a map depends on no k and on no seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, Self

import numpy as np

from service.bundle.manifest import DETECTORS, Manifest
from service.errors import BundleFormatError, InvalidInput
from service.scores.chunks import apply_in_chunks
from service.scores.detector_arrays import Arrays, ArraySpec, ArraySpecs, check_arrays
from service.scores.detectors import RESERVED, Combination, residual_moments
from service.scores.maps.averages import channel_mean, smoothed
from service.scores.maps.textures import TEXTURES, ExpectedEnergy, textures

KEY = RESERVED + "map"
"""Its arrays are "@map/NAME" in detectors.npz: no score's name begins so."""
TAIL, TEXTURE = "tail.", "texture."
SIGMA = 1.5
SIZE = 64
PEAK = 0.025  # of the places
PLACES = 2**20  # of inliers, that a tail is fitted to at most
LOUD = 0.9  # at 0.99 a few odd inliers set the scale, and most defects look as quiet as inliers
QUANTILES = (0.5, 0.9, 0.99, 0.999)
UNIT = "deviations of inliers' places"
LEAST = 1e-6
PASSES = 1  # through encoder, decoder and density
EMPTY = "a map is fitted to two halves of the rows, and one is empty"

FittedMapKind = Literal["anomaly", "distortion"]
"""Kinds whose colours are fitted to inliers."""
MapKind = Literal[FittedMapKind, "corruption"]
"""``corruption``: the log odds of service.scores.corruption, by a graph of its own."""


class MapInputs(NamedTuple):
    """N rows x, E[x|loc] and −log p(x|loc) by place, all [N,C,H,W]."""

    x: np.ndarray
    mean: np.ndarray
    distortion: np.ndarray


class ColourScale(NamedTuple):
    """Of colours: ``low``, the inliers' median place; ``high``, the quantile LOUD of the largest in each inlier.

    What is above ``high`` has its colour: a place of the last colour is one that nine inliers of ten have nowhere.
    """

    low: float
    high: float


class AnomalyMap:
    """Fitted numbers of the map; ``arrays`` are kept in detectors.npz."""

    def __init__(self, arrays: Arrays, manifest: Manifest) -> None:
        """Raises BundleFormatError for arrays that are none of this manifest's map."""
        shape, by_place = manifest.signature.shape, _are_apart(manifest)
        tail = {name: array for name, array in arrays.items() if name.startswith("tail.")}
        check_arrays("map", {k: v for k, v in arrays.items() if k not in tail}, _specs(shape, by_place))
        self.arrays, self._sigma = arrays, 0.0 if by_place else max(SIGMA, max(shape[1:]) / SIZE)
        self._mean, self._scale = (arrays[name].astype(np.float64) for name in ("mean", "scale"))
        self._unit = float(np.sqrt((self._scale**2).mean()))
        self._expected = None if by_place else ExpectedEnergy(_without(TEXTURE, arrays))
        self._tails = Combination(_without(TAIL, tail), 2).curves()
        self._highest = max(1, round(PEAK * shape[1] * shape[2]))

    @classmethod
    def fit(cls, first: Iterable[MapInputs], second: Iterable[MapInputs], manifest: Manifest) -> Self:
        """From held-out inliers: ``first`` fits what is by place and texture, ``second`` the tails over all places.

        Raises InvalidInput where either has no row.
        """
        known = list(first)
        distortions, moments = _by_place(known, manifest)
        shape, by_place = manifest.signature.shape, _are_apart(manifest)
        arrays: Arrays = {
            **moments,
            "level": distortions.mean(axis=0) if by_place else np.zeros(shape[1:]),
            "spread": np.maximum(distortions.std(axis=0), 1e-6) if by_place else np.ones(shape[1:]),
            "location": np.array(0.0),
            "deviation": np.array(1.0),
            "quantiles": np.zeros(len(QUANTILES)),
            "largest": np.zeros(len(QUANTILES)),
            "distortion": np.array([0.0, 0.0]),
            **_named(TAIL, Combination.fit(np.zeros((2, 2))).arrays),
        }
        if not by_place:
            nothing = ExpectedEnergy.fit(np.zeros((1, 1, 1)), np.zeros((1, TEXTURES, 1, 1)))
            blank = cls(arrays | _named(TEXTURE, nothing.arrays), manifest)
            energies, found = (np.concatenate(part) for part in zip(*map(blank._seen, known), strict=True))
            arrays |= _named(TEXTURE, ExpectedEnergy.fit(energies, found).arrays)
        return cls(arrays, manifest)._with_tails(second, manifest)

    def values(self, sight: MapInputs) -> np.ndarray:
        """The map of each row, float32 [N,H,W]; rows are independent, bitwise."""
        return self._standardised(self._surprisals(self._pairs(sight))).astype(np.float32)

    def peaks(self, sight: MapInputs) -> np.ndarray:
        """The mean of the highest places of each row's map: the score ``peak``, float64 [N]."""
        maps = self._standardised(self._surprisals(self._pairs(sight)))
        flat = maps.reshape(len(maps), -1)
        highest = np.partition(flat, -self._highest, axis=1)[:, -self._highest :]
        return np.sort(highest, axis=1).mean(axis=1)

    def scale(self, kind: FittedMapKind) -> ColourScale:
        """Colours of a map of that kind."""
        if kind == "distortion":
            return ColourScale(*map(float, self.arrays["distortion"]))
        return ColourScale(float(self.arrays["quantiles"][0]), float(self.arrays["largest"][QUANTILES.index(LOUD)]))

    def _with_tails(self, sights: Iterable[MapInputs], manifest: Manifest) -> Self:
        found = [(self._pairs(sight), sight.distortion.sum(axis=1)) for sight in sights]
        if not found:
            raise InvalidInput(EMPTY)
        pairs = np.concatenate([pair for pair, _ in found])  # [n,2,H,W]
        tail = Combination.fit(_thinned(pairs.transpose(0, 2, 3, 1).reshape(-1, 2)))
        fitted = type(self)(self.arrays | _named(TAIL, tail.arrays), manifest)
        surprisals = fitted._surprisals(pairs)
        location, deviation = float(surprisals.mean()), max(float(surprisals.std()), LEAST)
        maps = (surprisals - location) / deviation
        distortion = np.concatenate([each for _, each in found])
        high = np.quantile(distortion.reshape(len(distortion), -1).max(axis=1), LOUD)
        fitted.arrays |= {
            "location": np.array(location),
            "deviation": np.array(deviation),
            "quantiles": np.quantile(_thinned(maps), QUANTILES),
            "largest": np.quantile(maps.reshape(len(maps), -1).max(axis=1), QUANTILES),
            "distortion": np.array([np.median(_thinned(distortion)), high], np.float64),
        }
        return type(self)(fitted.arrays, manifest)

    def _pairs(self, sight: MapInputs) -> np.ndarray:
        """A and B, float64 [N,2,H,W]."""
        return apply_in_chunks(self._pairs_of_few, *sight)

    def _pairs_of_few(self, x: np.ndarray, mean: np.ndarray, distortion: np.ndarray) -> np.ndarray:
        few = MapInputs(x, mean, distortion)
        return np.stack([self._excess(few), self._distortion(few)], axis=1)

    def _excess(self, sight: MapInputs) -> np.ndarray:
        """A: float64 [N,H,W]."""
        return self._energy(sight) if self._expected is None else self._expected.excess(*self._seen(sight))

    def _seen(self, sight: MapInputs) -> tuple[np.ndarray, np.ndarray]:
        """E and t: float64 [N,H,W] and [N,TEXTURES,H,W]."""
        return self._energy(sight), textures(sight.x, sight.mean, self._unit, self._sigma)

    def _energy(self, sight: MapInputs) -> np.ndarray:
        """E: float64 [N,H,W]."""
        deviations = np.subtract(sight.x, sight.mean, dtype=np.float64)
        deviations -= self._mean
        deviations /= self._scale
        return np.log(smoothed(channel_mean(smoothed(deviations, self._sigma) ** 2), self._sigma) + LEAST)

    def _distortion(self, sight: MapInputs) -> np.ndarray:
        """B: float64 [N,H,W]."""
        total = smoothed(sight.distortion.astype(np.float64).sum(axis=1), self._sigma)
        return (total - self.arrays["level"]) / self.arrays["spread"]

    def _surprisals(self, pairs: np.ndarray) -> np.ndarray:
        """−log P(A) − log P(B), float64 [N,H,W]."""
        excess, distortion = self._tails
        surprisals: np.ndarray = excess(pairs[:, 0]) + distortion(pairs[:, 1])
        return surprisals

    def _standardised(self, surprisals: np.ndarray) -> np.ndarray:
        standardised: np.ndarray = (surprisals - self.arrays["location"]) / self.arrays["deviation"]
        return standardised


def load_map(manifest: Manifest, found: Arrays) -> AnomalyMap | None:
    """The map of which ``found`` holds the arrays (service.scores.detectors.detector_arrays), or None where none was
    fitted.

    Raises BundleFormatError; also for a score ``peak`` without one.
    """
    prefix = KEY + "/"
    reserved = {key: array for key, array in found.items() if key.startswith(RESERVED)}
    if unknown := [key for key in reserved if not key.startswith(prefix)]:
        raise BundleFormatError(f"{DETECTORS} holds {unknown[0]}, which is nothing that this vaeserve knows")
    arrays = {key.removeprefix(prefix): array for key, array in reserved.items()}
    if not arrays and any(score.estimator == "peak" for score in manifest.scores.values()):
        raise BundleFormatError(f"{DETECTORS} lacks {prefix}…, of whose highest places the score peak is the mean")
    return AnomalyMap(arrays, manifest) if arrays else None


def map_arrays(found: AnomalyMap | None) -> Arrays:
    """Its share of detectors.npz."""
    return {} if found is None else {f"{KEY}/{name}": array for name, array in found.arrays.items()}


def _are_apart(manifest: Manifest) -> bool:
    """Whether places are features of a vector, each in a unit of its own."""
    return manifest.modelled.kind == "vector"


def _specs(shape: tuple[int, int, int], by_place: bool) -> ArraySpecs:
    places = shape[1:]
    expected = {} if by_place else {f"{TEXTURE}{name}": spec for name, spec in ExpectedEnergy.specs().items()}
    return expected | {
        "mean": ArraySpec(shape),
        "scale": ArraySpec(shape, positive=True),
        "level": ArraySpec(places),
        "spread": ArraySpec(places, positive=True),
        "location": ArraySpec(()),
        "deviation": ArraySpec((), positive=True),
        "quantiles": ArraySpec((len(QUANTILES),), order="not falling"),
        "largest": ArraySpec((len(QUANTILES),), order="not falling"),
        "distortion": ArraySpec((2,), order="not falling"),
    }


def _by_place(sights: list[MapInputs], manifest: Manifest) -> tuple[np.ndarray, Arrays]:
    """−log p(x|loc) summed over channels, float64 [n,H,W], and the moments of x − x̂."""
    if not sights:
        raise InvalidInput(EMPTY)
    distortions = np.concatenate([sight.distortion.sum(axis=1, dtype=np.float64) for sight in sights])
    return distortions, residual_moments(((sight.x, sight.mean) for sight in sights), manifest)


def _named(prefix: str, arrays: Arrays) -> Arrays:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def _without(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most PLACES of them, evenly spaced along the first axis; of maps [n,H,W] all places in a row."""
    flat = values.reshape(-1) if values.ndim == 3 else values
    return flat[:: -(-len(flat) // PLACES)]
