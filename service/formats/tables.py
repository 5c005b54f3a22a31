"""Vectors and signals from outside -> float32 [N,C,H,W] in their own units; nothing is scaled, resized or guessed.

    application/json   {"rows": [[…], …]}, or objects {feature: value} where the model's features have names
    application/x-npy  N×D or D; N×C×T or C×T, and N×T or T where C is 1
    text/csv           UTF-8, numbers separated by commas (RFC 4180), a line a row: D of a vector, C·T of a signal,
                       channel after channel. A first line without any number is a header: the features' names, in any
                       order

Errors name the row, from 0, and the feature.
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

JSON, NPY, CSV = "application/json", "application/x-npy", "text/csv"
TABLE_TYPES = (JSON, NPY, CSV)
SHOWN = 3
"""Names that an error lists, of many."""
SPARE_COMMAS = 1000
"""In a line of CSV, beyond twice those of a row: names may hold commas, and a wrong line is better told of whole."""


@dataclass(frozen=True)
class TableReader:
    """Reads rows for one bundle: at most ``max_rows``, and ``max_numbers`` in all of them.

    Raises, from ``read``:
        UnsupportedMediaType: the media type is none of TABLE_TYPES.
        LimitExceeded: too many rows or numbers.
        InvalidInput: anything else; the text names the row, what was found, and what was expected.
    """

    rule: ArrayPreprocessing
    max_rows: int
    max_numbers: int

    def read(self, media_type: str, body: bytes, document: Callable[[], Any]) -> np.ndarray:
        """A body -> float32 [N,C,H,W]. ``document`` parses the body as JSON, once, if it is needed."""
        if media_type not in TABLE_TYPES:
            raise UnsupportedMediaType(
                f"Content-Type {media_type[:80]!r}: this model reads {describe(self.rule)}, as {', '.join(TABLE_TYPES)}"
            )
        if not body:
            raise InvalidInput(f"the body is empty: {describe(self.rule)} expected")
        if media_type == NPY:
            return self._rows(read_npy(body))
        return self._rows(self._csv(body) if media_type == CSV else self._json(document(), may_hold_booleans(body)))

    def _rows(self, array: np.ndarray) -> np.ndarray:
        rows = _as_rows(array, self.rule)
        self._count(len(rows))
        with np.errstate(over="ignore"):  # beyond float32's range is ∞, which is refused
            numbers = rows.astype(np.float32).reshape(len(rows), -1)
        if not np.isfinite(numbers).all():
            row, column = np.argwhere(~np.isfinite(numbers))[0]
            raise InvalidInput(f"row {row}, {self._place(column)}: a finite float32 number expected")
        return numbers.reshape(len(rows), *self.rule.shape)

    def _count(self, rows: int) -> None:
        if rows > self.max_rows:
            raise LimitExceeded(f"{rows} rows: at most {self.max_rows} here (setting max_batch)")
        most = self.max_numbers // math.prod(self.rule.natural)
        if rows > most:
            raise PayloadTooLarge(
                f"{rows} rows of shape {self.rule.natural}: at most {most} here (setting max_numbers_in)"
            )

    def _place(self, column: int) -> str:
        return repr(self.rule.features[column]) if self.rule.features else f"number {column}"

    def _json(self, document: Any, booleans: bool) -> np.ndarray:
        if not isinstance(document, dict) or "rows" not in document:
            raise InvalidInput('a JSON object with "rows" expected')
        rows = document["rows"]
        if not isinstance(rows, list) or not rows:
            raise InvalidInput(f'"rows": a non-empty list expected, {describe(self.rule)}')
        if any(isinstance(row, dict) for row in rows):
            self._count(len(rows))
            rows = [self._object(row, f"row {index}") for index, row in enumerate(rows)]
        try:
            return from_json(rows, booleans=booleans)
        except InvalidInput:  # which row is it?
            shapes = [from_json(row, f"row {index}: ").shape for index, row in enumerate(rows)]
            odd = next((index for index, shape in enumerate(shapes) if shape != self.rule.natural), None)
            if odd is None:
                raise
            raise InvalidInput(f"row {odd} has shape {shapes[odd]}: {self.rule.natural} expected") from None

    def _object(self, row: Any, place: str) -> list[Any]:
        """An object's values in the features' order."""
        features = self.rule.features
        if features is None:
            raise InvalidInput(f"{place}: a list of numbers expected, this model's features have no names")
        if not isinstance(row, dict):
            raise InvalidInput(f"{place} is no object, another row is one: all of them, or none, expected")
        _check_names(list(row), features, place)
        values = [row[name] for name in features]
        for name, value in zip(features, values, strict=True):
            if type(value) not in (int, float):
                raise InvalidInput(f"{place}, {name!r}: a number expected")
        return values

    def _csv(self, body: bytes) -> np.ndarray:
        """Float64 [N, D] or [N, C, T] of a CSV text."""
        try:
            text = body.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InvalidInput("the CSV is no UTF-8 text") from error
        lines = csv.reader(self._lines(text), strict=True, skipinitialspace=True)
        rows: list[list[float]] = []
        order: list[int] | None = None
        try:
            for fields in lines:
                if not rows and order is None and fields and not any(map(reads_as_number, fields)):
                    order = self._header(fields)
                    continue
                if len(rows) == self.max_rows:
                    raise LimitExceeded(f"over {self.max_rows} rows: at most so many here (setting max_batch)")
                rows.append(self._line(fields, order, f"row {len(rows)}"))
        except csv.Error as error:
            raise InvalidInput(f"the CSV is damaged at line {lines.line_num}: {error}") from error
        if not rows:
            raise InvalidInput(f"the CSV holds no rows: {describe(self.rule)} expected")
        return np.array(rows).reshape(len(rows), *self.rule.natural)

    def _lines(self, text: str) -> Iterator[str]:
        """The text's lines, but none with far more commas than a row or header has: each would cost memory."""
        most = 2 * math.prod(self.rule.natural) + SPARE_COMMAS
        for number, line in enumerate(StringIO(text, newline=""), 1):
            if line.count(",") > most:
                raise InvalidInput(f"the CSV's line {number} has over {most} commas: {describe(self.rule)} expected")
            yield line

    def _header(self, fields: list[str]) -> list[int]:
        """Where each feature stands in a line."""
        names, features = [field.strip() for field in fields], self.rule.features
        if features is None:
            raise InvalidInput(
                f"the CSV's first line holds no number: {describe(self.rule)} expected, and no header, since they have "
                "no names here"
            )
        _check_names(names, features, "the CSV's header")
        return [names.index(name) for name in features]

    def _line(self, fields: list[str], order: list[int] | None, place: str) -> list[float]:
        size = math.prod(self.rule.natural)
        if len(fields) != size:
            raise InvalidInput(f"{place} has {len(fields)} values: {size} expected, separated by commas")
        values = []
        for column, source in enumerate(order or range(size)):
            try:
                values.append(_number(fields[source]))
            except ValueError:
                found = fields[source][:40]
                raise InvalidInput(f"{place}, {self._place(column)}: {found!r}, a number expected") from None
        return values


