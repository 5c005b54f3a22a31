"""``vaeserve score``: the service's scoring over files and folders, without HTTP."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from service.errors import ConfigurationError, InvalidInput
from service.images import ImageLimits, decode_image, unit_levels
from service.repository import Served
from service.schemas import ScoreParameters
from service.scoring import judge, rows

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
BATCH = 64
FIELDS = [
    "file",
    "score",
    "elbo",
    "log_likelihood",
    "k",
    "rate",
    "distortion",
    "bits_per_dim",
    "standard_error",
    "p_value",
    "is_anomaly",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class BadFile:
    """A file that could not be scored."""

    path: Path
    reason: str


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The files among ``paths`` and the PNG, JPEG and WebP files under its folders, sorted within each folder.

    Raises:
        InvalidInput: a path does not exist.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        elif path.exists():
            found.append(path)
        else:
            raise InvalidInput(f"{path} does not exist")
    return found


def score_files(
    served: Served, files: Sequence[Path], asked: ScoreParameters, rate: float, limits: ImageLimits
) -> Iterator[Row | BadFile]:
    """One row (keys FIELDS) or one BadFile for each file, in order.

    Raises:
        InvalidInput: the calibration cannot answer the asked false-positive rate.
    """
    for start in range(0, len(files), BATCH):
        group = files[start : start + BATCH]
        read = [_read(path, served, limits, asked.strict) for path in group]
        good = [image for image in read if not isinstance(image, BadFile)]
        scored: Iterator[Row] = iter(())
        if good:
            scored = iter(rows(judge(served, unit_levels(np.stack(good)), asked, rate)))
        for path, image in zip(group, read, strict=True):
            yield image if isinstance(image, BadFile) else {"file": str(path), **next(scored)}


def _read(path: Path, served: Served, limits: ImageLimits, strict: bool) -> np.ndarray | BadFile:
    try:
        return decode_image(path.read_bytes(), served.manifest.preprocessing, limits, strict)
    except (InvalidInput, OSError) as error:
        return BadFile(path, str(error))


@contextmanager
def open_sink(out: Path | None, stdout: TextIO) -> Iterator[Callable[[Row], object]]:
    """A function that takes rows and writes them to ``out``, by its suffix; None: CSV on ``stdout``.

    Rows go to ``out``.part, which takes the place of ``out`` at the end; a failure leaves what stood there.

    Raises:
        ConfigurationError: a suffix but .csv, .jsonl and .parquet, no such folder, or .parquet without pyarrow.
    """
    if out is None:
        yield _csv_writer(stdout)
        return
    if out.suffix not in (".csv", ".jsonl", ".parquet"):
        raise ConfigurationError(f"--out {out}: expected a name that ends in .csv, .jsonl or .parquet")
    if not out.parent.is_dir():
        raise ConfigurationError(f"--out {out}: the folder {out.parent} does not exist")
    if out.is_dir():
        raise ConfigurationError(f"--out {out}: that is a folder, expected a file's name")
    part = out.with_name(f"{out.name}.part")
    sinks = {".csv": partial(_text_sink, _csv_writer), ".jsonl": partial(_text_sink, _json_writer)}
    try:
        with sinks.get(out.suffix, _parquet_sink)(part) as sink:
            yield sink
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _text_sink(writer: Callable[[TextIO], Callable[[Row], object]], path: Path) -> Iterator[Callable[[Row], object]]:
    with path.open("w", encoding="utf-8", newline="") as stream:
        yield writer(stream)


def _csv_writer(stream: TextIO) -> Callable[[Row], object]:
    writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
    writer.writeheader()
    return writer.writerow


def _json_writer(stream: TextIO) -> Callable[[Row], object]:
    return lambda row: stream.write(json.dumps(row, allow_nan=False) + "\n")


@contextmanager
def _parquet_sink(path: Path) -> Iterator[Callable[[Row], object]]:
    """Row groups of BATCH·16 images, so that memory stays bounded."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigurationError("a .parquet file needs pyarrow: pip install 'vaeserve[parquet]'") from error
    types = {"file": pyarrow.string(), "k": pyarrow.int64(), "is_anomaly": pyarrow.bool_()}
    schema = pyarrow.schema([(field, types.get(field, pyarrow.float64())) for field in FIELDS])
    held: list[Row] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def take(row: Row) -> None:
            held.append(row)
            if len(held) == BATCH * 16:
                flush()

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(held, schema=schema))
            held.clear()

        yield take
        flush()
