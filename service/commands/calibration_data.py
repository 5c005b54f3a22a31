"""Data that ``vaeserve calibrate`` takes: a user's good rows, or whole images where the model is one of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from service.bundle.input_rules import Preprocessing
from service.bundle.manifest import Manifest
from service.commands.offline_scoring import BadFile
from service.errors import InvalidInput
from service.formats.folders import printable
from service.formats.images import ImageLimits, decode_whole_image
from service.formats.tiling import TilePlan
from service.inference.model import Model
from service.inference.tiled import Tails, TiledModel, fit_tile_tails
from service.pixels import unit_levels
from service.scores.fitting import MIN_ROWS, max_held_out_rows

BATCH = 64
MIN_IMAGES = 5
"""Fewest images that scores are fitted to: tiles of fewer would describe these images, not the surface."""
SEED = 0

Progress = Callable[[int], None]
"""Called with the number of rows or images that were just processed."""
ScoresByName = dict[str, np.ndarray]


class CalibrationData(Protocol):
    """Data to calibrate on: items, rows or images, that each have one score."""

    @property
    def noun(self) -> str:
        """Plural name of the items, for messages."""
        ...

    def __len__(self) -> int: ...

    def count_to_fit(self, manifest: Manifest, most: int) -> int:
        """Number of items to fit the scores to, at most ``most``; 0 where these are too few."""
        ...

    def sample(self, manifest: Manifest, indices: np.ndarray) -> np.ndarray:
        """Rows of the model, float32 [m,C,H,W], to fit the scores to, taken from the items at ``indices``."""
        ...

    def tails(self, model: Model, indices: np.ndarray, progress: Progress | None) -> Tails | None:
        """Fit the tails of tiles' scores to the items at ``indices``; None where there are no tiles."""
        ...

    def scores(self, model: Model, tails: Tails | None, indices: np.ndarray, progress: Progress | None) -> ScoresByName:
        """Scores by name, float64 [n], of the items at ``indices``; ``tails`` instead of the bundle's own."""
        ...


@dataclass(frozen=True)
class ModelRows:
    """Rows of the model, uint8 or float32 [n,C,H,W]; ``to_unit`` converts a batch of them to what the model takes."""

    rows: np.ndarray
    to_unit: Callable[[np.ndarray], np.ndarray]
    noun: str = "rows"

    def __len__(self) -> int:
        return len(self.rows)

    def count_to_fit(self, manifest: Manifest, most: int) -> int:
        n = min(most, max_held_out_rows(manifest))
        return n if n >= MIN_ROWS else 0

    def sample(self, manifest: Manifest, indices: np.ndarray) -> np.ndarray:
        return self.to_unit(self.rows[indices])

    def tails(self, model: Model, indices: np.ndarray, progress: Progress | None) -> None:
        return None

    def scores(self, model: Model, tails: Tails | None, indices: np.ndarray, progress: Progress | None) -> ScoresByName:
        parts = []
        for start in range(0, len(indices), BATCH):
            x = self.to_unit(self.rows[indices[start : start + BATCH]])
            parts.append(model.score(x, also=model.manifest.scores).also)
            if progress:
                progress(len(x))
        return _joined(parts)


@dataclass(frozen=True)
class WholeImages:
    """Images of any sizes, ``count`` of them; ``read`` gives one by its number, uint8 [C,h,w].

    No more than one image is in memory.
    """

    count: int
    read: Callable[[int], np.ndarray]
    noun: str = "images"

    def __len__(self) -> int:
        return self.count

    def count_to_fit(self, manifest: Manifest, most: int) -> int:
        return most if most >= MIN_IMAGES else 0

    def sample(self, manifest: Manifest, indices: np.ndarray) -> np.ndarray:
        """Tiles of the images, float32 [m,C,H,W], the same number of each; a fixed seed draws them from its plan."""
        rule = manifest.preprocessing
        tiles_of_each = -(-max(max_held_out_rows(manifest), len(indices)) // len(indices))
        assert isinstance(rule, Preprocessing)
        random, tiles = np.random.RandomState(SEED), []
        for index in indices.tolist():
            image = self.read(index)
            plan = TilePlan.of(rule, *image.shape[1:])
            tiles += [plan.cut(image, tile, 1) for tile in random.permutation(len(plan))[:tiles_of_each]]
        if len(tiles) < MIN_ROWS:
            raise InvalidInput(
                f"{len(indices)} images hold {len(tiles)} tiles to fit the scores on: expected {MIN_ROWS}; give more "
                "or larger images, or --fit-share 0"
            )
        return unit_levels(np.concatenate(tiles))

    def tails(self, model: Model, indices: np.ndarray, progress: Progress | None) -> Tails:
        tiled = TiledModel(model, {})
        return fit_tile_tails(
            _joined(self._scores_of_each(lambda x: tiled.tile_scores(x, model.manifest.scores), indices, progress))
        )

    def scores(self, model: Model, tails: Tails | None, indices: np.ndarray, progress: Progress | None) -> ScoresByName:
        tiled = TiledModel(model, tails)
        names = model.manifest.scores
        return _joined(self._scores_of_each(lambda image: tiled.score([image], also=names).also, indices, progress))

    def _scores_of_each(
        self, score: Callable[[np.ndarray], ScoresByName], indices: np.ndarray, progress: Progress | None
    ) -> Iterable[ScoresByName]:
        """Yield the scores of the images at ``indices``, one image at a time."""
        for index in indices.tolist():
            yield score(self.read(index))
            if progress:
                progress(1)


def open_whole_images(
    files: Sequence[Path], rule: Preprocessing, limits: ImageLimits
) -> tuple[WholeImages, list[Path], list[BadFile]]:
    """Open the images among ``files`` that hold a tile: the images, their files, and the other files with the reason.

    Each file is decoded once to find out, and again whenever it is read.
    """
    good: list[Path] = []
    bad: list[BadFile] = []
    for path in files:
        try:
            decode_whole_image(path.read_bytes(), rule, limits)
            good.append(path)
        except (InvalidInput, OSError) as error:
            bad.append(BadFile(path, str(error)))

    def read(index: int) -> np.ndarray:
        try:
            return decode_whole_image(good[index].read_bytes(), rule, limits)
        except (InvalidInput, OSError) as error:
            raise InvalidInput(f"{printable(good[index])} has changed meanwhile: {error}") from error

    return WholeImages(len(good), read), good, bad


def _joined(batches: Iterable[ScoresByName]) -> ScoresByName:
    """Join the scores of several batches, by name."""
    parts = list(batches)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
