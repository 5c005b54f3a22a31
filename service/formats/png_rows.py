"""Check that a PNG holds all the rows that its header promises: Pillow fills missing rows with 0 and raises nothing."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

from PIL import Image

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Numbers per pixel by colour type (PNG specification, 11.2.1)."""
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, column step and row step of each pass of Adam7 (PNG specification, 8.2)."""
PIECE_BYTES = 2**16


def has_nonzero_last_row(image: Image.Image) -> bool:
    """True if the middle pixel of a decoded image's last row is not 0, which proves that no row is missing.

    False proves nothing. It is always False for interlaced images, whose last row is not the last one stored.
    """
    if "interlace" in image.info:
        return False
    pixel = image.getpixel((image.width // 2, image.height - 1))
    return any(pixel) if isinstance(pixel, tuple) else bool(pixel)


def holds_all_rows(data: bytes) -> bool:
    """True if the IDAT chunks of a PNG inflate to as many bytes as all its rows take.

    The PNG must have been decoded, so that its signature and its IHDR chunk are known to be sound.
    """
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * CHANNELS[colour]
    if not interlaced:
        promised = height * row_bytes(width, bits)
    else:
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in PASSES]
        promised = sum(rows * row_bytes(columns, bits) for columns, rows in sizes if columns > 0 and rows > 0)
    return inflates_to_at_least(_idat_chunks(data), promised)


def row_bytes(width: int, bits: int) -> int:
    """Count of bytes of a stored row of ``width`` pixels of ``bits`` bits, with the byte that names the filter."""
    return 1 + -(-width * bits // 8)


def inflates_to_at_least(chunks: Iterable[bytes | memoryview], size: int) -> bool:
    """True if a zlib stream, given in chunks, inflates to ``size`` bytes or more.

    At most PIECE_BYTES inflated bytes are held at once, and the stream is read no further than the answer needs.
    """
    stream, missing = zlib.decompressobj(), size
    for chunk in chunks:
        for start in range(0, len(chunk), PIECE_BYTES):  # zlib copies the unconsumed rest each time: keep it short
            piece = bytes(chunk[start : start + PIECE_BYTES])
            while piece and missing > 0:
                try:
                    missing -= len(stream.decompress(piece, PIECE_BYTES))
                except zlib.error:
                    return False
                piece = stream.unconsumed_tail
            if stream.eof or missing <= 0:
                return missing <= 0
    return False


def _idat_chunks(data: bytes) -> Iterator[memoryview]:
    """Yield the data of each IDAT chunk of a PNG."""
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == b"IDAT":
            yield view[start + 8 : end - 4]
        start = end
