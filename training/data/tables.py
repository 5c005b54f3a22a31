"""Tables, .csv and .parquet: which columns are a row's numbers, which one is its label.

CSV is UTF-8, values separated by commas and quoted where need be (RFC 4180), with a header or without: a first line in
which no value reads as a number is the header, here as in the service (service.formats.tables). Parquet has columns of
integers, floats or decimals, and one of labels.
"""

from __future__ import annotations

import csv
import difflib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service.bundle.input_rules import reads_as_number
from training.config import DataConfig
from training.data.arrays import Kind, Rows, array_preprocessing, refuse_options, rows_source
from training.data.source import Source
from training.errors import DataFormatError, DataNotFound

ADVICE = "a column of text is left out with data.drop, or named with data.label"

Record = tuple[int, list[str]]
"""The line where it begins, from 1, and its values."""


@dataclass(frozen=True)
class Table:
    """What a file holds: ``numbers`` float64 [N,D] of the chosen columns, NaN in rows that ``unusable`` speaks of.

    ``names`` of the D columns are None without a header; ``labels`` are texts, None where a row has none; ``lines``
    int64 [N] is where each row begins in a text file.
    """

    names: list[str] | None
    numbers: np.ndarray
    unusable: dict[int, str]
    labels: list[str | None] | None = None
    lines: np.ndarray | None = None


class Columns(NamedTuple):
    """Positions of a table's chosen columns, in the file's order, and of its labels."""

    kept: list[int]
    label: int | None


Reader = Callable[[Path, DataConfig], Table]


def open_table(path: Path, config: DataConfig, read: Reader) -> Source:
    """The table that ``read`` finds at ``path``: one row a vector, or with data.kind = "signal" one channel's signal.

    Raises DataNotFound, DataFormatError.
    """
    refuse_options(config, ("images", "labels"), path, "it names an array of an .npz file; a table has data.label")
    if config.kind == "image":
        raise DataFormatError(f"{path}: data.kind = 'image': a table holds vectors or signals")
    kind: Kind = "signal" if config.kind == "signal" else "vector"
    table = read(path, config)
    count, width = table.numbers.shape
    natural, features = ((width,), table.names) if kind == "vector" else ((1, width), None)
    preprocessing = array_preprocessing(kind, natural, features, path)
    rows = Rows(table.numbers, preprocessing, path.name, table.unusable, table.lines)
    if len(table.unusable) == count:
        reason = f" ({rows.name(0)}: {table.unusable[0]}); {ADVICE}" if count else ""
        raise DataFormatError(f"{path}: {count} rows, and none of numbers alone{reason}")
    labels, label_names = (None, None) if table.labels is None else number_labels(table.labels)
    return rows_source(rows, path, config, labels, label_names)


def choose(names: Sequence[str], config: DataConfig, path: Path) -> Columns:
    """The columns that data.keep, data.drop and data.label choose among ``names`` (numbers from 0 without a header).

    Raises DataFormatError: a name stands twice, an option names no column, or none is left.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataFormatError(f"{path}: {twice!r} is the name of more than one column")
    asked = {"keep": config.keep or [], "drop": config.drop, "label": [] if config.label is None else [config.label]}
    for option, wanted in asked.items():
        for name in wanted:
            if name not in names:
                raise DataFormatError(f"{path}: data.{option} names {name!r}, which is no column{_hint(name, names)}")
    left_out = {*asked["drop"], *asked["label"]}
    kept = [i for i, name in enumerate(names) if name not in left_out and (config.keep is None or name in config.keep)]
    if not kept:
        raise DataFormatError(f"{path}: data.keep, data.drop and data.label leave none of {len(names)} columns")
    return Columns(kept, None if config.label is None else list(names).index(config.label))


def number_labels(texts: Sequence[str | None]) -> tuple[np.ndarray, list[str] | None]:
    """Labels as int64 [N] (-1: none): whole numbers as they are, else positions among the sorted texts, with these."""
    present = sorted({text for text in texts if text is not None})
    if all(len(text) < 19 and text.isdecimal() and text == str(int(text)) for text in present):
        return np.array([-1 if text is None else int(text) for text in texts], dtype=np.int64), None
    numbers: dict[str | None, int] = {text: number for number, text in enumerate(present)}
    return np.array([numbers.get(text, -1) for text in texts], dtype=np.int64), present


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return (
        f"; did you mean {near[0]!r}?" if near else f" of {', '.join(map(repr, names[:10]))}{', …' * (len(names) > 10)}"
    )


class _UnusableError(Exception):
    """Why a line is no row of numbers."""


def read_csv(path: Path, config: DataConfig) -> Table:
    """The table in a CSV file; empty lines are passed over. Raises DataNotFound, DataFormatError."""
    with _records(path) as records:
        first = next(records, None)
        if first is None:
            raise DataFormatError(f"{path}: the file is empty; a table was expected, values separated by commas")
        headed = not any(map(reads_as_number, first[1]))
        names = [name.strip() for name in first[1]] if headed else [str(i) for i in range(len(first[1]))]
        columns = choose(names, config, path)
        _check_first(first[1], names if headed else None, columns, path)
        return _table(records if headed else chain([first], records), names, headed, columns)


@contextmanager
def _records(path: Path) -> Iterator[Iterator[Record]]:
    """The file's records. What goes wrong while they are read becomes a DataFormatError that names the line."""
    line = 1

    def numbered(reader: Iterator[list[str]]) -> Iterator[Record]:
        nonlocal line
        for fields in reader:
            begins, line = line, lines.line_num + 1
            if fields:
                yield begins, fields

    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            yield numbered(lines)
    except csv.Error as error:
        raise DataFormatError(f"{path}: damaged in the row that begins at line {line} ({error})") from error
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{path}: not UTF-8 text, after line {line - 1}") from error
    except OSError as error:
        raise DataNotFound(f"{path}: cannot be read ({error.strerror})") from error


