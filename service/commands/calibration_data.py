"""A user's good rows, as ``vaeserve calibrate`` takes them: rows of the model, or whole images of a model of tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from service.bundle.input_rules import Preprocessing
from service.bundle.manifest import Manifest
from service.commands.offline_scoring import BadFile
from service.errors import InvalidInput
from service.formats.images import ImageLimits, decode_whole
from service.formats.tiling import Plan
from service.inference.model import Model
from service.inference.tiled import TiledModel, fit_tails
from service.pixels import unit_levels
from service.scores.detectors import Combination
from service.scores.fitting import LEAST_ROWS, most_held_out_rows

BATCH = 64
LEAST_IMAGES = 5
"""Tiles of fewer images would tell what these images are like, not what the surface is."""
SEED = 0

Progress = Callable[[int], None]
Scores = dict[str, np.ndarray]
Tails = Mapping[str, Combination]


class CalibrationData(Protocol):
    """What is calibrated on, one score each."""

    @property
    def noun(self) -> str:
        """What they are called."""
        ...

    def __len__(self) -> int: ...

    def to_fit(self, manifest: Manifest, wanted: int) -> int:
        """How many of ``wanted`` to fit the scores to: 0 where that is too few of them."""
        ...

    def sample(self, manifest: Manifest, indices: np.ndarray) -> np.ndarray:
        """Rows of the model, float32 [m,C,H,W], to fit the scores to, of those at ``indices``."""
        ...

    def tails(self, model: Model, indices: np.ndarray, progress: Progress | None) -> Tails | None:
        """The tails of tiles' scores, as of those at ``indices``; None where there are no tiles."""
        ...

    def scores(self, model: Model, tails: Tails | None, indices: np.ndarray, progress: Progress | None) -> Scores:
        """Scores by name, float64 [n], of those at ``indices``; ``tails`` in place of the bundle's own."""
        ...


@dataclass(frozen=True)
class ModelRows:
    """Rows of the model, uint8 or float32 [n,C,H,W]; ``to_unit`` makes a batch of them what the model takes."""

    rows: np.ndarray
    to_unit: Callable[[np.ndarray], np.ndarray]
    noun: str = "rows"

    def __len__(self) -> int:
        return len(self.rows)

    def to_fit(self, manifest: Manifest, wanted: int) -> int:
        n = min(wanted, most_held_out_rows(manifest))
        return n if n >= LEAST_ROWS else 0

    def sample(self, manifest: Manifest, indices: np.ndarray) -> np.ndarray:
        return self.to_unit(self.rows[indices])

    def tails(self, model: Model, indices: np.ndarray, progress: Progress | None) -> None:
        return None

    def scores(self, model: Model, tails: Tails | None, indices: np.ndarray, progress: Progress | None) -> Scores:
        parts = []
        for start in range(0, len(indices), BATCH):
            x = self.to_unit(self.rows[indices[start : start + BATCH]])
            parts.append(model.score(x, also=model.manifest.scores).also)
            if progress:
                progress(len(x))
        return _joined(parts)


@dataclass(frozen=True)
class WholeImages:
    """``count`` images of any sizes, uint8 [C,h,w] each, which ``read`` gives by number: one at a time is in memory."""

    count: int
    read: Callable[[int], np.ndarray]
    noun: str = "images"

    def __len__(self) -> int:
        return self.count

    def to_fit(self, manifest: Manifest, wanted: int) -> int:
        return wanted if wanted >= LEAST_IMAGES else 0

    def sample(self, manifest: Manifest, indices: np.ndarray) -> np.ndarray:
        """Tiles of the images, as many of each, image by image; which of its plan's is drawn by a fixed seed."""
        rule, each = manifest.preprocessing, -(-max(most_held_out_rows(manifest), len(indices)) // len(indices))
        assert isinstance(rule, Preprocessing)
        random, found = np.random.RandomState(SEED), []
        for index in indices.tolist():
            image = self.read(index)
            plan = Plan.of(rule, *image.shape[1:])
            found += [plan.cut(image, tile, 1) for tile in random.permutation(len(plan))[:each]]
        if len(found) < LEAST_ROWS:
            raise InvalidInput(
                f"{len(indices)} images hold {len(found)} tiles to fit the scores on: expected {LEAST_ROWS}; give more "
                "or larger images, or --fit-share 0"
            )
        return unit_levels(np.concatenate(found))

    def tails(self, model: Model, indices: np.ndarray, progress: Progress | None) -> Tails:
        tiled = TiledModel(model, {})
        return fit_tails(_joined(self._each(lambda x: tiled.tile_scores(x, model.manifest.scores), indices, progress)))

    def scores(self, model: Model, tails: Tails | None, indices: np.ndarray, progress: Progress | None) -> Scores:
        tiled = TiledModel(model, tails)
        names = model.manifest.scores
        return _joined(self._each(lambda image: tiled.score([image], also=names).also, indices, progress))

    def _each(
        self, score: Callable[[np.ndarray], Scores], indices: np.ndarray, progress: Progress | None
    ) -> Iterable[Scores]:
        for index in indices.tolist():
            yield score(self.read(index))
            if progress:
                progress(1)


def open_whole_images(
    files: Sequence[Path], rule: Preprocessing, limits: ImageLimits
) -> tuple[WholeImages, list[Path], list[BadFile]]:
    """The images among ``files`` that hold a tile, which files these are, and the others with the reason.

    Each is decoded once to find out, and again whenever it is read.
    """
    good: list[Path] = []
    bad: list[BadFile] = []
    for path in files:
        try:
            decode_whole(path.read_bytes(), rule, limits)
            good.append(path)
        except (InvalidInput, OSError) as error:
            bad.append(BadFile(path, str(error)))

    def read(index: int) -> np.ndarray:
        try:
            return decode_whole(good[index].read_bytes(), rule, limits)
        except (InvalidInput, OSError) as error:
            raise InvalidInput(f"{good[index]} has changed meanwhile: {error}") from error

    return WholeImages(len(good), read), good, bad


def _joined(parts: Iterable[Scores]) -> Scores:
    found = list(parts)
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}
