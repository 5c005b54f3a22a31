"""``vaeserve score``: the service's scoring over files and folders, without HTTP."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from service.bundle.input_rules import ArrayPreprocessing, InputRule, Preprocessing
from service.errors import ConfigurationError, InvalidInput
from service.formats.images import ImageLimits, decode_image, decode_whole
from service.formats.tables import CSV, NPY, TableReader
from service.pixels import unit_levels
from service.repository.judging import InputRows, Verdicts, judge
from service.repository.model_repository import Served
from service.repository.presenting import describe_map, draw_maps, result_rows
from service.repository.score_parameters import ScoreParameters

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
TABLE_SUFFIXES = {".csv": CSV, ".npy": NPY}
BATCH = 64
FIELDS = [
    "file",
    "row",
    "score",
    "elbo",
    "log_likelihood",
    "k",
    "rate",
    "distortion",
    "bits_per_dim",
    "standard_error",
    "p_value",
    "q_value",
    "is_anomaly",
]
TILE_FIELDS = {"tiles": "n", "worst_y": "worst_y", "worst_x": "worst_x"}
"""Columns of a model of tiles: what service.inference.tiled.TileSummary calls them."""

FURTHER = ("score", "p_value")
"""Of each further score, as columns NAME_score and NAME_p_value."""

Row = dict[str, Any]
Pictures = Mapping[Path, Path]
"""Image -> where the picture of its map is written."""


@dataclass(frozen=True)
class BadFile:
    """A file that could not be scored."""

    path: Path
    reason: str


def find_files(paths: Iterable[Path], rule: InputRule) -> list[Path]:
    """The files among ``paths``, and those under its folders that a model of ``rule`` reads, sorted within each folder.

    These are PNG, JPEG and WebP files of a model of images, CSV and npy files of another.

    Raises:
        InvalidInput: a path does not exist, or nothing is found.
    """
    suffixes = IMAGE_SUFFIXES if rule.kind == "image" else TABLE_SUFFIXES.keys()
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
        elif path.exists():
            found.append(path)
        else:
            raise InvalidInput(f"{path} does not exist")
    if not found:
        raise InvalidInput(f"no {'PNG, JPEG or WebP' if rule.kind == 'image' else 'CSV or npy'} file found there")
    return found


def read_images(
    files: Sequence[Path], rule: Preprocessing, limits: ImageLimits
) -> tuple[np.ndarray, list[Path], list[BadFile]]:
    """Pixels uint8 [n,C,H,W] of the files that are images, which files these are, and the others."""
    read = [_read_image(path, rule, limits, False) for path in files]
    bad = [image for image in read if isinstance(image, BadFile)]
    good = [(path, image) for path, image in zip(files, read, strict=True) if not isinstance(image, BadFile)]
    pixels = np.stack([image for _, image in good]) if good else np.empty((0, *rule.shape), np.uint8)
    return pixels, [path for path, _ in good], bad


def read_tables(files: Sequence[Path], rule: ArrayPreprocessing) -> np.ndarray:
    """Rows float32 [n,C,H,W] of all files together. Raises InvalidInput for a file with a bad row."""
    return np.concatenate([_read_table(path, rule) for path in files])


def group_of(path: Path, roots: Sequence[Path]) -> str | None:
    """The subfolder of one of ``roots`` that the file lies in, None where it lies in no subfolder."""
    for root in roots:
        if path.is_relative_to(root):
            parts = path.relative_to(root).parts
            return parts[0] if len(parts) > 1 else None
    return None


def plan_pictures(files: Sequence[Path], roots: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Where each file's map goes: ``folder``/NAME with its root's subfolders, x.png for x.png, x.jpg.png for x.jpg.

    Raises ConfigurationError where two files would share a picture, or a picture take the place of a file.
    """
    found: dict[Path, Path] = {}
    known = {file.resolve(): file for file in files}
    sources = known.copy()
    for file in dict.fromkeys(files):
        root = next((root for root in roots if root != file and file.is_relative_to(root)), file.parent)
        name = file.relative_to(root)
        picture = folder / (name.with_suffix(".png") if name.suffix.lower() == ".png" else f"{name}.png")
        if picture.resolve() in sources:
            raise ConfigurationError(f"--maps {folder}: the map of {file} would take the place of {picture}")
        other = known.get(picture.resolve())
        if other is not None:
            raise ConfigurationError(f"--maps {folder}: the maps of {other} and {file} would both be {picture}")
        found[file] = picture
        known[picture.resolve()] = file
    return found


