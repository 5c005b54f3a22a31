"""Vectors and signals: rows of finite numbers in their own units, never scaled nor resized here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from service.bundle.input_rules import ArrayPreprocessing
from training.config import DataConfig
from training.data.download import sha256_file
from training.data.source import Source, slug
from training.errors import DataFormatError

Kind = Literal["vector", "signal"]
LAYOUTS = {"vector": "N×D", "signal": "N×C×T or N×T"}
IMAGE_OPTIONS = ("mode", "size", "fit", "resample", "background")


@dataclass(frozen=True)
class Rows:
    """Rows of ``numbers`` [N, *natural] (integers or floats, in memory or mapped from a file) under ``preprocessing``.

    ``unusable`` says why a row is none, by its index; ``lines`` int64 [N] is where each begins in a text file.
    """

    numbers: np.ndarray
    preprocessing: ArrayPreprocessing
    origin: str
    unusable: Mapping[int, str] = field(default_factory=dict)
    lines: np.ndarray | None = None

    def read(self, index: int) -> np.ndarray:
        """Row ``index`` as float32 [C,H,W]. Raises DataFormatError with the reason if it is no row of numbers."""
        if index in self.unusable:
            raise DataFormatError(self.unusable[index])
        row = np.asarray(self.numbers[index]).reshape(self.preprocessing.natural)
        with np.errstate(over="ignore"):  # beyond float32's range is ∞, which is refused
            values = row.astype(np.float32)
        finite = np.isfinite(values)
        if not finite.all():
            place = tuple(np.argwhere(~finite)[0].tolist())
            raise DataFormatError(f"{self._place(place)} is {row[place]:g}; a finite float32 number was expected")
        return values.reshape(self.preprocessing.shape)

    def name(self, index: int) -> str:
        """For example ``widgets.npy[17]``, or ``widgets.csv line 19``."""
        return f"{self.origin}[{index}]" if self.lines is None else f"{self.origin} line {self.lines[index]}"

    def _place(self, place: tuple[int, ...]) -> str:
        if self.preprocessing.kind == "signal":
            return "channel {}, step {}".format(*place)
        return repr(self.preprocessing.features[place[0]]) if self.preprocessing.features else f"number {place[0]}"


def array_rows(array: np.ndarray, kind: Kind, path: Path) -> Rows:
    """The rows of an array: N×D numbers of vectors, N×C×T of signals, N×T if they have one channel.

    Raises DataFormatError: another rank, no numbers, nothing there.
    """
    shape = "×".join(map(str, array.shape))
    if array.dtype.kind not in "iuf":
        raise DataFormatError(f"{path}: numbers are {array.dtype}; integers or floats were expected")
    if 0 in array.shape:
        raise DataFormatError(f"{path}: the array is empty ({shape})")
    if array.ndim not in ((2,) if kind == "vector" else (2, 3)):
        raise DataFormatError(f"{path}: {shape} is not {LAYOUTS[kind]}, as {kind}s were expected")
    natural = array.shape[1:] if kind == "vector" or array.ndim == 3 else (1, array.shape[1])
    return Rows(array, array_preprocessing(kind, natural, None, path), path.name)


def array_preprocessing(
    kind: Kind, natural: Sequence[int], features: list[str] | None, path: Path
) -> ArrayPreprocessing:
    """The rule that the bundle will carry. Raises DataFormatError: too large, or names that a bundle cannot hold."""
    try:
        return ArrayPreprocessing(kind=kind, natural=tuple(natural), features=features)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, item['loc']))} {item['msg']}".strip() for item in error.errors())
        raise DataFormatError(f"{path}: no bundle can be of such {kind}s: {reasons}") from error


def rows_source(
    rows: Rows, path: Path, config: DataConfig, labels: np.ndarray | None, label_names: list[str] | None = None
) -> Source:
    """The file at ``path``, read as ``rows``. Raises DataFormatError: options of images are set."""
    refuse_options(config, IMAGE_OPTIONS, path, f"{rows.preprocessing.kind}s are not resized")
    return Source(
        name=slug(path.stem),
        pixels=rows,
        count=len(rows.numbers),
        preprocessing=rows.preprocessing,
        dtype=np.dtype(np.float32),
        labels=labels,
        label_names=label_names,
        details={"files": {path.name: sha256_file(path)}},
    )


def refuse_options(config: DataConfig, names: Sequence[str], path: Path, why: str) -> None:
    """Raise DataFormatError if one of those options is set to anything but its default: it would not be obeyed."""
    for name in names:
        value: Any = getattr(config, name)
        if value != DataConfig.model_fields[name].get_default(call_default_factory=True):
            raise DataFormatError(f"{path}: data.{name} = {value!r} says nothing here: {why}")
