"""IDX, the file format of MNIST: two zero bytes, a type, a number of dimensions, big-endian sizes, then the elements.

Format: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits", section "File formats".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from training.errors import DataFormatError, DataNotFound

MAX_BYTES = 2**32  # of elements; MNIST has 47 million, and a hostile header could ask for any number
UNSIGNED_BYTE = 0x08
CHUNK = 2**20
GZIP_MAGIC = b"\x1f\x8b"


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array of ``ndim`` dimensions in an IDX file, gzipped or not.

    Raises DataNotFound, or DataFormatError naming the file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataNotFound(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return parse_idx(data, ndim)
    except DataFormatError as error:
        raise DataFormatError(f"{path}: {error}") from error


def parse_idx(data: bytes, ndim: int) -> np.ndarray:
    """The uint8 array of ``ndim`` dimensions that IDX bytes hold, gzipped or not.

    Raises DataFormatError unless magic, dimensions and length are exactly right.
    """
    try:
        if data.startswith(GZIP_MAGIC):
            with gzip.GzipFile(fileobj=BytesIO(data)) as stream:
                return _parse(stream, ndim)
        return _parse(BytesIO(data), ndim)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFormatError(f"damaged gzip data ({error})") from error


def _parse(stream: BinaryIO | gzip.GzipFile, ndim: int) -> np.ndarray:
    shape = _header(stream, ndim)
    elements = math.prod(shape)
    if elements > MAX_BYTES:
        raise DataFormatError(f"the header says {shape}, {elements} bytes; at most {MAX_BYTES} are read")
    body = bytearray()
    while len(body) <= elements:
        chunk = stream.read(min(CHUNK, elements + 1 - len(body)))
        if not chunk:
            break
        body += chunk
    if len(body) != elements:
        found = f"only {len(body)}" if len(body) < elements else "more"
        raise DataFormatError(f"the header says {shape}, {elements} bytes, but {found} follow")
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def _header(stream: BinaryIO | gzip.GzipFile, ndim: int) -> tuple[int, ...]:
    magic = stream.read(4)
    expected = bytes([0, 0, UNSIGNED_BYTE, ndim])
    if magic != expected:
        raise DataFormatError(
            f"begins with {magic.hex(' ') or 'nothing'}; an IDX file of unsigned bytes in {ndim} dimensions begins "
            f"with {expected.hex(' ')}"
        )
    sizes = stream.read(4 * ndim)
    if len(sizes) != 4 * ndim:
        raise DataFormatError(f"ends within the header; {ndim} sizes of 4 bytes were expected")
    return struct.unpack(f">{ndim}I", sizes)
