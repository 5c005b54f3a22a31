"""Anomaly maps: how anomalous each place of a row is, fitted to held-out inliers; no outlier or gradient is used.

A map joins, at each place, how far x lies from x̂ = E[x|loc] and how unlikely x is under p(x|loc).

    deviations   e = (x − x̂ − m) / s, m and s the inliers' mean and deviation there, in each channel
    energy       E = log G ∗ mean over channels of (G ∗ e)²: differences of one sign side by side, not fine texture
    excess       A = (E − f(t)) / g(t): E beyond what inliers show where x has the texture t, and in units of how much
                 they differ there; f and g fitted by least squares, quadratic in t
    texture      t = W ∗ |slope of x|, W ∗ (x − G' ∗ x)², W ∗ x̂ and the mean |slope| of all of x, in units of s's root
                 mean square, logs but for the third: a busy cloth is badly reconstructed all over and still normal
    distortion   B = G ∗ Σ over channels of −log p(x|loc)
    map          −log P(A) − log P(B), tail probabilities among all places of inliers (Fisher 1932), standardised:
                 mean 0 and deviation 1 over the inliers' places
    peak         a row's score: the mean of the PEAK highest places of its map

G is a Gaussian of SIGMA places, or size/64 where that is more: 4 pixels at 256, as is usual (Defard et al. 2021, PaDiM,
sec. 4.2); W has WIDE and G' NARROW such sigmas. A vector's places are no neighbours: nothing is averaged there, it has
no texture, and B is standardised by place, too. z is loc throughout: a map depends on no k and on no seed.
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
"""First part of the map's keys in detectors.npz, "@map/NAME": no score's name begins with it."""
TAIL, TEXTURE = "tail.", "texture."
SIGMA = 1.5
SIZE = 64
PEAK = 0.025
"""Share of the places over which a row's score is the mean."""
MAX_PLACES = 2**20
"""Most of the inliers' places that a tail is fitted to."""
LAST_COLOUR = 0.9
"""Quantile of inliers that sets the last colour: a few odd inliers would set it at 0.99, and hide most defects."""
QUANTILES = (0.5, 0.9, 0.99, 0.999)
UNIT = "deviations of inliers' places"
LEAST = 1e-6
PASSES = 1
"""Forward passes that a map costs."""
EMPTY = "a map is fitted to two halves of the rows, and one is empty"

FittedMapKind = Literal["anomaly", "distortion"]
"""Kinds whose colours are fitted to inliers."""
MapKind = Literal[FittedMapKind, "corruption"]
"""``corruption``: the log odds of service.scores.corruption, by a graph of its own."""


class MapInputs(NamedTuple):
    """Inputs of a map for N rows: x, ``mean`` E[x|loc], and ``distortion`` −log p(x|loc) by place, [N,C,H,W] each."""

    x: np.ndarray
    mean: np.ndarray
    distortion: np.ndarray


class ColourScale(NamedTuple):
    """Scale of a map's colours, in the map's unit.

    ``low``: the inliers' median place. ``high``: the quantile LAST_COLOUR of the largest place of each inlier. What is
    above ``high`` has the last colour, which nine inliers of ten show nowhere.
    """

    low: float
    high: float


