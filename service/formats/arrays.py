"""Arrays from outside: npy bytes and JSON lists -> numpy, checked before anything is allocated or believed."""

from __future__ import annotations

import ast
import math
import re
import struct
from contextlib import suppress
from functools import lru_cache
from itertools import chain
from typing import Any, Literal

import numpy as np
import orjson

from service.errors import InvalidInput, LimitExceeded
from service.pixels import unit_levels

NPY_MAGIC = b"\x93NUMPY"
MAX_HEADER = 1024
"""Bytes of an npy header; an honest one has about 120."""
MAX_DIMENSIONS = 4
MAX_LISTS = 2**19
"""Lists and objects of one JSON body: 32 MB of empty ones would take 13 s to parse and 1 GB; rows of pixels are far
fewer (1024 RGB images of 128×128 have 2^18.6)."""
CODES: dict[type, str] = {int: "qd", float: "d"}
"""Of arrays that hold a list of numbers whose first is of that type: int64, float64; the first that can."""
_SIZE_BYTES = {(1, 0): 2, (2, 0): 4}  # format version -> bytes of the header's length
_DTYPES = re.compile(r"[<>=|]?(u1|f2|f4|f8)")
DType = Literal["uint8", "float32"]


def read_npy(data: bytes) -> np.ndarray:
    """The bytes of an .npy file -> uint8 or float array, C order, this machine's byte order; nothing is copied twice.

    Raises:
        InvalidInput: no npy file, another dtype than uint8 or float16/32/64 (pickles among them), over 4 dimensions,
            or a shape that is not what the body holds.
    """
    shape, fortran, dtype, start = _read_header(data)
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidInput(f"the npy array has {len(shape)} dimensions: at most {MAX_DIMENSIONS} expected")
    if any(side < 0 for side in shape):
        raise InvalidInput("the npy array has a negative dimension")
    expected, found = math.prod(shape) * dtype.itemsize, len(data) - start
    if expected != found:
        raise InvalidInput(f"the npy header promises {_short(expected)} bytes of data: the body holds {found}")
    if max(shape, default=0) > len(data):
        raise InvalidInput("the npy array has a dimension beyond the body's bytes")
    array = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array, dtype=dtype.newbyteorder("="))


def npy_shape(data: bytes) -> tuple[int, ...]:
    """The shape that an .npy file's header tells, whatever its body holds; () where none is to be read."""
    try:
        return _read_header(data)[0]
    except InvalidInput:
        return ()


