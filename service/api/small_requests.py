"""Which requests are small enough to be read and answered on the event loop, where all other connections wait.

The first bytes of the body decide: few rows of the model's own size that need no decoder but a plain PNG's.
"""

from __future__ import annotations

import math
import struct

from service.api.context import Call
from service.errors import InvalidInput
from service.formats.arrays import npy_shape
from service.formats.media_types import JSON, NPY, OCTETS, PNG
from service.formats.plain_png import IHDR_END, PNG_START

MAX_BODY_BYTES = 2**16
MAX_PIXELS = 2**16  # of a PNG, by its header: few bytes may hold many
MAX_ROWS, MAX_NUMBERS = 64, 2**16
MAX_CHUNKS = 64
SLOW_TO_WRITE = ("gif", "webp")  # answers, where a request's Accept names them
PNG_CHUNKS = frozenset(
    {b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"IDAT", b"IEND"}
)


def fits_event_loop(call: Call, numbers: int, rows: int | None = None) -> bool:
    """True if reading the request and writing its answer surely take a moment only; its jobs are not considered.

    ``numbers`` is the count of numbers in a row of the model. ``rows`` is the count of rows that the parameters ask
    for, of a verb whose requests have no body.
    """
    max_bytes = MAX_BODY_BYTES if rows is None else 0
    if len(call.body) > max_bytes or any(kind in call.accept.lower() for kind in SLOW_TO_WRITE):
        return False
    if rows is None:
        rows = _plain_rows(call, numbers)
    return rows is not None and are_few(rows, numbers)


def are_few(rows: int, numbers: int) -> bool:
    """True if ``rows`` rows of ``numbers`` numbers each are read, or written, in a moment."""
    return rows <= MAX_ROWS and rows * numbers <= MAX_NUMBERS


def _plain_rows(call: Call, numbers: int) -> int | None:
    """The count of rows in the body; None where it cannot be seen at once, or where rows would be resized."""
    if call.media_type == OCTETS:
        return len(call.body) // numbers
    if call.media_type == NPY:
        return _npy_rows(call)
    if call.media_type == JSON:
        return _json_rows(call)
    if call.media_type == PNG and _is_plain_png(call.body):
        return 1
    return None


def _npy_rows(call: Call) -> int | None:
    """The rows by the header: latents [M,L], or x in the model's own size, channels first, last or left out."""
    shape, natural = npy_shape(call.body), call.rule.natural
    width = call.served.manifest.signature.latent_dim
    if len(shape) == 2 and shape[1] == width:
        return shape[0]
    ends = [natural]
    if call.rule.kind == "image":
        channels, *size = natural
        ends += [(*size, channels), *([tuple(size)] if channels == 1 else [])]
    if any(shape[-len(end) :] == end for end in ends):
        return math.prod(shape) // math.prod(natural) if math.prod(natural) else None
    return None


def _json_rows(call: Call) -> int | None:
    """The rows of nested lists of numbers; None with parameters beside them, which may ask for much, and for files."""
    try:
        document = call.document
    except InvalidInput:  # refused where it is read, in its turn
        return None
    if not isinstance(document, dict) or not document.keys() <= {"images", "dtype", "rows", "latents"}:
        return None
    rows = document.get("images", document.get("rows", document.get("latents")))
    if not isinstance(rows, list) or len(rows) > MAX_ROWS or not all(isinstance(row, list) for row in rows):
        return None
    return len(rows)


def _is_plain_png(body: bytes) -> bool:
    """True for a PNG of few pixels and few chunks, of which only the pixels are inflated."""
    if not body.startswith(PNG_START) or len(body) < IHDR_END:
        return False
    width, height = struct.unpack_from(">II", body, len(PNG_START))
    if width * height > MAX_PIXELS:
        return False
    at = IHDR_END
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(body):
            return True  # cut short: refused in a moment
        size, kind = struct.unpack_from(">I4s", body, at)
        if kind not in PNG_CHUNKS:
            return False
        at += 12 + size
    return False
