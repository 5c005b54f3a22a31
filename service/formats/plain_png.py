"""Small PNGs as most programs write them, 8-bit grey or RGB in nothing but IHDR, IDAT and IEND.

Pillow's plugin for PNG takes three times as long for 28×28 pixels as its decoder, which is asked for the pixels here.
What is written otherwise, or is damaged, is left to the plugin: it knows all there is, and we how to say what is wrong.
"""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from service.formats.png_rows import inflates_to, row_bytes, shows_its_last_row

HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
FIRST = len(HEAD) + 13 + 4  # where the second chunk begins
MOST_PIXELS = 2**16
MOST_CHUNKS = 64
MODES = {(8, 0, 0, 0, 0): "L", (8, 2, 0, 0, 0): "RGB"}
"""By bit depth, colour type, compression, filter method and interlacing (PNG specification, 11.2.1)."""


def read_plain_png(data: bytes) -> Image.Image | None:
    """The decoded image, in mode L or RGB; None for anything but such a PNG, whole and with right checksums."""
    if not data.startswith(HEAD) or len(data) < FIRST:
        return None
    width, height, *kind = struct.unpack_from(">IIBBBBB", data, len(HEAD))
    mode = MODES.get(tuple(kind))
    if mode is None or not 0 < width * height <= MOST_PIXELS:
        return None
    pixels = _compressed(data)
    if pixels is None:
        return None
    try:
        image = Image.frombytes(mode, (width, height), pixels, "zip", mode)
    except (ValueError, OSError):
        return None
    if not shows_its_last_row(image) and not inflates_to([pixels], height * row_bytes(width, 8 * len(mode))):
        return None
    image.format = "PNG"
    return image


def _compressed(data: bytes) -> bytes | None:
    """What the chunks IDAT hold; None where there are others, or a checksum is wrong."""
    if not _is_whole(data, len(HEAD) - 8, FIRST):
        return None
    parts: list[bytes] = []
    start = FIRST
    for _ in range(MOST_CHUNKS):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        kind = data[start + 4 : start + 8]
        if end > len(data) or kind not in (b"IDAT", b"IEND") or not _is_whole(data, start, end):
            return None
        if kind == b"IEND":
            return b"".join(parts)
        parts.append(data[start + 8 : end - 4])
        start = end
    return None


def _is_whole(data: bytes, start: int, end: int) -> bool:
    """Whether the checksum of that chunk is right."""
    return zlib.crc32(data[start + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
