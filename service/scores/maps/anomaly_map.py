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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self

import numpy as np

from service.bundle.manifest import DETECTORS, Manifest
from service.errors import BundleFormatError, InvalidInput
from service.scores.chunks import apply_in_chunks
from service.scores.detector_arrays import Arrays, ArraySpec, ArraySpecs, check_arrays
from service.scores.detectors import RESERVED, residual_moments
from service.scores.maps.averages import channel_mean, smoothed
from service.scores.maps.textures import ExpectedEnergy, textures
from service.scores.piecewise_linear import PiecewiseLinear
from service.scores.tail import Tail, fit_tails, tail_arrays, tails_from_arrays

KEY = RESERVED + "map"
"""First part of the map's keys in detectors.npz, "@map/NAME": no score's name begins with it."""
TAIL, TEXTURE = "tail.", "texture."
MOMENTS = ("mean", "scale", "level", "spread")
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


@dataclass(frozen=True, eq=False)
class PlaceMoments:
    """Inliers' moments at each place, in whose units a map measures rows.

    ``mean``, ``scale``: of x − x̂ in each channel, float32 [C,H,W]. ``level``, ``spread``: of the distortion B, float64
    [H,W], 0 and 1 where places are neighbours. ``sigma``: of the Gaussian G, in places; the manifest alone decides it.
    """

    mean: np.ndarray
    scale: np.ndarray
    level: np.ndarray
    spread: np.ndarray
    sigma: float

    @classmethod
    def fit(cls, batches: Sequence[MapInputs], manifest: Manifest) -> Self:
        """Fit to held-out inliers. Raises InvalidInput where there is none."""
        if not batches:
            raise InvalidInput(EMPTY)
        mean, scale = residual_moments(((batch.x, batch.mean) for batch in batches), manifest)
        level, spread = np.zeros(mean.shape[1:]), np.ones(mean.shape[1:])
        if _are_apart(manifest):
            distortions = np.concatenate([batch.distortion.sum(axis=1, dtype=np.float64) for batch in batches])
            level, spread = distortions.mean(axis=0), np.maximum(distortions.std(axis=0), 1e-6)
        return cls(mean, scale, level, spread, _sigma(manifest))

    def energy(self, inputs: MapInputs) -> np.ndarray:
        """Energy E of the deviations: float64 [N,H,W]."""
        mean, scale = self._float64
        deviations = np.subtract(inputs.x, inputs.mean, dtype=np.float64)
        deviations -= mean
        deviations /= scale
        return np.log(smoothed(channel_mean(smoothed(deviations, self.sigma) ** 2), self.sigma) + LEAST)

    def textures(self, inputs: MapInputs) -> np.ndarray:
        """Textures t: float64 [N,TEXTURES,H,W]."""
        return textures(inputs.x, inputs.mean, self._unit, self.sigma)

    def distortion(self, inputs: MapInputs) -> np.ndarray:
        """Distortion B: float64 [N,H,W]."""
        total = smoothed(inputs.distortion.astype(np.float64).sum(axis=1), self.sigma)
        return (total - self.level) / self.spread

    @cached_property
    def _float64(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and scale as float64."""
        return self.mean.astype(np.float64), self.scale.astype(np.float64)

    @cached_property
    def _unit(self) -> float:
        """Root mean square of the scale."""
        return float(np.sqrt((self._float64[1] ** 2).mean()))


@dataclass(frozen=True, eq=False)
class MapParameters:
    """Fitted state of an anomaly map, float64 but for the moments.

    ``expected``: the energy that a texture lets expect; None where places are no neighbours. ``tails``: of the excess A
    and of the distortion B. ``location``, ``deviation``: of −log P(A) − log P(B) over the inliers' places, [].
    ``quantiles``, ``largest``: at QUANTILES, of the places of inliers' maps and of each map's largest place, [4].
    ``distortion``: first and last colour of a map of the distortion, [2].
    """

    moments: PlaceMoments
    expected: ExpectedEnergy | None
    tails: tuple[Tail, ...]
    location: np.ndarray
    deviation: np.ndarray
    quantiles: np.ndarray
    largest: np.ndarray
    distortion: np.ndarray

    @classmethod
    def fit(cls, first: Iterable[MapInputs], second: Iterable[MapInputs], manifest: Manifest) -> Self:
        """Fit to held-out inliers: ``first`` fits what is by place and texture, ``second`` the tails over all places.

        Raises InvalidInput where either has no row.
        """
        batches = list(first)
        moments = PlaceMoments.fit(batches, manifest)
        expected = None
        if not _are_apart(manifest):
            energies, measured = (np.concatenate(list(map(of, batches))) for of in (moments.energy, moments.textures))
            expected = ExpectedEnergy.fit(energies, measured)
        held_out = [(_pairs(batch, moments, expected), batch.distortion.sum(axis=1)) for batch in second]
        if not held_out:
            raise InvalidInput(EMPTY)
        pairs, distortion = map(np.concatenate, zip(*held_out, strict=True))
        tails = fit_tails(_thinned(pairs.transpose(0, 2, 3, 1).reshape(-1, 2)))
        surprisals = _surprisals(pairs, [tail.curve() for tail in tails])
        location, deviation = float(surprisals.mean()), max(float(surprisals.std()), LEAST)
        maps = (surprisals - location) / deviation
        quantiles, largest = np.quantile(_thinned(maps), QUANTILES), np.quantile(_largest(maps), QUANTILES)
        colours = np.array([np.median(_thinned(distortion)), np.quantile(_largest(distortion), LAST_COLOUR)], float)
        return cls(moments, expected, tails, np.array(location), np.array(deviation), quantiles, largest, colours)

    @classmethod
    def from_arrays(cls, arrays: Arrays, manifest: Manifest) -> Self:
        """Make them of what detectors.npz holds of a map, by NAME.

        Raises BundleFormatError for arrays that are not those of a map for this manifest.
        """
        tail, texture = _without(TAIL, arrays), _without(TEXTURE, arrays)
        own = {name: array for name, array in arrays.items() if not name.startswith((TAIL, TEXTURE))}
        check_arrays("map", own, _specs(manifest.signature.shape))
        check_arrays("map's texture", texture, {} if _are_apart(manifest) else ExpectedEnergy.specs())
        moments = PlaceMoments(**{name: own.pop(name) for name in MOMENTS}, sigma=_sigma(manifest))
        return cls(moments, ExpectedEnergy(**texture) if texture else None, tails_from_arrays(tail, 2), **own)

    @property
    def arrays(self) -> Arrays:
        """What detectors.npz holds of the map, by NAME."""
        expected = {} if self.expected is None else vars(self.expected)
        return {
            **{name: getattr(self.moments, name) for name in MOMENTS},
            **{name: getattr(self, name) for name in ("location", "deviation", "quantiles", "largest", "distortion")},
            **{TAIL + name: array for name, array in tail_arrays(self.tails).items()},
            **{TEXTURE + name: array for name, array in expected.items()},
        }


class AnomalyMap:
    """An anomaly map of fitted ``parameters``."""

    def __init__(self, parameters: MapParameters) -> None:
        self.parameters = parameters
        self._curves = [tail.curve() for tail in parameters.tails]
        self._highest = max(1, round(PEAK * parameters.moments.level.size))

    def values(self, inputs: MapInputs) -> np.ndarray:
        """Maps of N rows, float32 [N,H,W], in deviations of inliers' places; rows are independent, bitwise."""
        return self._values(inputs).astype(np.float32)

    def peaks(self, inputs: MapInputs) -> np.ndarray:
        """Means of the highest places of each row's map, float64 [N]: the score ``peak``."""
        flat = self._values(inputs).reshape(len(inputs.x), -1)
        highest = np.partition(flat, -self._highest, axis=1)[:, -self._highest :]
        return np.sort(highest, axis=1).mean(axis=1)

    def scale(self, kind: FittedMapKind) -> ColourScale:
        """Scale of the colours of a map of that kind."""
        if kind == "distortion":
            return ColourScale(*map(float, self.parameters.distortion))
        low, high = self.parameters.quantiles[0], self.parameters.largest[QUANTILES.index(LAST_COLOUR)]
        return ColourScale(float(low), float(high))

    def _values(self, inputs: MapInputs) -> np.ndarray:
        """Maps of N rows, float64 [N,H,W]."""
        fitted = self.parameters
        surprisals = _surprisals(_pairs(inputs, fitted.moments, fitted.expected), self._curves)
        standardised: np.ndarray = (surprisals - fitted.location) / fitted.deviation
        return standardised


def load_map(manifest: Manifest, fitted: Arrays) -> AnomalyMap | None:
    """Make the map from the arrays of detectors.npz (service.scores.detectors.detector_arrays); None where it has none.

    Raises BundleFormatError for arrays that are not those of a map, and for a score ``peak`` without a map.
    """
    prefix = KEY + "/"
    reserved = {key: array for key, array in fitted.items() if key.startswith(RESERVED)}
    if unknown := [key for key in reserved if not key.startswith(prefix)]:
        raise BundleFormatError(f"{DETECTORS} holds {unknown[0]}, which is nothing that this vaeserve knows")
    arrays = _without(prefix, reserved)
    if not arrays and any(score.estimator == "peak" for score in manifest.scores.values()):
        raise BundleFormatError(f"{DETECTORS} lacks {prefix}…, of whose highest places the score peak is the mean")
    return AnomalyMap(MapParameters.from_arrays(arrays, manifest)) if arrays else None


def map_arrays(parameters: MapParameters | None) -> Arrays:
    """Arrays of the map as detectors.npz holds them, by the key "@map/NAME"; none without a map."""
    return {} if parameters is None else {f"{KEY}/{name}": array for name, array in parameters.arrays.items()}


def _are_apart(manifest: Manifest) -> bool:
    """True if the places are the numbers of a vector, each in a unit of its own."""
    return manifest.modelled.kind == "vector"


def _sigma(manifest: Manifest) -> float:
    """Deviation of the Gaussian G, in places; 0 averages nothing."""
    return 0.0 if _are_apart(manifest) else max(SIGMA, max(manifest.signature.shape[1:]) / SIZE)


def _specs(shape: tuple[int, int, int]) -> ArraySpecs:
    """Requirements on the arrays of a map of rows [C,H,W], but for those of its tails and of its textures."""
    height_and_width = shape[1:]
    return {
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


def _pairs(inputs: MapInputs, moments: PlaceMoments, expected: ExpectedEnergy | None) -> np.ndarray:
    """Excess A and distortion B, float64 [N,2,H,W]; the energy is the excess where nothing is ``expected``."""

    def of_chunk(*arrays: np.ndarray) -> np.ndarray:
        chunk = MapInputs(*arrays)
        energy = moments.energy(chunk)
        excess = energy if expected is None else expected.excess(energy, moments.textures(chunk))
        return np.stack([excess, moments.distortion(chunk)], axis=1)

    return apply_in_chunks(of_chunk, *inputs)


def _surprisals(pairs: np.ndarray, curves: Sequence[PiecewiseLinear]) -> np.ndarray:
    """−log P(A) − log P(B), float64 [N,H,W], by the curves of their tails."""
    excess, distortion = curves
    surprisals: np.ndarray = excess(pairs[:, 0]) + distortion(pairs[:, 1])
    return surprisals


def _without(prefix: str, arrays: Arrays) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _largest(maps: np.ndarray) -> np.ndarray:
    """Largest place of each map: [n,H,W] -> [n]."""
    largest: np.ndarray = maps.reshape(len(maps), -1).max(axis=1)
    return largest


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most MAX_PLACES of the values, evenly spaced along the first axis; maps [n,H,W] are flattened first."""
    flat = values.reshape(-1) if values.ndim == 3 else values
    return flat[:: -(-len(flat) // MAX_PLACES)]
