"""Where is the anomaly: a number by place, fitted to what held-out inliers show; no outlier or gradient is used.

Two things tell at each place: how far x lies from E[x|loc], and how unlikely x is under p(x|loc).

    deviations   e = (x − x̂ − m) / s, m and s the inliers' mean and deviation there, in each channel
    energy       A = G ∗ mean over channels of (G ∗ e)²: differences of one sign next to each other, not fine texture
    distortion   B = G ∗ Σ over channels of −log p(x|loc)
    map          −log P(A) − log P(B), tail probabilities among all places of inliers (Fisher 1932), standardised:
                 mean 0 and deviation 1 over the inliers' places

G is a Gaussian of SIGMA places, or size/64 where that is more: 4 pixels at 256, as is usual (Defard et al. 2021, PaDiM,
sec. 4.2). A vector's places are no neighbours: nothing is averaged there, and B is standardised by place, too.

An encoder sees the defect as well, and the decoder paints some of it. Before the map is taken, x is therefore restored
ROUNDS times: each place is moved towards x̂ by A / (A + q), q the inliers' 90% quantile of A, and encoded again. That
is the iterative projection of Dehaene et al. 2020 (arXiv:2002.03734) with the model's own answer for a gradient.
z is loc throughout: a map depends on no k and on no seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, Self

import numpy as np

from service.bundle import DETECTORS, Bundle, Manifest
from service.detector_arrays import Arrays, Spec, Specs, check_arrays
from service.detectors import RESERVED, Combination, residual_moments
from service.errors import BundleFormatError, InvalidInput

KEY = RESERVED + "map"
"""Its arrays are "@map/NAME" in detectors.npz: no score's name begins so."""
SIGMA = 1.5
SIZE = 64
REACH = 3  # deviations at which the kernel ends
ROUNDS = 2
PASSES = ROUNDS + 1  # through encoder, decoder and density
SHARE = 0.9
PLACES = 2**20  # of inliers, that a tail is fitted to at most
LOUD = 0.9  # at 0.99 a few odd inliers set the scale, and most defects look as quiet as inliers
QUANTILES = (0.5, 0.9, 0.99, 0.999)
UNIT = "deviations of inliers' places"
LEAST = 1e-12
EMPTY = "a map is fitted to two halves of the rows, and one is empty"

MapKind = Literal["anomaly", "distortion"]

Look = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Sight(NamedTuple):
    """N rows x, float32 [N,C,H,W], and the model's ``look``: of any N rows y in their stead, by loc of y, E[x|loc] and
    −log p(x|loc) of x itself by place, both [N,C,H,W]."""

    x: np.ndarray
    look: Look


