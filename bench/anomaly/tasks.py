"""The tasks: what a detector is fitted on, which unseen inliers it must let pass, which outliers it must find.

A detector is fitted on all images of the inliers' classes that are not of the official test part; held-out inliers and
outliers are of the test part. Where outliers are made from inliers (transformed, or with a defect), they are made from
other test images than the held-out ones. Everything is a function of the seed, by numpy.random.RandomState.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from bench.anomaly.defects import DEFECTS, with_defects
from bench.anomaly.elsewhere import GROUP as ELSEWHERE
from bench.anomaly.elsewhere import elsewhere
from bench.anomaly.task import Inliers, Outliers, Task
from bench.anomaly.transforms import TRANSFORMS
from training.config import DataConfig
from training.data import load_dataset

NAMES = ("mnist", "fashion-mnist")
DEFECTIVE = "fashion-mnist"
OUTLIERS = 2000
"""Outliers of a pair; half of the test part is held out, so that its rates are known to .0014 at 1%."""
DEFECTS_EACH = 500

Seed = int


@dataclass(frozen=True)
class Part:
    """Images uint8 [N,1,H,W] and their labels int64 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def of(self, classes: tuple[int, ...]) -> np.ndarray:
        """Images of those classes, in their order."""
        return self.images[np.isin(self.labels, classes)]

    def __getitem__(self, rows: np.ndarray | slice) -> Part:
        return Part(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Source:
    """A data set: everything that is not test, without copies of test images, and the official test part."""

    name: str
    train: Part
    test: Part


def load_source(name: str, directory: Path | None = None) -> Source:
    """``mnist`` or ``fashion-mnist``, by training.data. Raises DataError."""
    place = {} if directory is None else {"directory": directory}
    dataset = load_dataset(DataConfig(source=name, **place))
    assert dataset.labels is not None
    rest = np.sort(np.concatenate([indices for split, indices in dataset.splits.items() if split != "test"]))
    test = np.sort(dataset.splits["test"])
    train, test_part = (Part(dataset.pixels(rows), dataset.labels[rows]) for rows in (rest, test))
    return Source(name, train, test_part)


def load_sources(directory: Path | None = None) -> dict[str, Source]:
    """Both data sets by name. Raises DataError."""
    return {name: load_source(name, directory) for name in NAMES}


GROUPS = ("pairs", "parity", "one-class", "defects", "unseen", ELSEWHERE)


class Suite:
    """All tasks at one seed. ``limit`` keeps at most so many images of every set, for a smoke test."""

    def __init__(self, sources: Mapping[str, Source], seed: Seed = 0, limit: int | None = None) -> None:
        self._sources, self.seed, self.limit = sources, seed, limit

    def __iter__(self) -> Iterator[Task]:
        """Tasks of the two data sets, those of the same inliers in a row."""
        for name in self._sources:
            yield from self._whole(name)
        for name in self._sources:
            yield from self._subsets(name)

    def select(self, patterns: list[str]) -> list[Task]:
        """Tasks whose group or name matches one of ``patterns``. Raises ValueError for one that matches none."""
        tasks = list(self)
        if not all(any(_matches(task, pattern) for task in tasks) for pattern in patterns):
            tasks += elsewhere(self._random, self._limited)
        for pattern in patterns:
            if not any(_matches(task, pattern) for task in tasks):
                raise ValueError(f"no task matches {pattern!r}; groups: {', '.join(GROUPS)}; names as mnist/rotated")
        return [task for task in tasks if any(_matches(task, pattern) for pattern in patterns)]

    def _whole(self, name: str) -> Iterator[Task]:
        """A whole data set is the inliers."""
        source = self._sources[name]
        order = self._random(name).permutation(len(source.test.images))
        half = len(order) // 2
        rest = source.test[order[half:]].images
        inliers = self._inliers(name, source, None, source.test[order[:half]].images)
        yield Task(f"{name}/unseen", "unseen", inliers, None)
        for other in self._sources.values():
            if other.name != name:
                yield Task(f"{name}/{other.name}", "pairs", inliers, self._other(name, other))
        for transform in TRANSFORMS:
            yield Task(f"{name}/{transform}", "pairs", inliers, self._transformed(name, transform, rest))
        if name == DEFECTIVE:
            each = min(DEFECTS_EACH, len(rest) // len(DEFECTS))
            for at, kind in enumerate(DEFECTS):
                images = rest[at * each : (at + 1) * each]
                yield Task(f"{name}/{kind}", "defects", inliers, self._defective(kind, images))

    def _subsets(self, name: str) -> Iterator[Task]:
        """Some classes of a data set are the inliers, its others the outliers."""
        source = self._sources[name]
        classes = tuple(int(label) for label in np.unique(source.test.labels))
        if name == "mnist":
            even, odd = classes[::2], classes[1::2]
            yield self._against("mnist-even/odd", "parity", source, even, odd)
            yield self._against("mnist-odd/even", "parity", source, odd, even)
        for label in classes:
            rest = tuple(other for other in classes if other != label)
            yield self._against(f"{name}-{label}/rest", "one-class", source, (label,), rest)

    def _against(
        self, name: str, group: str, source: Source, inside: tuple[int, ...], outside: tuple[int, ...]
    ) -> Task:
        inliers = self._inliers(name.split("/")[0], source, inside, source.test.of(inside))
        return Task(name, group, inliers, lambda: Outliers(self._limited(source.test.of(outside), name), None))

    def _inliers(self, name: str, source: Source, classes: tuple[int, ...] | None, held_out: np.ndarray) -> Inliers:
        train = source.train.images if classes is None else source.train.of(classes)
        return Inliers(name, source.name, classes, self._limited(train, name), self._limited(held_out, name))

    def _other(self, name: str, other: Source) -> Callable[[], Outliers]:
        def draw() -> Outliers:
            order = self._random(f"{name}/{other.name}").permutation(len(other.test.images))[:OUTLIERS]
            return Outliers(self._limited(other.test[order].images), None)

        return draw

    def _transformed(self, name: str, transform: str, images: np.ndarray) -> Callable[[], Outliers]:
        def draw() -> Outliers:
            random = self._random(f"{name}/{transform}")
            return Outliers(TRANSFORMS[transform](self._limited(images[:OUTLIERS]), random), None)

        return draw

    def _defective(self, kind: str, images: np.ndarray) -> Callable[[], Outliers]:
        return lambda: Outliers(*with_defects(self._limited(images), kind, self.seed))

    def _limited(self, images: np.ndarray, shuffled_by: str | None = None) -> np.ndarray:
        """The first ``limit`` images, after a shuffle where their order may be that of their classes."""
        if self.limit is None or len(images) <= self.limit:
            return images
        order = self._random(shuffled_by).permutation(len(images)) if shuffled_by else np.arange(len(images))
        return images[order[: self.limit]]

    def _random(self, name: str) -> np.random.RandomState:
        """A stream of the seed's own for each name."""
        return np.random.RandomState([self.seed, zlib.crc32(name.encode())])


def _matches(task: Task, pattern: str) -> bool:
    return task.group == pattern or fnmatch(task.name, pattern)
