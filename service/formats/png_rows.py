"""Whether a PNG holds all the rows that its header promises: Pillow leaves 0 what is lacking, and says nothing."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

from PIL import Image

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""By colour type (PNG specification, 11.2.1)."""
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps from one to the next, of Adam7's passes (8.2)."""
PIECE = 2**16


def shows_its_last_row(image: Image.Image) -> bool:
    """Whether that is to be seen of the decoded image at a glance. Rows of an interlaced one do not come in order."""
    if "interlace" in image.info:
        return False
    pixel = image.getpixel((image.width // 2, image.height - 1))
    return any(pixel) if isinstance(pixel, tuple) else bool(pixel)


def holds_all_rows(data: bytes) -> bool:
    """By the bytes of a PNG that was decoded: its signature and IHDR are sound."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * CHANNELS[colour]
    if not interlaced:
        promised = height * row_bytes(width, bits)
    else:
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in PASSES]
        promised = sum(rows * row_bytes(columns, bits) for columns, rows in sizes if columns > 0 and rows > 0)
    return inflates_to(_compressed(data), promised)


def row_bytes(width: int, bits: int) -> int:
    """Of so many pixels of so many bits, with the byte that names the filter."""
    return 1 + -(-width * bits // 8)


def inflates_to(pieces: Iterable[bytes | memoryview], size: int) -> bool:
    """Whether a zlib stream in pieces holds so many bytes at least. No more than PIECE of them are held at once."""
    stream = zlib.decompressobj()
    for piece in pieces:
        for start in range(0, len(piece), PIECE):  # what is left over is copied each time: it must not be much
            part = bytes(piece[start : start + PIECE])
            while part and size > 0:
                try:
                    size -= len(stream.decompress(part, PIECE))
                except zlib.error:
                    return False
                part = stream.unconsumed_tail
            if stream.eof or size <= 0:
                return size <= 0
    return False


def _compressed(data: bytes) -> Iterator[memoryview]:
    """What its chunks IDAT hold."""
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == b"IDAT":
            yield view[start + 8 : end - 4]
        start = end
