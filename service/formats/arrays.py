"""Read npy bytes and JSON lists from clients into numpy arrays, checked before any memory is allocated for them."""

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
from service.formats.containers import advise
from service.literals import PARSING
from service.pixels import unit_levels

NPY_MAGIC = b"\x93NUMPY"
MAX_HEADER = 1024
"""Bytes of an npy header; numpy writes about 120."""
MAX_DIMENSIONS = 4
MAX_LISTS = 2**19
"""Lists and objects in one JSON body: 32 MB of empty ones would take 13 s and 1 GB to parse. Rows of pixels need far
fewer: 1024 RGB images of 128×128 have 2^18.6."""
MAX_NAMES = 2**16
"""Names in each object of a JSON body, on the average: 25 MB of other names would hold the interpreter for a second,
and be refused one by one. A row of a table has as many names as the model has features."""
STRUCT_CODES: dict[type, str] = {int: "qd", float: "d"}
"""Formats of ``struct`` to try for a list of numbers, by the type of its first: q is int64, d is float64."""
_SIZE_BYTES = {(1, 0): 2, (2, 0): 4}  # format version -> bytes of the header's length
_DTYPES = re.compile(r"[<>=|]?(u1|f2|f4|f8)")
_OTHER_NUMBERS = re.compile(r"[<>=|]?(b1|[iu][1248])")
_SCALE = '; levels from 0 to 255 are sent as uint8 (in JSON with "dtype": "uint8"), or divided by 255'
DType = Literal["uint8", "float32"]


def read_npy(data: bytes) -> np.ndarray:
    """Read an .npy file into a uint8 or float array, in C order and native byte order, with at most one copy.

    Raises:
        InvalidInput: the bytes are no npy file, have a dtype other than uint8 or float16/32/64 (as pickles do), over 4
            dimensions, or a shape that does not fit the length of the data.
    """
    shape, fortran, dtype, start = _read_header(data)
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidInput(f"the npy array has {len(shape)} dimensions: at most {MAX_DIMENSIONS} expected")
    if any(side < 0 for side in shape):
        raise InvalidInput("the npy array has a negative dimension")
    promised, held = math.prod(shape) * dtype.itemsize, len(data) - start  # bytes
    if promised != held:
        raise InvalidInput(f"the npy header promises {_short(promised)} bytes of data: the body holds {held}")
    if max(shape, default=0) > len(data):
        raise InvalidInput("the npy array has a dimension beyond the body's bytes")
    array = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran else "C")
    return np.ascontiguousarray(array, dtype=dtype.newbyteorder("="))


def npy_shape(data: bytes) -> tuple[int, ...]:
    """Return the shape in the header of an .npy file, without reading its data; () if the header cannot be read."""
    try:
        return _read_header(data)[0]
    except InvalidInput:
        return ()


