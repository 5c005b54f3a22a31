"""Decode small PNGs as most programs write them: 8-bit grey or RGB, with no chunks but IHDR, IDAT and IEND.

For 28×28 pixels Pillow's PNG plugin takes three times as long as Pillow's zip decoder, which is called directly here.
PNGs of other kinds, and damaged ones, are left to the plugin, which reads every kind, and to its caller, which words
the errors.
"""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from service.formats.png_chunks import has_nonzero_last_row, inflates_to_at_least, row_bytes

PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
"""First bytes of every PNG: the signature, then length and name of chunk IHDR, whose first field is the width."""
IHDR_END = len(PNG_START) + 13 + 4
"""Offset of the second chunk."""
MAX_PIXELS = 2**16  # by the header, since few bytes can inflate to many pixels
MAX_CHUNKS = 64
MODES = {(8, 0, 0, 0, 0): "L", (8, 2, 0, 0, 0): "RGB"}
"""Pillow's mode by bit depth, colour type, compression, filter method and interlacing (PNG specification, 11.2.1)."""


def read_plain_png(data: bytes) -> Image.Image | None:
    """Decode a plain PNG into an image in mode L or RGB; None if it is of another kind, incomplete or damaged."""
    if not data.startswith(PNG_START) or len(data) < IHDR_END:
        return None
    width, height, *kind = struct.unpack_from(">IIBBBBB", data, len(PNG_START))
    mode = MODES.get(tuple(kind))
    if mode is None or not 0 < width * height <= MAX_PIXELS:
        return None
    compressed = _idat_data(data)
    if compressed is None:
        return None
    try:
        image = Image.frombytes(mode, (width, height), compressed, "zip", mode)
    except (ValueError, OSError):
        return None
    size = height * row_bytes(width, 8 * len(mode))
    if not has_nonzero_last_row(image) and not inflates_to_at_least([compressed], size):
        return None
    image.format = "PNG"
    return image


def _idat_data(data: bytes) -> bytes | None:
    """Join the data of the IDAT chunks; None if there are other chunks, or a checksum is wrong."""
    if not _has_right_checksum(data, len(PNG_START) - 8, IHDR_END):
        return None
    parts: list[bytes] = []
    start = IHDR_END
    for _ in range(MAX_CHUNKS):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        if end > len(data) or kind not in (b"IDAT", b"IEND") or not _has_right_checksum(data, start, end):
            return None
        if kind == b"IEND":
            return b"".join(parts)
        parts.append(data[start + 8 : end - 4])
        start = end
    return None


def _has_right_checksum(data: bytes, start: int, end: int) -> bool:
    """True if the chunk from ``start`` to ``end``, its CRC-32 included, is undamaged."""
    return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
