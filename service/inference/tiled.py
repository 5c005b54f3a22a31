"""TiledModel: a model of tiles, answering on whole images of any size that holds a tile.

An image's tiles go through the model a few at a time, in the order of their plan, so that beside the image and its map
the memory in use does not depend on the image's size but for a few numbers a tile. Tiles are rows of the model, and
rows are independent, bitwise: how many go through at once changes nothing.

The score of an image is an aggregate of its tiles' scores (service.bundle.input_rules.Tiling). Its p-value comes from
whole images: tiles of one image are alike, and no exchangeable sample. The calibration's promise holds for images whose
sizes come about as the calibration images' did. For other sizes the aggregate itself is made comparable: ``maximum``
allows for the number of tiles as if they were independent, ``top`` looks at a share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np

from service.bundle.files import Bundle
from service.bundle.input_rules import Preprocessing, Tiling
from service.bundle.manifest import TILES, Manifest, ScoreDefinition
from service.errors import BundleFormatError, InvalidInput, UnsupportedVerb
from service.formats.tiling import Stitcher, TilePlan
from service.inference.model import Model, Scores, TileSummary, join_scores
from service.pixels import unit_levels
from service.scores.detector_arrays import Arrays, by_score, keyed
from service.scores.maps.anomaly_map import MapKind
from service.scores.tail import Tail, fit_tails, tail_arrays, tails_from_arrays

AT_ONCE = 64
"""Tiles that are cut out and given to the model together."""
MEANS = ("elbo", "log_likelihood", "rate", "distortion", "bits_per_dim")
"""Fields of an image's scores that are means over its tiles."""
MAIN = ""
"""Name of the main score beside the further ones: no score of a bundle is called so."""
MAX_SURPRISAL = 600.0
"""Nats beyond which −log(1 − p) is taken for p, which it is to the last bit long before: p itself would underflow."""
MIN_SURPRISAL = 1e-9
"""Nats given to a tile that scores below every held-out one: its p is 1, and log(1 − p) would be infinite."""

Tails = Mapping[str, Tail]
"""Tails of one tile's scores, by score name."""


class TiledModel:
    """A model whose manifest says ``tiling``. Safe to call from several threads."""

    def __init__(self, model: Model, tails: Tails | None = None) -> None:
        """``tails``: instead of the bundle's own, while these are being fitted."""
        rule = model.manifest.preprocessing
        assert isinstance(rule, Preprocessing)
        assert rule.tiling is not None
        self.model, self.rule, self.tiling = model, rule, rule.tiling
        self._tails = load_tails(model.bundle) if tails is None else tails

    def plan(self, image: np.ndarray) -> TilePlan:
        """Lay out the tiles of an image [C,h,w]. Raises InvalidInput if it is smaller than a tile."""
        return TilePlan.of(self.rule, *image.shape[1:])

    def score(
        self,
        images: Sequence[np.ndarray] | np.ndarray,
        definition: ScoreDefinition | None = None,
        maps: bool = False,
        also: Mapping[str, ScoreDefinition] | None = None,
        map_kind: MapKind | None = None,
        latents: bool = False,
    ) -> Scores:
        """Scores of whole images [C,h,w], uint8 or float32 in [0, 1], by one of the bundle's definitions.

        The other arguments are those of Model.score. Raises as Model.score; also InvalidInput for an image smaller than
        a tile, and for a definition that is not the bundle's own where the aggregate needs the tail of its tiles'
        scores, and UnsupportedVerb where that tail was never fitted.
        """
        main = definition or self.model.manifest.scores[self.model.manifest.default_score]
        tails = {name: self._tail(scored_by) for name, scored_by in {MAIN: main, **(also or {})}.items()}

        def score_tiles(tiles: np.ndarray) -> Scores:
            return self.model.score(tiles, main, maps, also, map_kind, latents)

        return join_scores([self._score(image, score_tiles, tails, maps) for image in images])

    def tile_scores(self, image: np.ndarray, definitions: Mapping[str, ScoreDefinition]) -> dict[str, np.ndarray]:
        """Scores of an image's tiles, float64 [tiles] by name, in the plan's order. Raises InvalidInput."""
        plan, main = self.plan(image), next(iter(definitions.values()))
        parts = [self.model.score(tiles, main, also=definitions).also for tiles in _batches(plan, image)]
        return {name: np.concatenate([part[name] for part in parts]) for name in definitions}

    def _score(
        self,
        image: np.ndarray,
        score_tiles: Callable[[np.ndarray], Scores],
        tails: Mapping[str, Tail | None],
        maps: bool,
    ) -> Scores:
        """The scores of one image [C,h,w], a batch of tiles at a time; ``tails``: of the main score and of the others.

        Maps are stitched as they come: those of all tiles are not in memory at once.
        """
        plan = self.plan(image)
        stitcher = Stitcher(plan) if maps else None
        parts: list[Scores] = []
        for tiles in _batches(plan, image):
            scored = score_tiles(tiles)
            if stitcher is not None:
                stitcher.add(cast(np.ndarray, scored.map))
            parts.append(scored._replace(map=None))
        return self._of_image(join_scores(parts), plan, tails)._replace(map=[stitcher.stitched()] if stitcher else None)

    def _of_image(self, of_tiles: Scores, plan: TilePlan, tails: Mapping[str, Tail | None]) -> Scores:
        """Make the scores of all tiles of an image, without maps, those of the image: one row."""
        worst = int(np.argmax(of_tiles.score))
        aggregates = {
            name: np.array([aggregate(scores, plan, self.tiling, tails[name])])
            for name, scores in {MAIN: of_tiles.score, **of_tiles.also}.items()
        }
        return of_tiles._replace(
            score=aggregates.pop(MAIN),
            **{name: getattr(of_tiles, name).mean(keepdims=True) for name in MEANS},
            standard_error=np.full(1, np.nan),
            latents=None if of_tiles.latents is None else of_tiles.latents.mean(axis=0, keepdims=True),
            also=aggregates,
            tiles=[TileSummary(len(plan), *plan.corner(worst), float(of_tiles.score[worst]))],
        )

    def _tail(self, definition: ScoreDefinition) -> Tail | None:
        """The tail of the definition's tile scores, or None where the aggregate needs none. Raises as ``score``."""
        if self.tiling.aggregate != "maximum":
            return None
        scores = self.model.manifest.scores
        name = next((name for name, candidate in scores.items() if candidate == definition), None)
        if name is None:
            raise InvalidInput(
                f"{definition.estimator} with k={definition.k} and seed={definition.seed} is none of this bundle's "
                f"scores ({', '.join(sorted(scores))}), and a model of tiles knows the tails of these only"
            )
        if name not in self._tails:
            raise UnsupportedVerb(f"score {name!r} of tiles has no fitted tail here: calibrate the bundle first")
        return self._tails[name]