def describe(rule: ArrayPreprocessing) -> str:
    """What a row is, in words."""
    if rule.kind == "signal":
        return "signals of {} channels × {} steps".format(*rule.natural)
    return f"vectors of {rule.natural[0]} numbers" + (f" ({_listed(rule.features)})" if rule.features else "")


def _as_rows(array: np.ndarray, rule: ArrayPreprocessing) -> np.ndarray:
    """Natural shapes -> [N, *natural]."""
    natural, shape = rule.natural, array.shape
    if 0 not in shape:
        if shape[1:] == natural and len(shape) == len(natural) + 1:
            return array
        if shape == natural:
            return array[None]
        if rule.kind == "signal" and natural[0] == 1 and shape[-1:] == natural[1:] and len(shape) <= 2:
            return array.reshape(-1, *natural)
    expected = ", ".join(map(str, natural))
    raise InvalidInput(f"rows have shape {shape}: (N, {expected}) expected, {describe(rule)}")


def _check_names(names: Sequence[str], features: Sequence[str], place: str) -> None:
    """Refuse names that are not exactly the features', in any order."""
    known, given = set(features), set(names)
    for reason, wrong in (
        ("unknown", [name for name in names if name not in known]),
        ("missing", [name for name in features if name not in given]),
    ):
        if wrong:
            raise InvalidInput(f"{place}: {reason} {_listed(wrong)}; the features are {_listed(features)}")
    if len(given) != len(names):
        twice = [name for name, count in Counter(names).items() if count > 1]
        raise InvalidInput(f"{place} holds {_listed(twice)} more than once")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"


def _number(text: str) -> float:
    """A decimal number; Python's own digit groups (1_000) are none outside of it. Raises ValueError."""
    if "_" in text:
        raise ValueError
    return float(text)
