"""From an opened source to a Dataset: read every image (or row) once, drop the bad ones, split the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from service.bundle.input_rules import InputRule
from training.config import DataConfig
from training.data.dataset import Dataset, Pixels, Streamed, digest, fingerprint, ordered_map
from training.data.splits import number_groups, split, split_with_test
from training.errors import BadImages, DataError, DataFormatError, SplitError
from training.progress import Track, untracked

NAMED = 10  # bad images that a message names


@dataclass(frozen=True)
class Source:
    """``count`` images, vectors or signals that have been found but not read, and what is known of them.

    ``labels`` int64 [count] (-1: none) and ``is_test`` bool [count] are aligned with the images; ``workers`` is the
    number of threads that reading profits from; ``details`` go into the provenance.
    """

    name: str
    pixels: Pixels
    count: int
    preprocessing: InputRule
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.uint8))
    labels: np.ndarray | None = None
    label_names: list[str] | None = None
    is_test: np.ndarray | None = None
    workers: int = 1
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def noun(self) -> str:
        """What a row is called: image, vector or signal."""
        return self.preprocessing.kind


@dataclass
class _Scan:
    """What came of reading every image once: ``pixels`` [N,C,H,W] if they fit into memory, and the highest of all."""

    kept: list[int]
    digests: list[bytes]
    skipped: list[tuple[str, str]]
    pixels: np.ndarray | None
    highest: float = -np.inf


def slug(text: str) -> str:
    """``text`` as a bundle's name may be: lower case, digits, dots, dashes."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("._-")[:64] or "images"


def load_source(source: Source, config: DataConfig, track: Track = untracked) -> Dataset:
    """Read, check and split ``source``. Raises DataError: bad images, masks as levels, too few usable images."""
    rows = drawn(source.count, config)
    scan = _scan(source, rows, config, track)
    check_usable(source, scan.skipped, len(scan.kept), config)
    check_levels(source, scan.highest)
    kept = np.array(scan.kept, dtype=np.int64)
    digests = np.frombuffer(b"".join(scan.digests), dtype=np.uint8).reshape(len(kept), -1)
    groups = number_groups(digests)
    splits = split_rows(source, kept, groups, config)
    labels = pool_labels(source, kept)
    store = Streamed(source.pixels, kept, digests, source.workers) if scan.pixels is None else scan.pixels
    return Dataset(
        name=source.name,
        preprocessing=source.preprocessing,
        splits=splits,
        labels=labels,
        label_names=None if labels is None else source.label_names,
        fingerprint=fingerprint(source.preprocessing.shape, source.dtype, digests, labels, splits),
        skipped=scan.skipped,
        dtype=source.dtype,
        store=store,
        details=source.details
        | {
            "split_seed": config.split_seed,
            "duplicates": len(kept) - len(set(groups.tolist())),
            "copies_of_test_left_out": len(kept) - sum(map(len, splits.values())),
        },
        names={index: source.pixels.name(int(kept[index])) for index in splits["calibration"].tolist()},
    )


def drawn(count: int, config: DataConfig) -> np.ndarray:
    """Indices of the images to use: all, or ``config.limit`` of them drawn by the split's seed; ascending."""
    if config.limit is None or config.limit >= count:
        return np.arange(count)
    return np.sort(np.random.RandomState(config.split_seed).permutation(count)[: config.limit])


def _scan(source: Source, rows: np.ndarray, config: DataConfig, track: Track) -> _Scan:
    shape = (len(rows), *source.preprocessing.shape)
    fits = int(np.prod(shape, dtype=np.int64)) * source.dtype.itemsize <= config.memory_limit_mb * 2**20
    scan = _Scan([], [], [], np.empty(shape, dtype=source.dtype) if fits else None)
    with track(f"read {source.name}", len(rows), f"{source.noun}s") as advance:
        for row, outcome in zip(rows.tolist(), _outcomes(source, rows), strict=True):
            advance(1)
            if isinstance(outcome, DataError):
                scan.skipped.append((source.pixels.name(row), str(outcome)))
                continue
            if scan.pixels is not None:
                scan.pixels[len(scan.kept)] = outcome
            scan.kept.append(row)
            scan.highest = max(scan.highest, outcome.max())
            scan.digests.append(digest(outcome))
    if scan.pixels is not None:
        scan.pixels = scan.pixels[: len(scan.kept)]
    return scan


def _outcomes(source: Source, rows: np.ndarray) -> Iterator[np.ndarray | DataError]:
    """For each row its pixels, or the DataError that says why there are none."""

    def outcome(row: int) -> np.ndarray | DataError:
        try:
            return source.pixels.read(row)
        except DataError as error:
            return error

    if source.workers == 1:
        yield from map(outcome, rows.tolist())
    else:
        yield from ordered_map(outcome, rows.tolist(), source.workers, 4 * source.workers)


def check_usable(source: Source, skipped: list[tuple[str, str]], kept: int, config: DataConfig) -> None:
    """Raises BadImages (on_bad = "refuse") and SplitError (nothing to use)."""
    if skipped and config.on_bad == "refuse":
        raise BadImages(f"{source.name}: {len(skipped)} {source.noun}s cannot be used:\n{_listed(skipped)}")
    if not kept:
        bad = f"; all {len(skipped)} found cannot be used:\n{_listed(skipped)}" if skipped else ""
        raise SplitError(f"{source.name}: no usable {source.noun}{bad}")


def check_levels(source: Source, highest: float) -> None:
    """Raise DataFormatError for 8-bit images with no level above 1, as masks have: 1 is 1/255, all but black."""
    if source.dtype == np.uint8 and highest <= 1:
        raise DataFormatError(
            f"{source.name}: no 8-bit level is above 1, and white is 255: masks of 0 and 1 would be black images; "
            "multiply them by 255, or give them as floats"
        )


def split_rows(source: Source, kept: np.ndarray, groups: np.ndarray, config: DataConfig) -> dict[str, np.ndarray]:
    """Indices into ``kept`` by split. Raises SplitError."""
    fractions = {"validation": config.validation, "calibration": config.calibration, "test": config.test}
    try:
        if source.is_test is None:
            return split(groups, fractions, config.split_seed, f"{source.noun}s")
        return split_with_test(groups, source.is_test[kept], fractions, config.split_seed)
    except SplitError as error:
        skipped = source.count - len(kept) if config.limit is None else 0
        beside = f" ({skipped} others cannot be used)" if skipped else ""
        raise SplitError(f"{source.name}: {error}{beside}") from error


def pool_labels(source: Source, kept: np.ndarray) -> np.ndarray | None:
    """Labels of the pool, or None where not every image of it has one."""
    if source.labels is None or (source.labels[kept] < 0).any():
        return None
    return source.labels[kept].astype(np.int64)


def _listed(skipped: list[tuple[str, str]]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in skipped[:NAMED]]
    more = len(skipped) - NAMED
    return "\n".join(lines + ([f"  … and {more} more"] if more > 0 else []))
