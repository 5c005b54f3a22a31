"""Decide which requests are small enough to be read and answered on the event loop, while other connections wait.

They have few rows of the model's own size, in formats that need no decoder but that of plain PNGs; the headers of the
formats, or a parsed JSON body, tell.
"""

from __future__ import annotations

import math
import struct

from service.api.context import Call
from service.errors import InvalidInput
from service.formats.arrays import npy_shape
from service.formats.media_types import JSON, NPY, OCTETS, PNG
from service.formats.plain_png import IHDR_END, MAX_CHUNKS, MAX_PIXELS, PNG_START

MAX_BODY_BYTES = 2**16
MAX_ROWS, MAX_NUMBERS = 64, 2**16
SLOW_TO_WRITE = ("gif", "webp")  # formats of answers, as an Accept header names them
PNG_CHUNKS = frozenset(
    {b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"IDAT", b"IEND"}
)
"""Chunks of a PNG that take no time, or hold the pixels; others can hold compressed text, profiles or EXIF."""


def fits_event_loop(call: Call, numbers: int, rows: int | None = None) -> bool:
    """True if a request is certainly read, and its answer written, fast; the time of its jobs is not considered.

    Args:
        numbers: count of numbers in one row of the model.
        rows: count of rows that the parameters ask for, for a verb whose requests have no body; else None.
    """
    max_bytes = MAX_BODY_BYTES if rows is None else 0
    if len(call.body) > max_bytes or any(kind in call.accept.lower() for kind in SLOW_TO_WRITE):
        return False
    if rows is None:
        rows = _count_rows(call, numbers)
    return rows is not None and are_few(rows, numbers)


def are_few(rows: int, numbers: int) -> bool:
    """True if ``rows`` rows of ``numbers`` numbers each are few enough to be read or written on the event loop."""
    return rows <= MAX_ROWS and rows * numbers <= MAX_NUMBERS


def _count_rows(call: Call, numbers: int) -> int | None:
    """Count the rows in the body; None if that would take long, or if the rows may have to be resized."""
    if call.media_type == OCTETS:
        return len(call.body) // numbers
    if call.media_type == NPY:
        return _count_npy_rows(call)
    if call.media_type == JSON:
        return _count_json_rows(call)
    if call.media_type == PNG and _is_plain_png(call.body):
        return 1
    return None


def _count_npy_rows(call: Call) -> int | None:
    """Count the rows by the header: latents [M,L], or rows of the model's shape, channels first, last or left out."""
    shape, natural = npy_shape(call.body), call.rule.natural
    width = call.served.manifest.signature.latent_dim
    if len(shape) == 2 and shape[1] == width:
        return shape[0]
    row_shapes = [natural]
    if call.rule.kind == "image":
        channels, *size = natural
        row_shapes += [(*size, channels), *([tuple(size)] if channels == 1 else [])]
    if any(shape[-len(row_shape) :] == row_shape for row_shape in row_shapes):
        return math.prod(shape) // math.prod(natural) if math.prod(natural) else None
    return None


def _count_json_rows(call: Call) -> int | None:
    """Count the rows of nested lists; None for files, and for parameters beside the rows, which may ask for more."""
    try:
        document = call.document
    except InvalidInput:  # the reader raises it again, after Accept was judged
        return None
    if not isinstance(document, dict) or not document.keys() <= {"images", "dtype", "rows", "latents"}:
        return None
    rows = document.get("images", document.get("rows", document.get("latents")))
    if not isinstance(rows, list) or len(rows) > MAX_ROWS or not all(isinstance(row, list) for row in rows):
        return None
    return len(rows)


def _is_plain_png(body: bytes) -> bool:
    """True if a PNG has few pixels and few chunks, of which only the pixels have to be inflated."""
    if not body.startswith(PNG_START) or len(body) < IHDR_END:
        return False
    width, height = struct.unpack_from(">II", body, len(PNG_START))
    if width * height > MAX_PIXELS:
        return False
    start = IHDR_END
    for _ in range(MAX_CHUNKS):
        if start + 8 > len(body):
            return True  # the file is truncated, which its reader refuses fast
        size, kind = struct.unpack_from(">I4s", body, start)
        if kind not in PNG_CHUNKS:
            return False
        start += 12 + size
    return False