def _check_first(fields: Sequence[str], names: Sequence[str] | None, columns: Columns, path: Path) -> None:
    """Refuse a first line that leaves in doubt whether it is a header."""
    foreign = next((mark for mark in ";\t|" if len(fields) == 1 and mark in fields[0]), None)
    if foreign:
        raise DataFormatError(f"{path}: values separated by {foreign!r}; commas were expected")
    if names is not None:
        nameless = next((i for i in columns.kept if not names[i]), None)
        if nameless is not None:
            raise DataFormatError(
                f"{path}: column {nameless} (from 0) has no name in the header; name it, or give data.drop = ['']"
            )
        return
    counted = fields if fields[0] else fields[1:]
    if len(counted) > 1 and list(counted) == [str(i) for i in range(len(counted))]:
        raise DataFormatError(f"{path}: line 1 counts 0, 1, 2, …: a header holds names, or is left out")
    text = next((fields[i] for i in columns.kept if fields[i].strip() and not reads_as_number(fields[i])), None)
    if text is not None:
        raise DataFormatError(
            f"{path}: line 1 holds numbers and {text[:40]!r}: neither a header (names alone) nor a row (numbers alone)"
        )


def _table(records: Iterator[Record], names: list[str], headed: bool, columns: Columns) -> Table:
    numbers, lines, labels = array("d"), array("q"), []
    unusable: dict[int, str] = {}
    for line, fields in records:
        try:
            numbers.extend(_row(fields, names, columns.kept))
        except _UnusableError as error:
            unusable[len(lines)] = str(error)
            numbers.extend([np.nan] * len(columns.kept))
        lines.append(line)
        if columns.label is not None:
            labels.append((fields[columns.label].strip() or None) if columns.label < len(fields) else None)
    return Table(
        names=[names[i] for i in columns.kept] if headed else None,
        numbers=np.frombuffer(numbers, dtype=np.float64).reshape(-1, len(columns.kept)),
        unusable=unusable,
        labels=None if columns.label is None else labels,
        lines=np.frombuffer(lines, dtype=np.int64),
    )


def _row(fields: list[str], names: list[str], kept: list[int]) -> list[float]:
    if len(fields) != len(names):
        raise _UnusableError(f"{len(fields)} values; {len(names)} were expected")
    try:
        return [_number(fields[i]) for i in kept]
    except ValueError:
        raise _UnusableError(next(filter(None, (_fault(names[i], fields[i]) for i in kept)))) from None


def _number(text: str) -> float:
    """A decimal number; Python's digit groups (1_000) are none. Raises ValueError."""
    if "_" in text:
        raise ValueError
    return float(text)


def _fault(name: str, text: str) -> str | None:
    if not text.strip():
        return f"{name!r} is missing"
    try:
        _number(text)
    except ValueError:
        return f"{name!r} is {text[:40]!r}; a number was expected"
    return None


def read_parquet(path: Path, config: DataConfig) -> Table:
    """The table in a Parquet file, read whole, but for the columns that are left out.

    Raises DataNotFound, or DataFormatError: not that format, or a chosen column that holds no numbers, by name.
    """
    import pyarrow as pa  # it takes a while, and only this wants it
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = choose(schema.names, config, path)
            names = [schema.names[i] for i in columns.kept]
            for i in columns.kept:
                _check_type(schema.field(i), path)
            chosen = names + ([] if config.label is None else [config.label])
            table = file.read(columns=chosen)
    except (pa.ArrowException, UnicodeDecodeError, MemoryError) as error:
        raise DataFormatError(f"{path}: not a Parquet file that can be read ({error})") from error
    except OSError as error:
        if error.strerror is None:  # not the system's: pyarrow reports damaged pages so
            raise DataFormatError(f"{path}: not a Parquet file that can be read ({error})") from error
        raise DataNotFound(f"{path}: cannot be read ({error.strerror})") from error
    unusable: dict[int, str] = {}
    numbers = np.empty((table.num_rows, len(names)))
    for position, name in enumerate(names):
        column = table.column(name).cast(pa.float64(), safe=False)
        for row in np.flatnonzero(column.is_null().to_numpy()).tolist():
            unusable.setdefault(row, f"{name!r} is missing")
        numbers[:, position] = column.to_numpy()
    labels = None if config.label is None else _labels(table.column(config.label), config.label, path)
    return Table(names, numbers, unusable, labels)


def _check_type(column: Any, path: Path) -> None:
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise DataFormatError(f"{path}: column {column.name!r} is {kind}; numbers were expected: {ADVICE}")


def _labels(column: Any, name: str, path: Path) -> list[str | None]:
    import pyarrow as pa

    if pa.types.is_nested(column.type):
        raise DataFormatError(f"{path}: data.label names {name!r}, which is nested ({column.type})")
    texts = ("" if value is None else str(value).strip() for value in column.to_pylist())
    return [text or None for text in texts]


TABLES: dict[str, Reader] = {".csv": read_csv, ".parquet": read_parquet}
"""From a file's suffix to what reads it."""
