"""Which bodies are read in a moment for sure, by a look at their first bytes: few rows that need no great decoder.

Such are read on the event loop, where all other connections wait.
"""

from __future__ import annotations

import math
import struct

from service.api.context import JSON, NPY, PNG, Call
from service.formats.arrays import npy_shape
from service.formats.codecs import OCTETS
from service.formats.plain_png import FIRST, HEAD

MOST_BYTES = 2**16  # of a body
MOST_PIXELS = 2**16  # of a PNG, by its header: few bytes may hold many
MOST_ROWS, MOST_NUMBERS = 64, 2**16
MOST_CHUNKS = 64
LONG_TO_WRITE = ("gif", "webp")  # answers, where a request's Accept names them
PNG_CHUNKS = frozenset(
    {b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"IDAT", b"IEND"}
)


def is_light(call: Call, numbers: int, rows: int | None = None) -> bool:
    """Whether all but the jobs takes a moment, for sure: it will run on the event loop.

    Few rows of the model's own size that need no decoder but a plain PNG's; or so many ``rows`` without a body. No
    answer that takes long to write.
    """
    most = MOST_BYTES if rows is None else 0
    if len(call.body) > most or any(kind in call.accept.lower() for kind in LONG_TO_WRITE):
        return False
    if rows is None:
        rows = _plain_rows(call, numbers)
    return rows is not None and are_few(rows, numbers)


def are_few(rows: int, numbers: int) -> bool:
    """Whether so many rows of so many numbers are read, or written, in a moment."""
    return rows <= MOST_ROWS and rows * numbers <= MOST_NUMBERS


def _plain_rows(call: Call, numbers: int) -> int | None:
    """How many rows the body holds; None where that is not to be seen at once, or where they are to be resized."""
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
    """By the header: latents [M,L], or rows in the model's own size, of images the channels first, last or left out."""
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
    """Nested lists of numbers alone; parameters beside them may ask for much, strings may hold pictures."""
    document = call.document
    if not isinstance(document, dict) or not document.keys() <= {"images", "dtype", "rows", "latents"}:
        return None
    rows = document.get("images", document.get("rows", document.get("latents")))
    if not isinstance(rows, list) or len(rows) > MOST_ROWS or not all(isinstance(row, list) for row in rows):
        return None
    return len(rows)


def _is_plain_png(body: bytes) -> bool:
    """A PNG of few pixels and chunks, none of which could be large inflated but the pixels themselves."""
    if not body.startswith(HEAD) or len(body) < FIRST:
        return False
    width, height = struct.unpack_from(">II", body, len(HEAD))
    if width * height > MOST_PIXELS:
        return False
    at = FIRST
    for _ in range(MOST_CHUNKS):
        if at + 8 > len(body):
            return True  # cut short: refused in a moment
        size, kind = struct.unpack_from(">I4s", body, at)
        if kind not in PNG_CHUNKS:
            return False
        at += 12 + size
    return False
