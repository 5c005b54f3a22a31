"""Arrays in .npy and .npz files: images (uint8, or floats in [0, 1]), vectors, signals; large .npy stay on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from service.bundle.files import NPZ_ERRORS as UNREADABLE_NPZ
from service.bundle.input_rules import Preprocessing
from service.errors import VaeserveError
from service.formats.images import apply, resize_array
from training.config import DataConfig
from training.data.download import sha256_file
from training.data.rows import Kind, array_rows, rows_source
from training.data.source import Source, slug
from training.errors import DataFormatError, DataNotFound

CHANNELS = (1, 3)
ROW_KEYS = ("images", "vectors", "signals", "x", "data", "arr_0")  # the first is taken where an .npz holds several
LABEL_KEYS = ("labels", "y", "targets")
UNREADABLE = (ValueError, EOFError, SyntaxError, OverflowError, MemoryError)  # what NumPy raises on odd bytes
OTHER_KINDS = "data.kind says if these are vectors or signals"
MAX_SIDE = 4096  # as service.bundle.input_rules.Preprocessing has it


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
        raise DataFormatError(
            f"{path}: pixels are {array.dtype}; uint8, or floats in [0, 1], were expected; {OTHER_KINDS}"
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
