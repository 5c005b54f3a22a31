"""TiledModel: a model of tiles, answering on whole images of any size that holds a tile.

An image's tiles go through the model a few at a time, in the order of their plan, so that beside the image and its map
(if asked for) the memory in use does not depend on the image's size but for a few numbers a tile. Tiles are rows of
the model, and rows are independent, bitwise: how many go at a time changes nothing.

The score of an image is an aggregate of its tiles' scores (service.bundle.input_rules.Tiling). Its p-value comes from
whole images: tiles of one image are alike, and no exchangeable sample. The promise of the calibration holds for images
whose sizes come about as the calibration images' did. For other sizes the aggregate itself is made comparable:
``maximum`` allows for the number of tiles as if they were independent, ``top`` looks at a share of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np

from service.bundle.files import Bundle
from service.bundle.input_rules import Preprocessing, Tiling
from service.bundle.manifest import TILES, Manifest, ScoreDefinition
from service.errors import BundleFormatError, InvalidInput, UnsupportedVerb
from service.formats.tiling import Plan, Stitcher
from service.inference.model import Model, Scores
from service.pixels import unit_levels
from service.scores.detectors import Combination
from service.scores.maps.anomaly_map import MapKind

AT_ONCE = 64  # tiles that are cut out and given to the model together
MEANS = ("elbo", "log_likelihood", "rate", "distortion", "bits_per_dim")
SURE = 600.0  # nats: from far below, −log(1 − p) is p to the last bit; from above, p would underflow
LEAST = 1e-9  # nats: a tile that scores below every held-out one has p = 1, whose logarithm would be infinite

Tails = Mapping[str, Combination]
"""Score -> the tail probabilities of one tile's score, as of a combination of that score alone."""


class TileSummary(NamedTuple):
    """What is known of an image's tiles: how many, and which scores highest, its corner in pixels and its score."""

    n: int
    worst_y: int
    worst_x: int
    worst_score: float


class TiledScores(NamedTuple):
    """As service.inference.model.Scores, of N images of any sizes; ``tiles`` tells of each image's tiles.

    ``score`` and those of ``also`` are aggregates; elbo, log_likelihood, rate, distortion and bits_per_dim are means
    over the tiles, and so are ``latents``; standard_error is NaN. ``map``: one of each image, float32 [h,w], blended
    where tiles overlap.
    """

    score: np.ndarray
    elbo: np.ndarray
    log_likelihood: np.ndarray
    rate: np.ndarray
    distortion: np.ndarray
    bits_per_dim: np.ndarray
    standard_error: np.ndarray
    k: int
    map: list[np.ndarray] | None
    latents: np.ndarray | None
    also: dict[str, np.ndarray]
    tiles: list[TileSummary]


class _Shown(NamedTuple):
    """What is wanted beside scores, as Model.score has it."""

    maps: bool
    map_kind: MapKind | None
    latents: bool


class _Found(NamedTuple):
    """One image's scores, by name, its means, its map, its latents and its tiles."""

    scores: dict[str, float]
    means: dict[str, float]
    map: np.ndarray | None
    latents: np.ndarray | None
    tiles: TileSummary