def _read_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype and where the data starts.

    Not numpy's reader: that one understands structures and objects, and mends headers of Python 2 with a warning.
    """
    version = tuple(data[6:8])
    if not data.startswith(NPY_MAGIC) or len(version) < 2:
        raise InvalidInput("no npy file: it does not begin as one")
    if version not in _SIZE_BYTES:
        raise InvalidInput(f"the npy file has format version {version[0]}.{version[1]}: 1.0 or 2.0 expected")
    start = 8 + _SIZE_BYTES[version]
    size = int.from_bytes(data[8:start], "little")
    if size > MAX_HEADER or start + size > len(data):
        raise InvalidInput(f"the npy header has {size} bytes: at most {MAX_HEADER} expected, and no more than sent")
    return *_fields(data[start : start + size].decode("latin-1")), start + size


@lru_cache(maxsize=64)
def _fields(text: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        header = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise InvalidInput("no npy file: its header cannot be read") from error
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise InvalidInput("the npy header is no dictionary of descr, fortran_order and shape")
    shape, fortran, descr = header["shape"], header["fortran_order"], header["descr"]
    if not isinstance(shape, tuple) or any(type(side) is not int for side in shape) or not isinstance(fortran, bool):
        raise InvalidInput("the npy header's shape or fortran_order is none")
    if not isinstance(descr, str) or not _DTYPES.fullmatch(descr):
        raise InvalidInput(f"the npy array has dtype {str(descr)[:60]}: uint8 or float16, float32, float64 expected")
    return shape, fortran, np.dtype(descr)


def _short(number: int) -> str:
    return str(number) if number < 10**18 else "over 10^18"


def parse_json(body: bytes) -> Any:
    """A JSON body -> Python values.

    Raises:
        InvalidInput: no JSON, nested over 1024 deep, or holding NaN or infinities.
        LimitExceeded: over MAX_LISTS lists and objects.
    """
    lists = body.count(b"[") + body.count(b"{") if len(body) > MAX_LISTS else 0
    if lists > MAX_LISTS:
        raise LimitExceeded(f"the JSON body opens {lists} lists and objects: at most {MAX_LISTS} here")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is no JSON: {str(error)[:100]}") from error


def may_hold_booleans(body: bytes) -> bool:
    """Whether true or false stands anywhere in a JSON body. A letter is found ten times as fast as a word."""
    return (b"r" in body and b"true" in body) or (b"f" in body and b"false" in body)


def from_json(value: Any, row: str = "", booleans: bool = True) -> np.ndarray:
    """A number or nested lists of numbers -> float64 or int64 array. ``row`` names the value in errors.

    A level of lists at a time, each read by one pass over it. ``booleans``: whether some may be among the numbers; to
    find them takes as long as all else. Raises:
        InvalidInput: ragged, too deep, or holding anything but numbers. numpy would read true as 1, and give each text
            the room of the longest.
    """
    shape: list[int] = []
    level = [value]
    while True:
        numbers = None if booleans else _numbers(level)
        if numbers is not None:
            return numbers.reshape(shape)
        if (kinds := set(map(type, level))) != {list}:
            break
        if len(shape) == MAX_DIMENSIONS:
            raise InvalidInput(f"{row}lists are nested too deep: at most {MAX_DIMENSIONS} expected")
        lengths = set(map(len, level))
        if len(lengths) > 1:
            raise InvalidInput(f"{row}the lists are ragged: numbers in equally long lists expected")
        shape += lengths
        level = list(chain.from_iterable(level))
    if not kinds <= {int, float}:
        raise InvalidInput(f"{row}numbers in nested lists expected")
    numbers = np.array(level)
    if numbers.dtype.kind not in "iuf":
        raise InvalidInput(f"{row}numbers of 64 bits expected")
    return numbers.reshape(shape)


def _numbers(values: list[Any]) -> np.ndarray | None:
    """A list of numbers, none of them a boolean, as numpy would read it; None where that is not so simple."""
    for code in CODES.get(type(values[0]), "") if values else "":
        with suppress(struct.error, OverflowError):
            return np.frombuffer(struct.pack(f"{len(values)}{code}", *values), code)
    return None


def to_unit(images: np.ndarray, dtype: DType | None = None, first_row: int = 0) -> np.ndarray:
    """Images [N,…] of the stated dtype -> float32 in [0,1]; uint8 by /255, floats must already be there.

    Raises:
        InvalidInput: names the first row that is out of range; nothing is ever rescaled by a guess.
    """
    if dtype is None:
        dtype = "uint8" if images.dtype == np.uint8 else "float32"
    if dtype == "uint8" and images.dtype.kind == "f":
        raise InvalidInput('dtype "uint8" says whole numbers from 0 to 255: the images hold fractions')
    if images.dtype == np.uint8 and dtype == "uint8":
        return unit_levels(images)
    top = 255 if dtype == "uint8" else 1
    low, high = (images.min(), images.max()) if images.size else (0, 0)  # NaN, if there is one
    if not (low >= 0 and high <= top):
        good = (images >= 0) & (images <= top)
        row = int(np.argmin(good.reshape(len(images), -1).all(1)))
        raise InvalidInput(f"image {first_row + row}: pixels as {dtype} from 0 to {top} expected, finite")
    if dtype == "uint8":
        return unit_levels(images)
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
    """[M,L] or [L] -> float32 [M,L], the same numbers where they are float32.

    Raises:
        InvalidInput: another width, or numbers that are not finite in float32.
        LimitExceeded: more rows than ``max_rows``.
    """
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or rows.shape[1] != latent_dim or not len(rows):
        raise InvalidInput(f"latents have shape {array.shape}: (M, {latent_dim}) expected")
    if len(rows) > max_rows:
        raise LimitExceeded(f"{len(rows)} latents: at most {max_rows} here (setting max_batch)")
    if rows.dtype != np.float32:
        with np.errstate(over="ignore"):
            rows = rows.astype(np.float32)
    finite = np.isfinite(rows)
    if not finite.all():
        raise InvalidInput(f"latent {int(np.argmin(finite.all(1)))}: finite float32 numbers expected")
    return rows
