"""Arrays in .npy and .npz files: images (uint8, or floats in [0, 1]), vectors, signals; large .npy stay on disk.

Vectors and signals are rows of finite numbers in their own units, never scaled nor resized here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import ValidationError

from service.bundle.files import NPZ_ERRORS as UNREADABLE_NPZ
from service.bundle.input_rules import ArrayPreprocessing, Preprocessing
from service.errors import VaeserveError
from service.formats.images import apply, resize_array
from training.config import DataConfig
from training.data.download import sha256_file
from training.data.source import Source, slug
from training.errors import DataFormatError, DataNotFound

CHANNELS = (1, 3)
ROW_KEYS = ("images", "vectors", "signals", "x", "data", "arr_0")  # the first is taken where an .npz holds several
LABEL_KEYS = ("labels", "y", "targets")
UNREADABLE = (ValueError, EOFError, SyntaxError, OverflowError, MemoryError)  # what NumPy raises on odd bytes
OTHER_KINDS = "data.kind says if these are vectors or signals"
MAX_SIDE = 4096  # as service.bundle.input_rules.Preprocessing has it
Kind = Literal["vector", "signal"]
LAYOUTS = {"vector": "N×D", "signal": "N×C×T or N×T"}
IMAGE_OPTIONS = ("mode", "size", "fit", "resample", "background")


@dataclass(frozen=True)
class ArrayPixels:
    """Rows of ``array`` [N,C,H,W] (uint8 or float, in memory or mapped from a file) under ``preprocessing``."""

    array: np.ndarray
    preprocessing: Preprocessing
    origin: str

    def read(self, index: int) -> np.ndarray:
        """Row ``index`` as uint8 or float32 [C,H,W]. Raises DataFormatError for floats that are not in [0, 1]."""
        row = np.ascontiguousarray(self.array[index])
        if row.dtype != np.uint8:
            row = _checked(row).astype(np.float32)
        if row.shape == self.preprocessing.shape:
            return row
        try:
            if len(row) != self.preprocessing.channels:
                return apply(Image.fromarray(np.moveaxis(row, 0, 2).squeeze()), self.preprocessing)
            return resize_array(row[None], self.preprocessing)[0]
        except VaeserveError as error:
            raise DataFormatError(str(error)) from error

    def name(self, index: int) -> str:
        """For example ``widgets.npy[17]``."""
        return f"{self.origin}[{index}]"


def open_array(path: Path, config: DataConfig) -> Source:
    """A .npy or .npz file: N×H×W, N×C×H×W or N×H×W×C pixels, where C is 1 or 3; or the rows that ``config.kind`` says.

    Of an .npz file ``config.images`` and ``config.labels`` name the arrays; unnamed, the rows are the array called
    images, vectors, signals, x, data or arr_0, or else the only one, and labels the one called labels, y or targets, if
    any. An .npz file is read whole, an .npy file is mapped. No pickles. Raises DataNotFound, DataFormatError.
    """
    raw, labels = _open(path, config)
    kind = _kind(raw, config)
    if kind != "image":
        rows = array_rows(raw, kind, path)
        return rows_source(rows, path, config, None if labels is None else _labels(labels, len(raw), path))
    array = _channels_first(raw, path)
    preprocessing = native_preprocessing(array.shape[1:], config)
    if array.dtype != np.uint8 and preprocessing.channels != array.shape[1]:
        raise DataFormatError(
            f"{path}: only uint8 arrays change their mode; floats of {array.shape[1]} channels stay so"
        )
    return Source(
        name=slug(path.stem),
        pixels=ArrayPixels(array, preprocessing, path.name),
        count=len(array),
        preprocessing=preprocessing,
        dtype=np.dtype(np.uint8 if array.dtype == np.uint8 else np.float32),
        labels=None if labels is None else _labels(labels, len(array), path),
        details={"files": {path.name: sha256_file(path)}},
    )


def array_kind(path: Path, config: DataConfig) -> Kind | Literal["image"]:
    """What the rows of a .npy or .npz file are. Raises DataNotFound, DataFormatError."""
    return _kind(_open(path, config)[0], config)


def _kind(array: np.ndarray, config: DataConfig) -> Kind | Literal["image"]:
    if config.kind != "auto":
        return config.kind
    return "vector" if array.ndim == 2 and array.dtype.kind == "f" else "image"


def _open(path: Path, config: DataConfig) -> tuple[np.ndarray, np.ndarray | None]:
    """The array of rows, and of labels if there is one."""
    return _open_npz(path, config) if path.suffix.lower() == ".npz" else (_open_npy(path, config), None)


def native_preprocessing(shape: tuple[int, ...], config: DataConfig) -> Preprocessing:
    """The rule for arrays of ``shape`` (C, H, W): their own size and mode unless the configuration names others."""
    channels, height, width = shape
    if config.shape is None and not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise DataFormatError(f"images of {height}×{width} pixels: give data.size, at most {MAX_SIDE} a side")
    height, width = config.shape or (height, width)
    if config.mode != "auto":
        return config.preprocessing(config.mode, height, width)
    return config.preprocessing("L" if channels == 1 else "RGB", height, width)


def _open_npy(path: Path, config: DataConfig) -> np.ndarray:
    if config.images or config.labels:
        raise DataFormatError(f"{path}: data.images and data.labels name arrays of an .npz file; this is an .npy file")
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise DataNotFound(f"{path}: cannot be read ({error.strerror or error})") from error
    except UNREADABLE as error:
        raise DataFormatError(f"{path}: not an .npy file of plain numbers ({error})") from error


def _open_npz(path: Path, config: DataConfig) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DataFormatError(f"{path}: is an .npy file; name it so")
            images_key = _images_key(archive.files, config, path)
            labels_key = _labels_key(archive.files, config, path)
            members = [None if key is None else archive[key] for key in (images_key, labels_key)]
    except OSError as error:
        raise DataNotFound(f"{path}: cannot be read ({error.strerror or error})") from error
    except UNREADABLE_NPZ as error:
        raise DataFormatError(f"{path}: not an .npz file of plain numbers ({error})") from error
    images, labels = members
    if not isinstance(images, np.ndarray) or isinstance(labels, bytes):
        raise DataFormatError(f"{path}: {images_key} is no array, as np.savez would have written")
    return images, labels


def _images_key(keys: Sequence[str], config: DataConfig, path: Path) -> str:
    if config.images is not None:
        return _known(config.images, "data.images", keys, path)
    named = next((key for key in ROW_KEYS if key in keys), None)
    if named is not None:
        return named
    others = [key for key in keys if key not in (*LABEL_KEYS, config.labels)]
    if len(others) != 1:
        raise DataFormatError(f"{path}: holds {', '.join(keys) or 'no array'}; say which are the rows with data.images")
    return others[0]


def _labels_key(keys: Sequence[str], config: DataConfig, path: Path) -> str | None:
    if config.labels is not None:
        return _known(config.labels, "data.labels", keys, path)
    return next((key for key in LABEL_KEYS if key in keys), None)


def _known(key: str, field: str, keys: Sequence[str], path: Path) -> str:
    if key not in keys:
        raise DataFormatError(f"{path}: {field} = {key!r} is not among its arrays: {', '.join(keys) or 'none'}")
    return key


def _channels_first(array: np.ndarray, path: Path) -> np.ndarray:
    """A view of ``array`` as N×C×H×W. Raises DataFormatError if dtype or layout leave a doubt."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        masks = "; masks are given as floats" if array.dtype == bool else ""
        raise DataFormatError(
            f"{path}: pixels are {array.dtype}; uint8, or floats in [0, 1], were expected{masks}; {OTHER_KINDS}"
        )
    shape = "×".join(map(str, array.shape))
    if 0 in array.shape:
        raise DataFormatError(f"{path}: the array is empty ({shape})")
    if array.ndim == 3 and array.shape[2] not in CHANNELS:
        return array[:, None]
    if array.ndim == 4:
        first, last = array.shape[1] in CHANNELS, array.shape[3] in CHANNELS
        if first != last:
            return array if first else np.moveaxis(array, 3, 1)
        if first and last:
            raise DataFormatError(f"{path}: {shape} may be N×C×H×W or N×H×W×C; store images wider than 3 pixels")
    raise DataFormatError(f"{path}: {shape} is none of N×H×W, N×C×H×W and N×H×W×C with C = 1 or 3; {OTHER_KINDS}")


def _labels(labels: np.ndarray, count: int, path: Path) -> np.ndarray:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataFormatError(
            f"{path}: labels are {labels.dtype} of shape {labels.shape}; {count} integers, one an image, were expected"
        )
    return labels.astype(np.int64)


def _checked(row: np.ndarray) -> np.ndarray:
    if not np.isfinite(row).all():
        raise DataFormatError("holds NaN or infinity; floats in [0, 1] were expected")
    low, high = row.min(), row.max()
    if low < 0 or high > 1:
        raise DataFormatError(
            f"values from {low:g} to {high:g}; floats in [0, 1], or uint8, were expected; {OTHER_KINDS}"
        )
    return row


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