class AnomalyMap:
    """Fitted numbers of the map; ``arrays`` are what detectors.npz holds of it."""

    def __init__(self, arrays: Arrays, manifest: Manifest) -> None:
        """Raises BundleFormatError for arrays that are not those of a map for this manifest."""
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
        """Fit to held-out inliers: ``first`` fits what is by place and texture, ``second`` the tails over all places.

        Raises InvalidInput where either has no row.
        """
        batches = list(first)
        distortions, moments = _by_place(batches, manifest)
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
            parts = map(blank._energy_and_textures, batches)
            energies, measured = (np.concatenate(part) for part in zip(*parts, strict=True))
            arrays |= _named(TEXTURE, ExpectedEnergy.fit(energies, measured).arrays)
        return cls(arrays, manifest)._with_tails(second, manifest)

    def values(self, inputs: MapInputs) -> np.ndarray:
        """Maps of N rows, float32 [N,H,W], in deviations of inliers' places; rows are independent, bitwise."""
        return self._standardised(self._surprisals(self._pairs(inputs))).astype(np.float32)

    def peaks(self, inputs: MapInputs) -> np.ndarray:
        """Means of the highest places of each row's map, float64 [N]: the score ``peak``."""
        maps = self._standardised(self._surprisals(self._pairs(inputs)))
        flat = maps.reshape(len(maps), -1)
        highest = np.partition(flat, -self._highest, axis=1)[:, -self._highest :]
        return np.sort(highest, axis=1).mean(axis=1)

    def scale(self, kind: FittedMapKind) -> ColourScale:
        """Scale of the colours of a map of that kind."""
        if kind == "distortion":
            return ColourScale(*map(float, self.arrays["distortion"]))
        return ColourScale(
            float(self.arrays["quantiles"][0]), float(self.arrays["largest"][QUANTILES.index(LAST_COLOUR)])
        )

    def _with_tails(self, batches: Iterable[MapInputs], manifest: Manifest) -> Self:
        """The same map with tails, location, deviation and colours fitted to all places of these inliers."""
        measured = [(self._pairs(batch), batch.distortion.sum(axis=1)) for batch in batches]
        if not measured:
            raise InvalidInput(EMPTY)
        pairs = np.concatenate([pair for pair, _ in measured])  # [n,2,H,W]
        tail = Combination.fit(_thinned(pairs.transpose(0, 2, 3, 1).reshape(-1, 2)))
        fitted = type(self)(self.arrays | _named(TAIL, tail.arrays), manifest)
        surprisals = fitted._surprisals(pairs)
        location, deviation = float(surprisals.mean()), max(float(surprisals.std()), LEAST)
        maps = (surprisals - location) / deviation
        distortion = np.concatenate([by_place for _, by_place in measured])
        high = np.quantile(distortion.reshape(len(distortion), -1).max(axis=1), LAST_COLOUR)
        fitted.arrays |= {
            "location": np.array(location),
            "deviation": np.array(deviation),
            "quantiles": np.quantile(_thinned(maps), QUANTILES),
            "largest": np.quantile(maps.reshape(len(maps), -1).max(axis=1), QUANTILES),
            "distortion": np.array([np.median(_thinned(distortion)), high], np.float64),
        }
        return type(self)(fitted.arrays, manifest)

    def _pairs(self, inputs: MapInputs) -> np.ndarray:
        """Excess A and distortion B, float64 [N,2,H,W]."""
        return apply_in_chunks(self._pairs_of_chunk, *inputs)

    def _pairs_of_chunk(self, x: np.ndarray, mean: np.ndarray, distortion: np.ndarray) -> np.ndarray:
        chunk = MapInputs(x, mean, distortion)
        return np.stack([self._excess(chunk), self._distortion(chunk)], axis=1)

    def _excess(self, inputs: MapInputs) -> np.ndarray:
        """Excess A of the energy over what the texture lets expect: float64 [N,H,W]."""
        if self._expected is None:
            return self._energy(inputs)
        return self._expected.excess(*self._energy_and_textures(inputs))

    def _energy_and_textures(self, inputs: MapInputs) -> tuple[np.ndarray, np.ndarray]:
        """Energy E and textures t: float64 [N,H,W] and [N,TEXTURES,H,W]."""
        return self._energy(inputs), textures(inputs.x, inputs.mean, self._unit, self._sigma)

    def _energy(self, inputs: MapInputs) -> np.ndarray:
        """Energy E of the deviations: float64 [N,H,W]."""
        deviations = np.subtract(inputs.x, inputs.mean, dtype=np.float64)
        deviations -= self._mean
        deviations /= self._scale
        return np.log(smoothed(channel_mean(smoothed(deviations, self._sigma) ** 2), self._sigma) + LEAST)

    def _distortion(self, inputs: MapInputs) -> np.ndarray:
        """Distortion B: float64 [N,H,W]."""
        total = smoothed(inputs.distortion.astype(np.float64).sum(axis=1), self._sigma)
        return (total - self.arrays["level"]) / self.arrays["spread"]

    def _surprisals(self, pairs: np.ndarray) -> np.ndarray:
        """−log P(A) − log P(B), float64 [N,H,W]."""
        excess, distortion = self._tails
        surprisals: np.ndarray = excess(pairs[:, 0]) + distortion(pairs[:, 1])
        return surprisals

    def _standardised(self, surprisals: np.ndarray) -> np.ndarray:
        standardised: np.ndarray = (surprisals - self.arrays["location"]) / self.arrays["deviation"]
        return standardised


