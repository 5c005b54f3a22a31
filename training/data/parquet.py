"""Parquet: columns of integers, floats or decimals, and one of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from training.config import DataConfig
from training.data.tables import ADVICE, Table, choose
from training.errors import DataFormatError, DataNotFound


def read_parquet(path: Path, config: DataConfig) -> Table:
    """The table in a Parquet file, read whole, but for the columns that are left out.

    Raises DataNotFound, or DataFormatError: not that format, or a chosen column that holds no numbers, by name.
    """
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
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise DataFormatError(f"{path}: column {column.name!r} is {kind}; numbers were expected: {ADVICE}")


def _labels(column: Any, name: str, path: Path) -> list[str | None]:
    if pa.types.is_nested(column.type):
        raise DataFormatError(f"{path}: data.label names {name!r}, which is nested ({column.type})")
    texts = ("" if value is None else str(value).strip() for value in column.to_pylist())
    return [text or None for text in texts]