def aggregate(scores: np.ndarray, plan: TilePlan, tiling: Tiling, tail: Tail | None) -> float:
    """The image's score from its tiles' scores, float64 [tiles] in any order (service.bundle.input_rules.Tiling)."""
    ordered = np.sort(scores)[::-1]
    if tiling.aggregate == "top":
        return float(ordered[: max(1, round(tiling.share * len(ordered)))].mean())
    assert tail is not None
    return surprisal_of_maximum(float(tail.surprisal(ordered[:1])[0]), plan.area_in_tiles)


def surprisal_of_maximum(surprisal: float, m: float) -> float:
    """−log(−m log(1 − p)) with p = exp(−surprisal), nats: strictly rising in p's surprisal, and finite.

    The chance that the least of m independent p-values is at most p is 1 − (1 − p)^m (Šidák 1967), which is 1 − exp(−λ)
    with λ = −m log(1 − p): about the number of tiles that score as high in so large an image. This is −log λ, of m
    independent inliers a draw of the standard Gumbel distribution.
    """
    bounded = min(max(surprisal, MIN_SURPRISAL), MAX_SURPRISAL)
    return float(-np.log(m) - np.log(-np.log1p(-np.exp(-bounded)))) + max(surprisal - MAX_SURPRISAL, 0.0)


def fit_tile_tails(scores: Mapping[str, np.ndarray]) -> dict[str, Tail]:
    """Fit the tails of tiles' scores to those of held-out inliers, float64 [n] by name."""
    return {name: fit_tails(values[:, None])[0] for name, values in scores.items()}


def tile_tail_arrays(tails: Tails) -> Arrays:
    """Arrays of the tails as tiles.npz holds them, by the key "SCORE/PARAMETER"."""
    return keyed({name: tail_arrays([tail]) for name, tail in tails.items()})


def load_tails(bundle: Bundle) -> dict[str, Tail]:
    """Read the tails from the bundle's tiles.npz, by score name; none where the file is missing.

    Raises BundleFormatError for arrays that are not those of the manifest's scores.
    """
    if TILES not in bundle.manifest.files:
        return {}
    stored = by_score(bundle.arrays(TILES))
    if unknown := sorted(stored.keys() - bundle.manifest.scores.keys()):
        raise BundleFormatError(f"{TILES} holds tails of scores that the manifest does not define: {unknown}")
    return {name: tails_from_arrays(arrays, 1, TILES)[0] for name, arrays in stored.items()}


def is_tiled(manifest: Manifest) -> bool:
    """True if the manifest is that of a model of tiles."""
    rule = manifest.preprocessing
    return isinstance(rule, Preprocessing) and rule.tiling is not None


def _batches(plan: TilePlan, image: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the image's tiles, float32 [n,C,H,W], AT_ONCE at a time."""
    for first in range(0, len(plan), AT_ONCE):
        tiles = plan.cut(image, first, AT_ONCE)
        yield unit_levels(tiles) if tiles.dtype == np.uint8 else tiles
