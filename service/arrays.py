"""Arrays from outside: npy bytes and JSON lists -> numpy, checked before anything is allocated or believed."""

from __future__ import annotations

import math
from io import BytesIO
from typing import Any, Literal

import numpy as np

from service.errors import InvalidInput, LimitExceeded

NPY_MAGIC = b"\x93NUMPY"
MAX_HEADER = 4096
"""Bytes of an npy header; an honest one has about 120."""
MAX_DIMENSIONS = 4
# What numpy's header parser raises on hostile headers (it evaluates a literal).
HEADER_ERRORS = (ValueError, SyntaxError, TypeError, KeyError, OverflowError, RecursionError, MemoryError, EOFError)
DType = Literal["uint8", "float32"]


def read_npy(data: bytes) -> np.ndarray:
    """The bytes of an .npy file -> uint8 or float array, C order, this machine's byte order; nothing is copied twice.

    Raises:
        InvalidInput: no npy file, another dtype than uint8 or float16/32/64 (pickles among them), over 4 dimensions,
            or a shape that is not what the body holds.
    """
    stream = BytesIO(data)
    shape, fortran, dtype = _read_header(stream)
    if dtype.kind not in "uf" or (dtype.kind == "u" and dtype.itemsize != 1) or dtype.itemsize > 8:
        raise InvalidInput(f"the npy array has dtype {str(dtype)[:60]}: uint8 or float16, float32, float64 expected")
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidInput(f"the npy array has {len(shape)} dimensions: at most {MAX_DIMENSIONS} expected")
    if any(side < 0 for side in shape):
        raise InvalidInput("the npy array has a negative dimension")
    expected, found = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if expected != found:
        raise InvalidInput(f"the npy header promises {_short(expected)} bytes of data: the body holds {found}")
    flat = np.frombuffer(data, dtype, offset=stream.tell())
    array = flat.reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array, dtype=dtype.newbyteorder("="))


def _read_header(stream: BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream, max_header_size=MAX_HEADER)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream, max_header_size=MAX_HEADER)
    except HEADER_ERRORS as error:
        raise InvalidInput("no npy file: its header cannot be read") from error
    raise InvalidInput(f"the npy file has format version {version[0]}.{version[1]}: 1.0 or 2.0 expected")


def _short(number: int) -> str:
    return str(number) if number < 10**18 else "over 10^18"


def from_json(value: Any, row: str = "") -> np.ndarray:
    """A number or nested lists of numbers -> float64 or int64 array. ``row`` names the value in errors.

    Raises:
        InvalidInput: ragged, too deep, or holding anything but numbers.
    """
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise InvalidInput(f"{row}the lists are ragged or too deep: numbers in equally long lists expected") from error
    if array.dtype.kind not in "iuf":
        raise InvalidInput(f"{row}numbers in nested lists expected")
    if array.ndim > MAX_DIMENSIONS:
        raise InvalidInput(f"{row}lists are nested {array.ndim} deep: at most {MAX_DIMENSIONS} expected")
    return array


def to_unit(images: np.ndarray, dtype: DType | None = None, first_row: int = 0) -> np.ndarray:
    """Images [N,…] of the stated dtype -> float32 in [0,1]; uint8 by /255, floats must already be there.

    Raises:
        InvalidInput: names the first row that is out of range; nothing is ever rescaled by a guess.
    """
    if dtype is None:
        dtype = "uint8" if images.dtype == np.uint8 else "float32"
    if dtype == "uint8" and images.dtype.kind == "f":
        raise InvalidInput('dtype "uint8" says whole numbers from 0 to 255: the images hold fractions')
    top = 255 if dtype == "uint8" else 1
    good = (images >= 0) & (images <= top)
    if not good.all():
        row = int(np.argmin(good.reshape(len(images), -1).all(1)))
        raise InvalidInput(f"image {first_row + row}: pixels as {dtype} from 0 to {top} expected, finite")
    if dtype == "uint8":
        return images.astype(np.float32) / np.float32(255)
    return images.astype(np.float32)


def as_images(array: np.ndarray, channels: int) -> np.ndarray:
    """Natural shapes -> [N,C,h,w]: N×C×h×w, N×h×w×C, C×h×w, h×w×C, and without C where C is 1.

    Channels last is taken only where channels first does not fit. With one channel three dimensions are N×h×w.

    Raises:
        InvalidInput: another shape, or nothing in it.
    """
    shape = array.shape
    if 0 in shape:
        raise InvalidInput(f"images have shape {shape}: no dimension may be 0")
    if array.ndim == 4 and shape[1] == channels:
        return array
    if array.ndim == 4 and shape[3] == channels:
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    if channels == 1 and array.ndim in (2, 3):
        return array[None, None] if array.ndim == 2 else array[:, None]
    if array.ndim == 3 and shape[0] == channels:
        return array[None]
    if array.ndim == 3 and shape[2] == channels:
        return np.ascontiguousarray(array.transpose(2, 0, 1))[None]
    natural = "(N, 1, H, W), (N, H, W) or (H, W)" if channels == 1 else f"(N, {channels}, H, W) or ({channels}, H, W)"
    raise InvalidInput(f"images have shape {shape}: {natural} expected")


def as_latents(array: np.ndarray, latent_dim: int, max_rows: int) -> np.ndarray:
    """[M,L] or [L] -> float32 [M,L].

    Raises:
        InvalidInput: another width, or numbers that are not finite in float32.
        LimitExceeded: more rows than ``max_rows``.
    """
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or rows.shape[1] != latent_dim or not len(rows):
        raise InvalidInput(f"latents have shape {array.shape}: (M, {latent_dim}) expected")
    if len(rows) > max_rows:
        raise LimitExceeded(f"{len(rows)} latents: at most {max_rows} here (setting max_batch)")
    with np.errstate(over="ignore"):
        latents = rows.astype(np.float32)
    finite = np.isfinite(latents).all(1)
    if not finite.all():
        raise InvalidInput(f"latent {int(np.argmin(finite))}: finite float32 numbers expected")
    return latents
