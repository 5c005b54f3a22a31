"""CSV: UTF-8, values separated by commas and quoted where need be (RFC 4180), with a header or without.

A first line in which no value reads as a number is the header, here as in the service (service.formats.tables).
"""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from service.bundle.input_rules import reads_as_number
from training.config import DataConfig
from training.data.tables import Columns, Table, choose
from training.errors import DataFormatError, DataNotFound

Record = tuple[int, list[str]]
"""The line where it begins, from 1, and its values."""


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