class TiledModel:
    """A model whose manifest says ``tiling``. Safe to call from several threads.

    ``tails``: in place of the bundle's own, while these are being fitted.
    """

    def __init__(self, model: Model, tails: Tails | None = None) -> None:
        rule = model.manifest.preprocessing
        assert isinstance(rule, Preprocessing)
        assert rule.tiling is not None
        self.model, self.rule, self.tiling = model, rule, rule.tiling
        self._tails = load_tails(model.bundle) if tails is None else tails

    def plan(self, image: np.ndarray) -> Plan:
        """Where the tiles of an image [C,h,w] lie. Raises InvalidInput if it is smaller than a tile."""
        return Plan.of(self.rule, *image.shape[1:])

    def score(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        definition: ScoreDefinition | None = None,
        maps: bool = False,
        also: Mapping[str, ScoreDefinition] | None = None,
        map_kind: MapKind | None = None,
        latents: bool = False,
    ) -> TiledScores:
        """Scores of whole images [C,h,w], uint8 or float32 in [0, 1], by one of the bundle's definitions.

        Raises as Model.score; also InvalidInput for an image smaller than a tile, and for a definition that is not the
        bundle's own where the aggregate needs the tail of its tiles' scores.
        """
        main = definition or self.model.manifest.scores[self.model.manifest.default_score]
        wanted = {"": main, **(also or {})}
        tails = {name: self._tail(each) for name, each in wanted.items()}
        shown = _Shown(maps, map_kind, latents)
        found = [self._score(image, main, also or {}, shown, tails) for image in images]
        return TiledScores(
            score=np.array([each.scores[""] for each in found]),
            **{name: np.array([each.means[name] for each in found]) for name in MEANS},
            standard_error=np.full(len(found), np.nan),
            k=main.k,
            map=[cast(np.ndarray, each.map) for each in found] if maps else None,
            latents=np.stack([cast(np.ndarray, each.latents) for each in found]) if latents else None,
            also={name: np.array([each.scores[name] for each in found]) for name in also or {}},
            tiles=[each.tiles for each in found],
        )

    def tile_scores(self, image: np.ndarray, definitions: Mapping[str, ScoreDefinition]) -> dict[str, np.ndarray]:
        """Scores of every tile, float64 [tiles] by name, in the plan's order. Raises InvalidInput."""
        plan, main = self.plan(image), next(iter(definitions.values()))
        parts = [self.model.score(tiles, main, also=definitions).also for tiles in _batches(plan, image)]
        return {name: np.concatenate([part[name] for part in parts]) for name in definitions}

    def _score(
        self,
        image: np.ndarray,
        main: ScoreDefinition,
        also: Mapping[str, ScoreDefinition],
        shown: _Shown,
        tails: Mapping[str, Combination | None],
    ) -> _Found:
        plan = self.plan(image)
        stitcher = Stitcher(plan) if shown.maps else None
        parts: list[Scores] = []
        for tiles in _batches(plan, image):
            scored = self.model.score(tiles, main, shown.maps, also, shown.map_kind, shown.latents)
            if stitcher is not None:
                stitcher.add(cast(np.ndarray, scored.map))
            parts.append(scored._replace(map=None))
        scores = {"": np.concatenate([part.score for part in parts])}
        scores |= {name: np.concatenate([part.also[name] for part in parts]) for name in also}
        worst = int(np.argmax(scores[""]))
        return _Found(
            {name: aggregate(each, plan, self.tiling, tails[name]) for name, each in scores.items()},
            {name: float(np.concatenate([getattr(part, name) for part in parts]).mean()) for name in MEANS},
            stitcher.whole() if stitcher else None,
            np.concatenate([cast(np.ndarray, part.latents) for part in parts]).mean(axis=0) if shown.latents else None,
            TileSummary(len(plan), *plan.corner(worst), float(scores[""][worst])),
        )

    def _tail(self, definition: ScoreDefinition) -> Combination | None:
        """The tail of the definition's tile scores, where the aggregate needs one."""
        if self.tiling.aggregate != "maximum":
            return None
        scores = self.model.manifest.scores
        name = next((name for name, known in scores.items() if known == definition), None)
        if name is None:
            raise InvalidInput(
                f"{definition.estimator} with k={definition.k} and seed={definition.seed} is none of this bundle's "
                f"scores ({', '.join(sorted(scores))}), and a model of tiles knows the tails of these only"
            )
        if name not in self._tails:
            raise UnsupportedVerb(f"score {name!r} of tiles has no fitted tail here: calibrate the bundle first")
        return self._tails[name]


def aggregate(scores: np.ndarray, plan: Plan, tiling: Tiling, tail: Combination | None) -> float:
    """The image's score from those of its tiles, float64 [tiles], in any order; see
    service.bundle.input_rules.Tiling."""
    ordered = np.sort(scores)[::-1]
    if tiling.aggregate == "top":
        return float(ordered[: max(1, round(tiling.share * len(ordered)))].mean())
    assert tail is not None
    return surprisal_of_maximum(float(tail.score([ordered[:1]])[0]), plan.places)


def surprisal_of_maximum(surprisal: float, m: float) -> float:
    """−log(−m log(1 − p)) with p = exp(−surprisal), nats: strictly rising in p's surprisal, and finite.

    The chance that the least of m independent p-values is at most p is 1 − (1 − p)^m (Šidák 1967), which is 1 − exp(−λ)
    with λ = −m log(1 − p): about the number of tiles that score as high in so large an image. This is −log λ, of m
    independent inliers a draw of the standard Gumbel distribution.
    """
    known = min(max(surprisal, LEAST), SURE)
    return float(-np.log(m) - np.log(-np.log1p(-np.exp(-known)))) + max(surprisal - SURE, 0.0)


def fit_tails(scores: Mapping[str, np.ndarray]) -> dict[str, Combination]:
    """The tails of tiles' scores, float64 [n] by name, of held-out inliers."""
    return {name: Combination.fit(values[:, None]) for name, values in scores.items()}


def load_tails(bundle: Bundle) -> dict[str, Combination]:
    """Those in the bundle's tiles.npz, or none. Raises BundleFormatError."""
    if TILES not in bundle.manifest.files:
        return {}
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, array in bundle.arrays(TILES).items():
        name, _, parameter = key.rpartition("/")
        if array.dtype != np.float64 or not np.isfinite(array).all():
            raise BundleFormatError(f"{TILES}: {key} is not finite float64")
        found.setdefault(name, {})[parameter] = array
    if unknown := sorted(set(found) - set(bundle.manifest.scores)):
        raise BundleFormatError(f"{TILES} holds tails of scores that the manifest does not define: {unknown}")
    return {name: Combination(arrays, 1, TILES) for name, arrays in found.items()}


def is_tiled(manifest: Manifest) -> bool:
    """Whether the manifest is of a model of tiles."""
    rule = manifest.preprocessing
    return isinstance(rule, Preprocessing) and rule.tiling is not None


def _batches(plan: Plan, image: np.ndarray) -> Iterator[np.ndarray]:
    """The image's tiles, float32 [n,C,H,W], AT_ONCE at a time."""
    for first in range(0, len(plan), AT_ONCE):
        tiles = plan.cut(image, first, AT_ONCE)
        yield unit_levels(tiles) if tiles.dtype == np.uint8 else tiles
