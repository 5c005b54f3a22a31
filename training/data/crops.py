"""Crops of a folder's images at their own resolution: the rows of a model of tiles.

Splits are of images: crops of one image, or of equal images, never stand in two of them. Where an image's crops lie is
drawn from its own content and the split's seed, whatever else is in the folder.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from training.config import DataConfig
from training.data.dataset import Dataset, WholeImages, digest, fingerprint, ordered_map
from training.data.source import Source, check_levels, check_usable, drawn, pool_labels, split_rows
from training.data.splits import number_groups
from training.errors import DataError
from training.progress import Track, untracked


class _Cut(NamedTuple):
    """An image's digest and its crops, uint8 [n,C,H,W]."""

    digest: bytes
    crops: np.ndarray


def load_crops(source: Source, config: DataConfig, track: Track = untracked) -> Dataset:
    """Read every image of ``source`` once, keep its crops, split by image.

    At any time few images are in memory; the crops are too, if they fit into ``config.memory_limit_mb``, and lie in a
    nameless temporary file otherwise. Raises as load_source.
    """
    rows = drawn(source.count, config)
    pool = _room((len(rows) * config.crops, *source.preprocessing.shape), config.memory_limit_mb)
    kept, digests, counts, skipped, filled = [], [], [], [], 0
    with track(f"read {source.name}", len(rows)) as advance:
        for row, cut in zip(rows.tolist(), _cuts(source, rows, config), strict=True):
            advance(1)
            if isinstance(cut, DataError):
                skipped.append((source.pixels.name(row), str(cut)))
                continue
            pool[filled : filled + len(cut.crops)] = cut.crops
            filled += len(cut.crops)
            kept.append(row)
            digests.append(cut.digest)
            counts.append(len(cut.crops))
    check_usable(source, skipped, len(kept), config)
    check_levels(source, pool[:filled].max())
    return _dataset(source, config, pool[:filled], np.array(kept), digests, np.array(counts), skipped)


def _dataset(
    source: Source,
    config: DataConfig,
    pool: np.ndarray,
    kept: np.ndarray,
    digests: list[bytes],
    counts: np.ndarray,
    skipped: list[tuple[str, str]],
) -> Dataset:
    """The data set of the crops in ``pool``: ``counts`` of each image of ``kept``, one image after the other."""
    groups = number_groups(np.frombuffer(b"".join(digests), np.uint8).reshape(len(kept), -1))
    images = split_rows(source, kept, groups, config)
    labels = pool_labels(source, kept)
    of_crop = np.repeat(np.arange(len(kept)), counts)
    splits = {name: _shuffled(np.flatnonzero(np.isin(of_crop, found)), config) for name, found in images.items()}
    crop_labels = None if labels is None else labels[of_crop]
    every = np.frombuffer(b"".join(map(digest, pool)), np.uint8).reshape(len(pool), -1)
    return Dataset(
        name=source.name,
        preprocessing=source.preprocessing,
        splits=splits,
        labels=crop_labels,
        label_names=None if labels is None else source.label_names,
        fingerprint=fingerprint(source.preprocessing.shape, source.dtype, every, crop_labels, splits),
        skipped=skipped,
        dtype=source.dtype,
        store=pool,
        details=source.details
        | {
            "split_seed": config.split_seed,
            "duplicates": len(kept) - len(set(groups.tolist())),
            "whole_images": len(kept),
            "whole_splits": {name: len(found) for name, found in images.items()},
        },
        whole_images=WholeImages(source.pixels, kept, images),
    )


def corners(shape: tuple[int, ...], tile: tuple[int, int], count: int, seed: int, content: bytes) -> np.ndarray:
    """Upper left corners int64 [n,2] of at most ``count`` different crops of an image [C,h,w], by its digest."""
    down, across = (side - length + 1 for side, length in zip(shape[1:], tile, strict=True))
    stream = hashlib.sha256(seed.to_bytes(4, "little") + content).digest()
    random = np.random.RandomState(np.frombuffer(stream, "<u4"))
    places = np.unique(random.randint(down * across, size=count, dtype=np.int64))
    return np.stack(np.divmod(places, across), axis=1)


def _cuts(source: Source, rows: np.ndarray, config: DataConfig) -> Iterator[_Cut | DataError]:
    """For each row its image's crops, or the DataError that says why there are none."""
    _, height, width = source.preprocessing.shape

    def cut(row: int) -> _Cut | DataError:
        try:
            image = source.pixels.read(row)
        except DataError as error:
            return error
        content = hashlib.sha256(repr(image.shape).encode() + digest(image)).digest()
        found = corners(image.shape, (height, width), config.crops, config.split_seed, content)
        return _Cut(content, np.stack([image[:, y : y + height, x : x + width] for y, x in found]))

    yield from ordered_map(cut, rows.tolist(), source.workers, source.workers)


def _room(shape: tuple[int, ...], limit_mb: int) -> np.ndarray:
    """An uninitialised uint8 array: in memory, or mapped to a temporary file that vanishes with it."""
    if math.prod(shape) <= limit_mb * 2**20:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _shuffled(indices: np.ndarray, config: DataConfig) -> np.ndarray:
    """In seeded order: the first n are a random sample."""
    return np.random.RandomState(config.split_seed).permutation(indices)