def _read_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Return the shape, whether the order is Fortran's, the dtype, and the offset of the data, from an .npy file.

    numpy's own reader is not used: it accepts structured dtypes and objects, and repairs headers of Python 2 with a
    warning.
    """
    version = tuple(data[6:8])
    if not data.startswith(NPY_MAGIC) or len(version) < 2:
        raise InvalidInput(f"no npy file: it does not begin as one{advise(data)}")
    if version not in _SIZE_BYTES:
        raise InvalidInput(f"the npy file has format version {version[0]}.{version[1]}: 1.0 or 2.0 expected")
    start = 8 + _SIZE_BYTES[version]
    size = int.from_bytes(data[8:start], "little")
    if size > MAX_HEADER or start + size > len(data):
        raise InvalidInput(f"the npy header has {size} bytes: at most {MAX_HEADER} expected, and no more than sent")
    return *_parse_header(data[start : start + size].decode("latin-1")), start + size


@lru_cache(maxsize=64)
def _parse_header(text: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        with PARSING:
            header = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise InvalidInput("no npy file: its header cannot be read") from error
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"}:
        raise InvalidInput("the npy header is no dictionary of descr, fortran_order and shape")
    shape, fortran, descr = header["shape"], header["fortran_order"], header["descr"]
    if not isinstance(shape, tuple) or any(type(side) is not int for side in shape) or not isinstance(fortran, bool):
        raise InvalidInput("the npy header's shape or fortran_order is none")
    if not isinstance(descr, str) or not _DTYPES.fullmatch(descr):
        raise InvalidInput(
            f"the npy array has dtype {str(descr)[:60]}: uint8 or float16, float32, float64 expected{_advice(descr)}"
        )
    return shape, fortran, np.dtype(descr)


def _advice(descr: object) -> str:
    """Say what to do with numbers of another dtype; "" for what are no numbers."""
    if not isinstance(descr, str) or not _OTHER_NUMBERS.fullmatch(descr):
        return ""
    if descr.endswith("b1"):
        return "; of an image, send (x * 255).astype('uint8')"
    return "; of an image, send levels from 0 to 255 by x.astype('uint8'), or x / 65535 of 16 bits; else floats"


def _short(number: int) -> str:
    """Write a number in decimal digits, but none so large that its text would fill the answer."""
    return str(number) if number < 10**18 else "over 10^18"


def parse_json(body: bytes) -> Any:
    """Parse a JSON body into Python values.

    Raises:
        InvalidInput: the body is no JSON, is nested over 1024 deep, or holds NaN or infinities.
        LimitExceeded: it has more than MAX_LISTS lists and objects, or more than MAX_NAMES names an object.
    """
    if len(body) > 2 * MAX_NAMES:
        _check_size(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidInput(f"the body is no JSON: {str(error)[:100]}{advise(body)}") from error


def _check_size(body: bytes) -> None:
    """Raise LimitExceeded for a JSON body of too many lists, objects or names; those inside of texts count, too."""
    objects = body.count(b"{")
    lists, names = body.count(b"[") + objects, body.count(b":")
    if lists > MAX_LISTS:
        raise LimitExceeded(f"the JSON body opens {lists} lists and objects: at most {MAX_LISTS} here")
    if names > MAX_NAMES * max(1, objects):
        raise LimitExceeded(f"the JSON body has {names} names in {objects} objects: at most {MAX_NAMES} each here")


def may_hold_booleans(body: bytes) -> bool:
    """True if the text ``true`` or ``false`` occurs in a JSON body."""
    # A single letter is searched ten times as fast as a word, and most bodies hold neither r nor f.
    return (b"r" in body and b"true" in body) or (b"f" in body and b"false" in body)


def from_json(value: Any, row: str = "", booleans: bool = True) -> np.ndarray:
    """Convert a number or nested lists of numbers to a float64 or int64 array, by one pass over each level of lists.

    It is stricter than ``np.array``, which reads true as 1 and gives each text the memory of the longest.

    Args:
        value: what a JSON document holds.
        row: prefix of error texts, which names the value.
        booleans: False if the caller knows that there are none; to look for them doubles the time.

    Raises:
        InvalidInput: the lists are ragged, nested too deep, or hold anything but numbers of 64 bits.
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
    """Convert a list of numbers without booleans to an int64 or float64 array; None if it holds anything else."""
    for code in STRUCT_CODES.get(type(values[0]), "") if values else "":
        with suppress(struct.error, OverflowError):
            return np.frombuffer(struct.pack(f"{len(values)}{code}", *values), code)
    return None


