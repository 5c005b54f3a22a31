"""``vaeserve score``: the service's scoring over files and folders, without HTTP."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from service.bundle.input_rules import ArrayPreprocessing, InputRule, Preprocessing
from service.errors import ConfigurationError, InvalidInput
from service.formats.folders import is_image, printable, walk
from service.formats.images import ImageLimits, decode_image, decode_whole_image
from service.formats.tables import CSV, NPY, TableReader
from service.pixels import unit_levels
from service.repository.judging import InputRows, Verdicts, judge
from service.repository.model_repository import Served
from service.repository.presenting import describe_map, draw_maps, result_rows
from service.repository.score_parameters import ScoreParameters

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
"""Columns of a model of tiles -> fields of service.inference.model.TileSummary."""

FURTHER = ("score", "p_value")
"""Fields of each further score, written as columns NAME_score and NAME_p_value."""

Row = dict[str, Any]
Pictures = Mapping[Path, Path]
"""File of an image -> the file that the picture of its map is written to."""


@dataclass(frozen=True)
class BadFile:
    """A file that could not be scored, and the reason in words."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


def find_files(paths: Iterable[Path], rule: InputRule) -> list[Path]:
    """List the files among ``paths``, and those below its folders that a model of ``rule`` reads, sorted by folder.

    A model of images reads PNG, JPEG and WebP files, another one CSV and npy files. Hidden files are left out and links
    followed, as in training (service.formats.folders).

    Raises:
        InvalidInput: a path does not exist, or nothing is found.
    """
    is_read = is_image if rule.kind == "image" else _is_table
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(filter(is_read, walk(path)))
        elif path.exists():
            files.append(path)
        else:
            raise InvalidInput(f"{printable(path)} does not exist")
    if not files:
        kinds = "PNG, JPEG or WebP" if rule.kind == "image" else "CSV or npy"
        raise InvalidInput(f"no {kinds} file found there; hidden files and folders are left out")
    return files


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLE_SUFFIXES and path.is_file()


def read_images(
    files: Sequence[Path], rule: Preprocessing, limits: ImageLimits
) -> tuple[np.ndarray, list[Path], list[BadFile]]:
    """Read the files that are images: their pixels uint8 [n,C,H,W], these files, and the others with the reason."""
    read = [_read_image(path, rule, limits, False) for path in files]
    bad = [image for image in read if isinstance(image, BadFile)]
    good = [(path, image) for path, image in zip(files, read, strict=True) if not isinstance(image, BadFile)]
    pixels = np.stack([image for _, image in good]) if good else np.empty((0, *rule.shape), np.uint8)
    return pixels, [path for path, _ in good], bad


def read_tables(files: Sequence[Path], rule: ArrayPreprocessing) -> np.ndarray:
    """Read the rows of all files together, float32 [n,C,H,W].

    Raises InvalidInput, which names the file, for one that cannot be read or has a bad row.
    """
    tables = []
    for path in files:
        try:
            tables.append(_read_table(path, rule))
        except (InvalidInput, OSError) as error:
            raise InvalidInput(f"{printable(path)}: {error}") from error
    return np.concatenate(tables)


def group_of(path: Path, roots: Sequence[Path]) -> str | None:
    """Name the subfolder of one of ``roots`` that the file lies in, or None where it lies in no subfolder."""
    for root in roots:
        if path.is_relative_to(root):
            parts = path.relative_to(root).parts
            return printable(parts[0]) if len(parts) > 1 else None
    return None


def plan_pictures(files: Sequence[Path], roots: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Choose the picture of each file's map: ``folder``/NAME with its root's subfolders, x.jpg.png for x.jpg.

    Raises ConfigurationError where two files would share a picture, or a picture take the place of a file.
    """
    pictures: dict[Path, Path] = {}
    taken = {file.resolve(): file for file in files}
    sources = taken.copy()
    for file in dict.fromkeys(files):
        root = next((root for root in roots if root != file and file.is_relative_to(root)), file.parent)
        name = file.relative_to(root)
        picture = folder / (name.with_suffix(".png") if name.suffix.lower() == ".png" else f"{name}.png")
        if picture.resolve() in sources:
            raise ConfigurationError(
                f"--maps {folder}: the map of {printable(file)} would take the place of {printable(picture)}"
            )
        earlier = taken.get(picture.resolve())
        if earlier is not None:
            names = map(printable, (earlier, file, picture))
            raise ConfigurationError("--maps {}: the maps of {} and {} would both be {}".format(folder, *names))
        pictures[file] = picture
        taken[picture.resolve()] = file
    return pictures


def fields_of(rule: InputRule, also: Iterable[str] = ()) -> list[str]:
    """List the columns of a model's rows. Only tables have several rows a file, only images are scored by tiles.

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
    parameters: ScoreParameters,
    rate: float,
    limits: ImageLimits,
    pictures: Pictures | None = None,
) -> Iterator[Row | BadFile]:
    """Score files in order: one row (keys ``fields_of``) for each image or line of a table, or one BadFile a file.

    ``rate``: the false-positive rate where the parameters name none. With ``pictures`` of all files, and parameters
    that ask for maps, the pictures of the maps are written, too.

    Raises:
        InvalidInput: the calibration cannot answer the asked false-positive rate.
        UnsupportedVerb: the model does not have the asked estimator.
    """
    rule = served.manifest.preprocessing
    if isinstance(rule, ArrayPreprocessing):
        for path in files:
            yield from _score_table(served, path, rule, parameters, rate)
        return
    if served.tiled is not None:
        for path in files:
            yield _score_whole(served, path, rule, parameters, rate, limits, pictures)
        return
    for start in range(0, len(files), BATCH):
        yield from _score_images(served, files[start : start + BATCH], rule, parameters, rate, limits, pictures)