class Scale(NamedTuple):
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
        self._tail = Combination({name.removeprefix("tail."): array for name, array in tail.items()}, 2)

    @classmethod
    def fit(cls, first: Iterable[Sight], second: Iterable[Sight], manifest: Manifest) -> Self:
        """From held-out inliers: ``first`` fits what is by place, ``second`` the tails over all places.

        Raises InvalidInput where either has no row.
        """
        residuals, distortions, moments = _by_place(first, manifest)
        shape, by_place = manifest.signature.shape, _are_apart(manifest)
        arrays: Arrays = {
            **moments,
            "level": distortions.mean(axis=0) if by_place else np.zeros(shape[1:]),
            "spread": np.maximum(distortions.std(axis=0), 1e-6) if by_place else np.ones(shape[1:]),
            "share": np.array(1.0),
            "location": np.array(0.0),
            "deviation": np.array(1.0),
            "quantiles": np.zeros(len(QUANTILES)),
            "largest": np.zeros(len(QUANTILES)),
            "distortion": np.array([0.0, 0.0]),
        }
        blank = Combination.fit(np.zeros((2, 2)))
        found = cls(arrays | _named(blank), manifest)
        energies = np.stack([found._energy(each.astype(np.float64)) for each in residuals])
        found.arrays["share"] = np.array(max(float(np.quantile(_thinned(energies), SHARE)), LEAST))
        return found._with_tails(second, manifest)

    def values(self, sight: Sight) -> np.ndarray:
        """The map of each row, float32 [N,H,W]; rows are independent, bitwise."""
        pairs = self._pairs(sight)
        return ((self._surprisals(pairs) - self.arrays["location"]) / self.arrays["deviation"]).astype(np.float32)

    def scale(self, kind: MapKind) -> Scale:
        """Colours of a map of that kind."""
        if kind == "distortion":
            return Scale(*map(float, self.arrays["distortion"]))
        return Scale(float(self.arrays["quantiles"][0]), float(self.arrays["largest"][QUANTILES.index(LOUD)]))

    def _with_tails(self, sights: Iterable[Sight], manifest: Manifest) -> Self:
        found = [(self._pairs(sight), sight.look(sight.x)[1].sum(axis=1)) for sight in sights]
        if not found:
            raise InvalidInput(EMPTY)
        pairs = np.concatenate([pair for pair, _ in found])  # [n,2,H,W]
        tail = Combination.fit(_thinned(pairs.transpose(0, 2, 3, 1).reshape(-1, 2)))
        fitted = type(self)(self.arrays | _named(tail), manifest)
        surprisals = fitted._surprisals(pairs)
        location, deviation = float(surprisals.mean()), max(float(surprisals.std()), 1e-6)
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

    def _pairs(self, sight: Sight) -> np.ndarray:
        """A and B after the restorations, float64 [N,2,H,W]."""
        mean, distortion = sight.look(sight.x)
        for _ in range(ROUNDS):
            mean, distortion = sight.look(np.stack([self._restored(*row) for row in zip(sight.x, mean, strict=True)]))
        residuals = sight.x.astype(np.float64) - mean
        rows = zip(residuals, distortion, strict=True)
        return np.stack([np.stack([self._energy(e), self._distortion(d)]) for e, d in rows])

    def _restored(self, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """One row moved towards x̂ where it deviates: float32 [C,H,W], between the two at every place."""
        energy = self._energy(x.astype(np.float64) - mean)
        moved = (energy / (energy + float(self.arrays["share"]))).astype(np.float32)
        between: np.ndarray = x + moved * (mean - x)
        return np.clip(between, np.minimum(x, mean), np.maximum(x, mean))

    def _energy(self, residual: np.ndarray) -> np.ndarray:
        """A of one row's x − x̂ [C,H,W]: float64 [H,W]."""
        deviations = (residual - self.arrays["mean"]) / self.arrays["scale"]
        return smoothed((smoothed(deviations, self._sigma) ** 2).mean(axis=0), self._sigma)

    def _distortion(self, places: np.ndarray) -> np.ndarray:
        """B of one row's −log p(x|loc) [C,H,W]: float64 [H,W]."""
        total = smoothed(places.astype(np.float64).sum(axis=0), self._sigma)
        return (total - self.arrays["level"]) / self.arrays["spread"]

    def _surprisals(self, pairs: np.ndarray) -> np.ndarray:
        """−log P(A) − log P(B), float64 [N,H,W]."""
        return self._tail.score([pairs[:, 0], pairs[:, 1]])


def smoothed(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian averages along the last two axes, whose edges are mirrored; sigma in places, 0: as they are."""
    if not sigma:
        return values
    radius = int(np.ceil(REACH * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    for axis in (-2, -1):
        values = _averaged(values, weights / weights.sum(), axis % values.ndim)
    return values


def load_map(bundle: Bundle) -> AnomalyMap | None:
    """The bundle's, or None where none was fitted. Raises BundleFormatError."""
    if DETECTORS not in bundle.manifest.files:
        return None
    prefix = KEY + "/"
    reserved = {key: array for key, array in bundle.arrays(DETECTORS).items() if key.startswith(RESERVED)}
    if unknown := [key for key in reserved if not key.startswith(prefix)]:
        raise BundleFormatError(f"{DETECTORS} holds {unknown[0]}, which is nothing that this vaeserve knows")
    arrays = {key.removeprefix(prefix): array for key, array in reserved.items()}
    return AnomalyMap(arrays, bundle.manifest) if arrays else None


def map_arrays(found: AnomalyMap | None) -> Arrays:
    """Its share of detectors.npz."""
    return {} if found is None else {f"{KEY}/{name}": array for name, array in found.arrays.items()}


def _averaged(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Sums by shifted slices: the order of additions depends on no size, and an axis of one place stays as it is."""
    size, radius = values.shape[axis], len(weights) // 2
    if size == 1:
        return values
    widths = [(radius, radius) if at == axis else (0, 0) for at in range(values.ndim)]
    padded = np.moveaxis(np.pad(values, widths, mode="symmetric"), axis, 0)
    total = weights[0] * padded[:size]
    for shift in range(1, len(weights)):
        total += weights[shift] * padded[shift : shift + size]
    return np.moveaxis(total, 0, axis)


def _are_apart(manifest: Manifest) -> bool:
    """Whether places are features of a vector, each in a unit of its own."""
    return manifest.modelled.kind == "vector"


def _specs(shape: tuple[int, int, int], by_place: bool) -> Specs:
    places = shape[1:]
    return {
        "mean": Spec(shape),
        "scale": Spec(shape, positive=True),
        "level": Spec(places),
        "spread": Spec(places, positive=True),
        "share": Spec((), positive=True),
        "location": Spec(()),
        "deviation": Spec((), positive=True),
        "quantiles": Spec((len(QUANTILES),), order="not falling"),
        "largest": Spec((len(QUANTILES),), order="not falling"),
        "distortion": Spec((2,), order="not falling"),
    }


def _by_place(sights: Iterable[Sight], manifest: Manifest) -> tuple[np.ndarray, np.ndarray, Arrays]:
    """x − x̂, float32 [n,C,H,W], its moments, and −log p(x|loc) summed over channels, float64 [n,H,W]."""
    found = [(sight.x, *sight.look(sight.x)) for sight in sights]
    if not found:
        raise InvalidInput(EMPTY)
    residuals = np.concatenate([x - mean for x, mean, _ in found])
    distortions = np.concatenate([each.sum(axis=1, dtype=np.float64) for _, _, each in found])
    return residuals, distortions, residual_moments(((x, mean) for x, mean, _ in found), manifest)


def _named(tail: Combination) -> Arrays:
    return {f"tail.{name}": array for name, array in tail.arrays.items()}


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most PLACES of them, evenly spaced along the first axis; of maps [n,H,W] all places in a row."""
    flat = values.reshape(-1) if values.ndim == 3 else values
    return flat[:: -(-len(flat) // PLACES)]