def to_unit(images: np.ndarray, dtype: DType | None = None, first_row: int = 0) -> np.ndarray:
    """Convert images [N,…] to float32 pixels in [0,1]: uint8 levels k become k/255, floats must lie in [0,1] already.

    Nothing is rescaled by a guess.

    Args:
        images: [N,…] of any numeric dtype.
        dtype: how the numbers are meant, "uint8" (0 to 255) or "float32" ([0,1]); None: by the array's own dtype.
        first_row: index of the first image, for error texts.

    Raises:
        InvalidInput: a pixel is out of range or not finite (the text names the first such image), or the images hold
            fractions where ``dtype`` is "uint8".
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
        in_range = (images >= 0) & (images <= top)
        row = int(np.argmin(in_range.reshape(len(images), -1).all(1)))
        raise InvalidInput(
            f"image {first_row + row}: pixels as {dtype} from 0 to {top} expected, finite{_SCALE if top == 1 else ''}"
        )
    if dtype == "uint8":
        return unit_levels(images)
    return images.astype(np.float32)


def as_images(array: np.ndarray, shape: tuple[int, int, int], is_list: bool = False) -> np.ndarray:
    """Bring images to shape [N,C,h,w] from N×C×h×w, N×h×w×C, C×h×w, h×w×C, and for C = 1 also N×h×w and h×w.

    Of several layouts that fit, one that gives the model's own size is taken, else the first of this list; but with
    C = 1 a last axis of 1 is h×w×1. Unless they give that size, 3 channels are not taken for three images, nor 2 to 4
    channels for a width, nor a flattened image for one of a single row.

    Args:
        array: the images.
        shape: (C, H, W) of one image of the model.
        is_list: the first axis is known to count images; then 3 of them are 3 images.

    Raises:
        InvalidInput: the array fits none of the layouts, or has a dimension of 0; the text names the layouts.
    """
    if 0 in array.shape:
        raise InvalidInput(f"images have shape {array.shape}: no dimension may be 0")
    views = _layouts(array, shape[0])
    exact = [view for view in views if view.shape[1:] == shape]
    if exact:
        return np.ascontiguousarray(exact[0])
    if not views or _is_colour(array, shape[0], is_list) or _is_flattened(array, views[0], shape):
        raise InvalidInput(f"images have shape {array.shape}: {_expected_layouts(array, shape)}")
    return np.ascontiguousarray(views[0])


def _layouts(array: np.ndarray, channels: int) -> list[np.ndarray]:
    """View an array as [N,C,h,w] in each layout whose count of axes and of channels fits, the likeliest first."""
    sides = array.shape
    if array.ndim == 4:
        views = [array] if sides[1] == channels else []
        return views + ([array.transpose(0, 3, 1, 2)] if sides[3] == channels else [])
    if array.ndim == 2 and channels == 1:
        return [array[None, None]]
    if array.ndim != 3:
        return []
    channels_last = [array.transpose(2, 0, 1)[None]] if sides[2] == channels else []
    if channels == 1:
        return [*channels_last, array[:, None]]
    return ([array[None]] if sides[0] == channels else []) + channels_last


def _is_colour(array: np.ndarray, channels: int, is_list: bool) -> bool:
    """True if an array for a model of grey images may be one of several channels instead, or is."""
    if channels > 1 or array.ndim != 3:
        return False
    return (array.shape[0] == 3 and not is_list) or (min(array.shape[:2]) > 4 and array.shape[2] in (2, 3, 4))


def _is_flattened(array: np.ndarray, images: np.ndarray, shape: tuple[int, int, int]) -> bool:
    """True if rows of an array, or the ``images`` [N,C,h,w] that it would be, are lines of a whole image's numbers."""
    numbers = math.prod(shape)
    sides = array.shape[:2] if array.ndim == 3 and array.shape[2] == 1 else array.shape
    return (len(sides) == 2 and sides[1] == numbers) or images.shape[2:] in ((1, numbers), (numbers, 1))


def _expected_layouts(array: np.ndarray, shape: tuple[int, int, int]) -> str:
    """Name the layouts that images of the model have, and what to do with an array of the likeliest other one."""
    channels, numbers = shape[0], math.prod(shape)
    if channels == 1:
        layouts = "(N, 1, H, W), (N, H, W, 1), (N, H, W), (H, W, 1) or (H, W) expected"
        other = "this model is of grey images: convert colours to grey, and send three images as (3, 1, H, W)"
    else:
        layouts = f"(N, {channels}, H, W), (N, H, W, {channels}), ({channels}, H, W) or (H, W, {channels}) expected"
        other = "this model is of colour images: repeat grey in three channels, and leave out an alpha channel"
    if numbers in array.shape:
        other = f"reshape flattened images to {(-1, *shape)}"
    return f"{layouts}; {other}"


def as_latents(array: np.ndarray, latent_dim: int, max_rows: int) -> np.ndarray:
    """Bring latents [M,L] or [L], L = ``latent_dim``, to float32 [M,L]; float32 numbers are kept bitwise.

    Raises:
        InvalidInput: the width is another, or a number is not finite in float32.
        LimitExceeded: there are more rows than ``max_rows``.
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
