"""Read request bodies into vectors and signals, float32 [N,C,H,W] in their own units; nothing is scaled or resized.

    application/json   {"rows": [[…], …]}, or objects {feature: value} where the model's features have names
    application/x-npy  N×D or D; N×C×T or C×T, and N×T or T where C is 1
    text/csv           UTF-8, numbers separated by commas (RFC 4180), one line for each row: D numbers of a vector, C·T
                       of a signal, channel after channel. A first line without any number is a header with the
                       features' names, in any order

Error texts name the row, counted from 0, and the feature.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

from service.bundle.input_rules import ArrayPreprocessing, reads_as_number
from service.errors import InvalidInput, LimitExceeded, PayloadTooLarge, UnsupportedMediaType
from service.formats.arrays import from_json, may_hold_booleans, read_npy
from service.formats.media_types import CSV, NPY, TABLE_INPUTS

MAX_LISTED_NAMES = 3
"""Names that an error text lists."""
EXTRA_COMMAS = 1000
"""Commas allowed in a line of CSV beyond twice those of a row, since names in a header may hold commas."""


@dataclass(frozen=True)
class TableReader:
    """Reads the rows of request bodies for one bundle of a model of vectors or signals.

    Args:
        rule: shape of a row, and names of its features.
        max_rows: number of rows in one body.
        max_numbers: count of numbers in all rows of one body.

    Raises, from ``read``:
        UnsupportedMediaType: the media type is none of TABLE_INPUTS.
        LimitExceeded: the body holds too many rows or numbers.
        InvalidInput: the body is wrong in another way; the text names the row, what it holds, and what was expected.
    """

    rule: ArrayPreprocessing
    max_rows: int
    max_numbers: int

    def read(self, media_type: str, body: bytes, document: Callable[[], Any]) -> np.ndarray:
        """Read a body into rows, float32 [N,C,H,W]; ``document`` parses it as JSON, if needed, and once."""
        if media_type not in TABLE_INPUTS:
            raise UnsupportedMediaType(
                f"Content-Type {media_type[:80]!r}: this model reads {describe_rows(self.rule)}, "
                f"as {', '.join(TABLE_INPUTS)}"
            )
        if not body:
            raise InvalidInput(f"the body is empty: {describe_rows(self.rule)} expected")
        if media_type == NPY:
            return self._read_array(read_npy(body))
        if media_type == CSV:
            return self._read_array(self._read_csv(body))
        return self._read_array(self._read_json(document(), may_hold_booleans(body)))

    def _read_array(self, array: np.ndarray) -> np.ndarray:
        """Convert rows in a natural shape to float32 [N,C,H,W], all finite."""
        rows = _as_rows(array, self.rule)
        self._check_count(len(rows))
        with np.errstate(over="ignore"):  # numbers beyond float32's range become ∞, which is refused
            numbers = rows.astype(np.float32).reshape(len(rows), -1)
        if not np.isfinite(numbers).all():
            row, column = np.argwhere(~np.isfinite(numbers))[0]
            raise InvalidInput(f"row {row}, {self._column_name(column)}: a finite float32 number expected")
        return numbers.reshape(len(rows), *self.rule.shape)

    def _check_count(self, rows: int) -> None:
        """Raise LimitExceeded for too many rows, or PayloadTooLarge for too many numbers in them."""
        if rows > self.max_rows:
            raise LimitExceeded(f"{rows} rows: at most {self.max_rows} here (setting max_batch)")
        max_rows = self.max_numbers // math.prod(self.rule.natural)
        if rows > max_rows:
            raise PayloadTooLarge(
                f"{rows} rows of shape {self.rule.natural}: at most {max_rows} here (setting max_numbers_in)"
            )

    def _column_name(self, column: int) -> str:
        """Name a column in error texts: by its feature, or by its number from 0."""
        return repr(self.rule.features[column]) if self.rule.features else f"number {column}"

    def _read_json(self, document: Any, booleans: bool) -> np.ndarray:
        """Read a JSON object's rows, as lists or objects, into float64 or int64 [N,…]."""
        if not isinstance(document, dict) or "rows" not in document:
            raise InvalidInput('a JSON object with "rows" expected')
        rows = document["rows"]
        if not isinstance(rows, list) or not rows:
            raise InvalidInput(f'"rows": a non-empty list expected, {describe_rows(self.rule)}')
        if any(isinstance(row, dict) for row in rows):
            self._check_count(len(rows))
            rows = [self._read_object(row, f"row {index}") for index, row in enumerate(rows)]
        try:
            return from_json(rows, booleans=booleans)
        except InvalidInput:  # raised anew, with the row that is wrong
            shapes = [from_json(row, f"row {index}: ").shape for index, row in enumerate(rows)]
            wrong_row = next((index for index, shape in enumerate(shapes) if shape != self.rule.natural), None)
            if wrong_row is None:
                raise
            raise InvalidInput(f"row {wrong_row} has shape {shapes[wrong_row]}: {self.rule.natural} expected") from None

    def _read_object(self, row: Any, row_name: str) -> list[Any]:
        """Return an object's values in the features' order. Raises InvalidInput for other features or no numbers."""
        features = self.rule.features
        if features is None:
            raise InvalidInput(f"{row_name}: a list of numbers expected, this model's features have no names")
        if not isinstance(row, dict):
            raise InvalidInput(f"{row_name} is no object, another row is one: all of them, or none, expected")
        _check_names(list(row), features, row_name)
        values = [row[name] for name in features]
        for name, value in zip(features, values, strict=True):
            if type(value) not in (int, float):
                raise InvalidInput(f"{row_name}, {name!r}: a number expected")
        return values

    def _read_csv(self, body: bytes) -> np.ndarray:
        """Read a CSV text into float64 [N,D] or [N,C,T]."""
        try:
            text = body.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidInput("the CSV is no UTF-8 text") from error
        lines = csv.reader(self._checked_lines(text), strict=True, skipinitialspace=True)
        rows: list[list[float]] = []
        order: list[int] | None = None
        try:
            for fields in lines:
                if not rows and order is None and fields and not any(map(reads_as_number, fields)):
                    order = self._feature_columns(fields)
                    continue
                if len(rows) == self.max_rows:
                    raise LimitExceeded(f"over {self.max_rows} rows: at most so many here (setting max_batch)")
                rows.append(self._read_line(fields, order, f"row {len(rows)}"))
        except csv.Error as error:
            raise InvalidInput(f"the CSV is damaged at line {lines.line_num}: {error}") from error
        if not rows:
            raise InvalidInput(f"the CSV holds no rows: {describe_rows(self.rule)} expected")
        return np.array(rows).reshape(len(rows), *self.rule.natural)

    def _checked_lines(self, text: str) -> Iterator[str]:
        """Yield the lines of a text. Raises InvalidInput for far more commas than a row or a header has.

        The csv module makes an object of every field, so that a line of commas would take many times its memory.
        """
        max_commas = 2 * math.prod(self.rule.natural) + EXTRA_COMMAS
        for number, line in enumerate(StringIO(text, newline=""), 1):
            if line.count(",") > max_commas:
                raise InvalidInput(
                    f"the CSV's line {number} has over {max_commas} commas: {describe_rows(self.rule)} expected"
                )
            yield line

    def _feature_columns(self, fields: list[str]) -> list[int]:
        """Return the column of each feature, by the fields of the header. Raises InvalidInput for other names."""
        names, features = [field.strip() for field in fields], self.rule.features
        if features is None:
            raise InvalidInput(
                f"the CSV's first line holds no number: {describe_rows(self.rule)} expected, and no header, since they "
                "have no names here"
            )
        _check_names(names, features, "the CSV's header")
        return [names.index(name) for name in features]

    def _read_line(self, fields: list[str], order: list[int] | None, row_name: str) -> list[float]:
        """Read the fields of a line into numbers, in the order of columns that a header gives."""
        size = math.prod(self.rule.natural)
        if len(fields) != size:
            raise InvalidInput(f"{row_name} has {len(fields)} values: {size} expected, separated by commas")
        values = []
        for column, source in enumerate(order or range(size)):
            try:
                values.append(_number(fields[source]))
            except ValueError:
                text = fields[source][:40]
                raise InvalidInput(f"{row_name}, {self._column_name(column)}: {text!r}, a number expected") from None
        return values


