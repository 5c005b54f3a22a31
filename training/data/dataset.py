"""Dataset: images, vectors or signals as a pool of arrays, and the splits that index it."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np

from service.bundle.input_rules import Backbone, InputRule
from training.errors import DataError


class Pixels(Protocol):
    """Where pixels, or other numbers, come from: random access to N images or rows of one shape and dtype."""

    def read(self, index: int) -> np.ndarray:
        """Image ``index`` as uint8 [C,H,W], or float32 [C,H,W] in [0,1]; of a vector or signal any finite float32.

        Raises DataError with the reason.
        """

    def name(self, index: int) -> str:
        """What to call image ``index`` in a message."""


@dataclass(frozen=True)
class Streamed:
    """Pixels that are read again whenever they are wanted: image i of the pool is ``source`` image ``kept[i]``."""

    source: Pixels
    kept: np.ndarray
    digests: np.ndarray
    workers: int

    def read(self, index: int) -> np.ndarray:
        """Image ``index`` of the pool. Raises DataError if it is no longer what it was when the data set was opened."""
        where = int(self.kept[index])
        changed = f"{self.source.name(where)}: changed since the data set was opened"
        try:
            pixels = self.source.read(where)
        except DataError as error:
            raise DataError(f"{changed} ({error})") from error
        if digest(pixels) != self.digests[index].tobytes():
            raise DataError(changed)
        return pixels


@dataclass(frozen=True)
class WholeImages:
    """The images that a data set's crops are cut from, whose crops share their split.

    ``kept``: int64 [n], the images of ``source`` that are used; ``splits``: of each split, indices into ``kept``.
    """

    source: Pixels
    kept: np.ndarray
    splits: Mapping[str, np.ndarray]

    def read(self, index: int) -> np.ndarray:
        """Read image ``index`` in its own size, uint8 [C,h,w]. Raises DataError."""
        return self.source.read(int(self.kept[index]))

    def name(self, index: int) -> str:
        """Return what messages call image ``index``."""
        return self.source.name(int(self.kept[index]))


@dataclass(frozen=True)
class Dataset:
    """Images, vectors, signals or features of one shape, and disjoint splits of them; what is said of images holds for
    all.

    ``splits`` maps train, validation, calibration and test to int64 indices into the pool of N images, in seeded order
    (all of them, but those equal to images of a test part that the data set came with);
    ``labels`` int64 [N] are aligned with the pool; ``skipped`` names each image that could not be used, with the
    reason; ``fingerprint`` (SHA-256, hex) changes when any pixel, label or split does. ``names``: what to call the
    images of the calibration split in a message, by index. ``whole_images``: those that the crops of a data set of
    crops are cut from.
    """

    name: str
    preprocessing: InputRule | Backbone
    splits: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    label_names: list[str] | None
    fingerprint: str
    skipped: list[tuple[str, str]]
    dtype: np.dtype
    store: np.ndarray | Streamed = field(repr=False)
    details: Mapping[str, Any] = field(default_factory=dict, repr=False)
    names: Mapping[int, str] = field(default_factory=dict, repr=False)
    whole_images: WholeImages | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.store) if isinstance(self.store, np.ndarray) else len(self.store.kept)

    @property
    def streamed(self) -> bool:
        """Whether pixels are read from disk each time, because all of them would pass the memory limit."""
        return isinstance(self.store, Streamed)

    def pixels(self, indices: np.ndarray | Sequence[int]) -> np.ndarray:
        """Images ``indices`` of the pool: uint8 [B,C,H,W], or float32 in [0,1] where the source holds floats.

        Vectors [B,1,1,D] and signals [B,C,1,T] are float32 in their own units.

        Raises DataError if a streamed file has vanished or changed.
        """
        if isinstance(self.store, np.ndarray):
            return self.store[np.asarray(indices, dtype=np.int64)]
        rows = [int(index) for index in indices]
        return self._stack(ordered_map(self.store.read, rows, self.store.workers, 4 * self.store.workers), len(rows))

    def batches(self, index_batches: Iterable[np.ndarray], prefetch: int = 4) -> Iterator[np.ndarray]:
        """``pixels`` of each index batch, in order.

        Streamed data are read in threads, up to ``prefetch`` batches ahead of the one that is being used, and
        ``index_batches`` is consumed as far ahead; data in memory are indexed one batch at a time.
        """
        if isinstance(self.store, np.ndarray):
            yield from map(self.pixels, index_batches)
        else:
            yield from ordered_map(self._read_batch, index_batches, self.store.workers, prefetch)

    def describe(self) -> dict[str, Any]:
        """What identifies the data, for a bundle's provenance; JSON values only, no folder of this machine.

        The number of rows is called images, vectors or signals.
        """
        return {
            "name": self.name,
            f"{self.preprocessing.kind}s": len(self),
            "shape": list(self.preprocessing.natural),
            "dtype": str(self.dtype),
            "splits": {name: len(indices) for name, indices in self.splits.items()},
            "label_names": self.label_names,
            "skipped": len(self.skipped),
            "fingerprint": self.fingerprint,
            **self.details,
        }

    def _read_batch(self, indices: np.ndarray) -> np.ndarray:
        assert isinstance(self.store, Streamed)
        return self._stack((self.store.read(int(index)) for index in indices), len(indices))

    def _stack(self, images: Iterable[np.ndarray], count: int) -> np.ndarray:
        batch = np.empty((count, *self.preprocessing.shape), dtype=self.dtype)
        for row, image in zip(batch, images, strict=True):
            row[...] = image
        return batch


def digest(pixels: np.ndarray) -> bytes:
    """SHA-256 of an image's pixels in C order."""
    return hashlib.sha256(pixels.tobytes()).digest()


def fingerprint(
    shape: tuple[int, int, int],
    dtype: np.dtype,
    digests: np.ndarray,
    labels: np.ndarray | None,
    splits: Mapping[str, np.ndarray],
) -> str:
    """SHA-256, hex, over every image's digest, the labels and the splits; the same however the data were stored."""
    arrays = {"digests": digests} | ({} if labels is None else {"labels": labels.astype("<i8")})
    arrays |= {f"split.{name}": indices.astype("<i8") for name, indices in splits.items()}
    parts = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    identity = {"shape": list(shape), "dtype": str(dtype), **parts}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


A = TypeVar("A")
B = TypeVar("B")


def ordered_map(function: Callable[[A], B], items: Iterable[A], workers: int, ahead: int) -> Iterator[B]:
    """As ``map``, on ``workers`` threads, with at most ``ahead`` results under way or waiting.

    ``items`` is read that far ahead. An exception of ``function`` is raised where its result would have come.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[B]] = deque()
        try:
            pending.extend(pool.submit(function, item) for item in islice(remaining, max(ahead, 1)))
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