def load_map(manifest: Manifest, fitted: Arrays) -> AnomalyMap | None:
    """Make the map from the arrays of detectors.npz (service.scores.detectors.detector_arrays); None where it has none.

    Raises BundleFormatError for arrays that are not those of a map, and for a score ``peak`` without a map.
    """
    prefix = KEY + "/"
    reserved = {key: array for key, array in fitted.items() if key.startswith(RESERVED)}
    if unknown := [key for key in reserved if not key.startswith(prefix)]:
        raise BundleFormatError(f"{DETECTORS} holds {unknown[0]}, which is nothing that this vaeserve knows")
    arrays = {key.removeprefix(prefix): array for key, array in reserved.items()}
    if not arrays and any(score.estimator == "peak" for score in manifest.scores.values()):
        raise BundleFormatError(f"{DETECTORS} lacks {prefix}…, of whose highest places the score peak is the mean")
    return AnomalyMap(arrays, manifest) if arrays else None


def map_arrays(anomaly_map: AnomalyMap | None) -> Arrays:
    """Arrays of the map as detectors.npz holds them, by the key "@map/NAME"; none without a map."""
    return {} if anomaly_map is None else {f"{KEY}/{name}": array for name, array in anomaly_map.arrays.items()}


def _are_apart(manifest: Manifest) -> bool:
    """True if the places are the numbers of a vector, each in a unit of its own."""
    return manifest.modelled.kind == "vector"


def _specs(shape: tuple[int, int, int], by_place: bool) -> ArraySpecs:
    """Requirements on the arrays of a map of rows [C,H,W], but for those of its tails."""
    height_and_width = shape[1:]
    expected = {} if by_place else {f"{TEXTURE}{name}": spec for name, spec in ExpectedEnergy.specs().items()}
    return expected | {
        "mean": ArraySpec(shape),
        "scale": ArraySpec(shape, positive=True),
        "level": ArraySpec(height_and_width),
        "spread": ArraySpec(height_and_width, positive=True),
        "location": ArraySpec(()),
        "deviation": ArraySpec((), positive=True),
        "quantiles": ArraySpec((len(QUANTILES),), order="not falling"),
        "largest": ArraySpec((len(QUANTILES),), order="not falling"),
        "distortion": ArraySpec((2,), order="not falling"),
    }


def _by_place(batches: list[MapInputs], manifest: Manifest) -> tuple[np.ndarray, Arrays]:
    """−log p(x|loc) summed over channels, float64 [n,H,W], and the moments of x − x̂. Raises InvalidInput for no row."""
    if not batches:
        raise InvalidInput(EMPTY)
    distortions = np.concatenate([batch.distortion.sum(axis=1, dtype=np.float64) for batch in batches])
    return distortions, residual_moments(((batch.x, batch.mean) for batch in batches), manifest)


def _named(prefix: str, arrays: Arrays) -> Arrays:
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def _without(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most MAX_PLACES of the values, evenly spaced along the first axis; maps [n,H,W] are flattened first."""
    flat = values.reshape(-1) if values.ndim == 3 else values
    return flat[:: -(-len(flat) // MAX_PLACES)]