def describe_rows(rule: ArrayPreprocessing) -> str:
    """Say in error texts what the rows of a model are: vectors or signals, of which size, with which features."""
    if rule.kind == "signal":
        return "signals of {} channels × {} steps".format(*rule.natural)
    return f"vectors of {rule.natural[0]} numbers" + (f" ({_list_names(rule.features)})" if rule.features else "")


def _as_rows(array: np.ndarray, rule: ArrayPreprocessing) -> np.ndarray:
    """Bring rows to shape [N,*natural] from that shape, from one row, or from a signal without its one channel."""
    natural, shape = rule.natural, array.shape
    if 0 not in shape:
        if shape[1:] == natural and len(shape) == len(natural) + 1:
            return array
        if shape == natural:
            return array[None]
        if rule.kind == "signal" and natural[0] == 1 and shape[-1:] == natural[1:] and len(shape) <= 2:
            return array.reshape(-1, *natural)
    expected = ", ".join(map(str, natural))
    raise InvalidInput(f"rows have shape {shape}: (N, {expected}) expected, {describe_rows(rule)}")


def _check_names(names: Sequence[str], features: Sequence[str], source: str) -> None:
    """Raise InvalidInput unless ``names`` are the features', in any order; ``source`` says where they stand."""
    feature_set, name_set = set(features), set(names)
    for reason, wrong in (
        ("unknown", [name for name in names if name not in feature_set]),
        ("missing", [name for name in features if name not in name_set]),
    ):
        if wrong:
            raise InvalidInput(f"{source}: {reason} {_list_names(wrong)}; the features are {_list_names(features)}")
    if len(name_set) != len(names):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        raise InvalidInput(f"{source} holds {_list_names(repeated)} more than once")


def _list_names(names: Sequence[str]) -> str:
    """Quote the first names, and count the others."""
    listed = ", ".join(repr(name[:40]) for name in names[:MAX_LISTED_NAMES])
    return listed if len(names) <= MAX_LISTED_NAMES else f"{listed} and {len(names) - MAX_LISTED_NAMES} more"


def _number(text: str) -> float:
    """Read a decimal number. Raises ValueError for other text, and for Python's digit groups (1_000)."""
    if "_" in text:
        raise ValueError
    return float(text)