def fields_of(rule: InputRule, also: Iterable[str] = ()) -> list[str]:
    """The columns of a model's rows: only tables have several rows a file, only images are scored by tiles.

    ``also``: names of further scores.
    """
    fields = [field for field in FIELDS if field != "row" or rule.kind != "image"]
    further = [f"{name}_{field}" for name in also for field in FURTHER]
    return fields + (list(TILE_FIELDS) if _is_tiled(rule) else []) + further


def _is_tiled(rule: InputRule) -> bool:
    return isinstance(rule, Preprocessing) and rule.tiling is not None


def score_files(
    served: Served,
    files: Sequence[Path],
    asked: ScoreParameters,
    rate: float,
    limits: ImageLimits,
    pictures: Pictures | None = None,
) -> Iterator[Row | BadFile]:
    """One row (keys ``fields_of``) for each image or line of a table, or one BadFile for a file, in order.

    With ``pictures`` of all files the maps of images, which ``asked`` then asks for, are written beside.

    Raises:
        InvalidInput: the calibration cannot answer the asked false-positive rate.
        UnsupportedVerb: the model does not have the asked estimator.
    """
    rule = served.manifest.preprocessing
    if isinstance(rule, ArrayPreprocessing):
        for path in files:
            yield from _score_table(served, path, rule, asked, rate)
        return
    if served.tiled is not None:
        for path in files:
            yield _score_whole(served, path, rule, asked, rate, limits, pictures)
        return
    for start in range(0, len(files), BATCH):
        yield from _score_images(served, files[start : start + BATCH], rule, asked, rate, limits, pictures)


def _score_images(
    served: Served,
    files: Sequence[Path],
    rule: Preprocessing,
    asked: ScoreParameters,
    rate: float,
    limits: ImageLimits,
    pictures: Pictures | None,
) -> Iterator[Row | BadFile]:
    read = [_read_image(path, rule, limits, asked.strict) for path in files]
    good = [image for image in read if not isinstance(image, BadFile)]
    scored: Iterator[Row] = iter(())
    if good:
        x = unit_levels(np.stack(good))
        verdicts = judge(served, x, asked, rate)
        paths = [path for path, image in zip(files, read, strict=True) if not isinstance(image, BadFile)]
        _write_pictures(served, verdicts, x, paths, asked, pictures)
        scored = _flat(verdicts)
    for path, image in zip(files, read, strict=True):
        yield image if isinstance(image, BadFile) else {"file": str(path), **next(scored)}


def _score_whole(
    served: Served,
    path: Path,
    rule: Preprocessing,
    asked: ScoreParameters,
    rate: float,
    limits: ImageLimits,
    pictures: Pictures | None,
) -> Row | BadFile:
    """One image by its tiles: alone, so that one at a time is in memory."""
    try:
        image = decode_whole(path.read_bytes(), rule, limits)
    except (InvalidInput, OSError) as error:
        return BadFile(path, str(error))
    verdicts = judge(served, [image], asked, rate)
    _write_pictures(served, verdicts, [image], [path], asked, pictures)
    row = next(_flat(verdicts))
    tiles = row.pop("tiles")
    return {"file": str(path), **row, **{field: tiles[name] for field, name in TILE_FIELDS.items()}}


def _flat(verdicts: Verdicts) -> Iterator[Row]:
    """The API's rows, further scores as columns of their own."""
    for row in result_rows(verdicts):
        also = row.pop("also", {})
        yield row | {f"{name}_{field}": each[field] for name, each in also.items() for field in FURTHER}