def _score_images(
    served: Served,
    files: Sequence[Path],
    rule: Preprocessing,
    parameters: ScoreParameters,
    rate: float,
    limits: ImageLimits,
    pictures: Pictures | None,
) -> Iterator[Row | BadFile]:
    read = [_read_image(path, rule, limits, parameters.strict) for path in files]
    good = [image for image in read if not isinstance(image, BadFile)]
    scored: Iterator[Row] = iter(())
    if good:
        x = unit_levels(np.stack(good))
        verdicts = judge(served, x, parameters, rate)
        paths = [path for path, image in zip(files, read, strict=True) if not isinstance(image, BadFile)]
        _write_pictures(served, verdicts, x, paths, parameters, pictures)
        scored = _flat(verdicts)
    for path, image in zip(files, read, strict=True):
        yield image if isinstance(image, BadFile) else {"file": printable(path), **next(scored)}


def _score_whole(
    served: Served,
    path: Path,
    rule: Preprocessing,
    parameters: ScoreParameters,
    rate: float,
    limits: ImageLimits,
    pictures: Pictures | None,
) -> Row | BadFile:
    """Score one image by its tiles, alone, so that no more than one image is in memory."""
    try:
        image = decode_whole_image(path.read_bytes(), rule, limits)
    except (InvalidInput, OSError) as error:
        return BadFile(path, str(error))
    verdicts = judge(served, [image], parameters, rate)
    _write_pictures(served, verdicts, [image], [path], parameters, pictures)
    row = next(_flat(verdicts))
    tiles = row.pop("tiles")
    return {"file": printable(path), **row, **{field: tiles[name] for field, name in TILE_FIELDS.items()}}


def _flat(verdicts: Verdicts) -> Iterator[Row]:
    """Yield the rows of the API with further scores as columns of their own."""
    for row in result_rows(verdicts):
        also = row.pop("also", {})
        yield row | {f"{name}_{field}": further[field] for name, further in also.items() for field in FURTHER}


def _write_pictures(
    served: Served,
    verdicts: Verdicts,
    x: InputRows,
    paths: Sequence[Path],
    parameters: ScoreParameters,
    pictures: Pictures | None,
) -> None:
    """Write a PNG of each image's map, where there are maps and pictures of them are wanted."""
    if pictures is None or verdicts.scores.map is None:
        return
    description = describe_map(served.model, parameters.map_kind)
    for path, image, values in zip(paths, x, verdicts.scores.map, strict=True):
        pictures[path].parent.mkdir(parents=True, exist_ok=True)
        pictures[path].write_bytes(draw_maps([image], [values], description, parameters.map_picture))


def _read_image(path: Path, rule: Preprocessing, limits: ImageLimits, strict: bool) -> np.ndarray | BadFile:
    """Read one image, uint8 [C,H,W], or say why it cannot be read."""
    try:
        return decode_image(path.read_bytes(), rule, limits, strict)
    except (InvalidInput, OSError) as error:
        return BadFile(path, str(error))


def _score_table(
    served: Served, path: Path, rule: ArrayPreprocessing, parameters: ScoreParameters, rate: float
) -> Iterator[Row | BadFile]:
    """Score the file's rows, numbered from 0; one bad row makes a BadFile of it, so that no row goes missing unseen."""
    try:
        x = _read_table(path, rule)
    except (InvalidInput, OSError) as error:
        yield BadFile(path, str(error))
        return
    for start in range(0, len(x), BATCH):
        for row, scored in enumerate(_flat(judge(served, x[start : start + BATCH], parameters, rate)), start):
            yield {"file": printable(path), "row": row, **scored}


def _read_table(path: Path, rule: ArrayPreprocessing) -> np.ndarray:
    """Read the rows of one file, float32 [n,C,H,W]. Raises InvalidInput."""
    media_type = TABLE_SUFFIXES.get(path.suffix.lower())
    if media_type is None:
        raise InvalidInput(f"a {' or '.join(TABLE_SUFFIXES)} file expected")
    return TableReader(rule, sys.maxsize, sys.maxsize).read(media_type, path.read_bytes(), dict)


@contextmanager
def open_sink(out: Path | None, stdout: TextIO, fields: Sequence[str]) -> Iterator[Callable[[Row], object]]:
    """Open a function that writes rows (keys ``fields``) to ``out`` by its suffix; None: as CSV to ``stdout``.

    Rows go to ``out``.part, which replaces ``out`` at the end; a failure leaves the former ``out`` as it was.

    Raises:
        ConfigurationError: a suffix but .csv, .jsonl and .parquet, no such folder, or .parquet without pyarrow.
    """
    if out is None:
        if isinstance(stdout, TextIOWrapper):  # a name that the terminal's encoding lacks must not end the scoring
            stdout.reconfigure(errors="backslashreplace")
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
    """Write Parquet in row groups of BATCH·16 rows, so that memory stays bounded."""
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
    pending: list[Row] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def append(row: Row) -> None:
            pending.append(row)
            if len(pending) == BATCH * 16:
                flush()

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(pending, schema=schema))
            pending.clear()

        yield append
        flush()
