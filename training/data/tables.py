"""Tables, .csv and .parquet: which columns are a row's numbers, which one is its label."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.config import DataConfig
from training.data.rows import Kind, Rows, array_preprocessing, refuse_options, rows_source
from training.data.source import Source
from training.errors import DataFormatError

ADVICE = "a column of text is left out with data.drop, or named with data.label"


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