def _write_pictures(
    served: Served,
    verdicts: Verdicts,
    x: InputRows,
    paths: Sequence[Path],
    asked: ScoreParameters,
    pictures: Pictures | None,
) -> None:
    """A PNG of each image's map."""
    if pictures is None or verdicts.scores.map is None:
        return
    used = describe_map(served.model, asked.map_kind)
    for path, image, each in zip(paths, x, verdicts.scores.map, strict=True):
        pictures[path].parent.mkdir(parents=True, exist_ok=True)
        pictures[path].write_bytes(draw_maps([image], [each], used, asked.map_picture))


def _read_image(path: Path, rule: Preprocessing, limits: ImageLimits, strict: bool) -> np.ndarray | BadFile:
    try:
        return decode_image(path.read_bytes(), rule, limits, strict)
    except (InvalidInput, OSError) as error:
        return BadFile(path, str(error))


def _score_table(
    served: Served, path: Path, rule: ArrayPreprocessing, asked: ScoreParameters, rate: float
) -> Iterator[Row | BadFile]:
    """The file's rows, numbered from 0; a bad row makes the whole file a bad one, so that none goes missing unseen."""
    try:
        x = _read_table(path, rule)
    except (InvalidInput, OSError) as error:
        yield BadFile(path, str(error))
        return
    for start in range(0, len(x), BATCH):
        for row, scored in enumerate(_flat(judge(served, x[start : start + BATCH], asked, rate)), start):
            yield {"file": str(path), "row": row, **scored}


def _read_table(path: Path, rule: ArrayPreprocessing) -> np.ndarray:
    media_type = TABLE_SUFFIXES.get(path.suffix.lower())
    if media_type is None:
        raise InvalidInput(f"a {' or '.join(TABLE_SUFFIXES)} file expected")
    return TableReader(rule, sys.maxsize, sys.maxsize).read(media_type, path.read_bytes(), dict)


@contextmanager
def open_sink(out: Path | None, stdout: TextIO, fields: Sequence[str]) -> Iterator[Callable[[Row], object]]:
    """A function that takes rows (keys ``fields``) and writes them to ``out``, by its suffix; None: CSV on ``stdout``.

    Rows go to ``out``.part, which takes the place of ``out`` at the end; a failure leaves what stood there.

    Raises:
        ConfigurationError: a suffix but .csv, .jsonl and .parquet, no such folder, or .parquet without pyarrow.
    """
    if out is None:
        yield _csv_writer(stdout, fields)
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
        with sinks.get(out.suffix, _parquet_sink)(part, fields) as sink:
            yield sink
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _text_sink(
    writer: Callable[[TextIO, Sequence[str]], Callable[[Row], object]], path: Path, fields: Sequence[str]
) -> Iterator[Callable[[Row], object]]:
    with path.open("w", encoding="utf-8", newline="") as stream:
        yield writer(stream, fields)


def _csv_writer(stream: TextIO, fields: Sequence[str]) -> Callable[[Row], object]:
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    return writer.writerow


def _json_writer(stream: TextIO, _fields: Sequence[str]) -> Callable[[Row], object]:
    return lambda row: stream.write(json.dumps(row, allow_nan=False) + "\n")


@contextmanager
def _parquet_sink(path: Path, fields: Sequence[str]) -> Iterator[Callable[[Row], object]]:
    """Row groups of BATCH·16 rows, so that memory stays bounded."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigurationError("a .parquet file needs pyarrow: pip install 'vaeserve[parquet]'") from error
    types = {
        "file": pyarrow.string(),
        "row": pyarrow.int64(),
        "k": pyarrow.int64(),
        **{field: pyarrow.int64() for field in TILE_FIELDS},
        "is_anomaly": pyarrow.bool_(),
    }
    schema = pyarrow.schema([(field, types.get(field, pyarrow.float64())) for field in fields])
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
