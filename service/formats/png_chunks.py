"""Read the chunks of a PNG where Pillow reads them wrongly or not at all: missing rows, and transparent colours.

Pillow fills missing rows with 0 and raises nothing. It compares the transparent level of chunk tRNS with pixels that it
has scaled to 8 bits, or of whose 16 bits it has kept the upper 8.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from io import BytesIO

import numpy as np
from PIL import Image

GREY, RGB, PALETTE = 0, 2, 3
"""Colour types without an alpha channel, which chunk tRNS can make up for."""
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, 4: 2, 6: 4}
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
    return inflates_to_at_least(_chunks(data, b"IDAT"), promised)


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


def correct_transparency(image: Image.Image, data: bytes) -> None:
    """Set what is transparent in a decoded PNG to what its chunk tRNS says (PNG specification, 11.3.2.1).

    Grey of 1, 2 and 4 bits has been scaled to 8 bits, and so the transparent level must be. Of 16-bit colours all 16
    bits count: where a colour is the transparent one, the image gets an alpha of 0. A palette keeps the alpha of each
    of its entries.

    Args:
        image: as Pillow decoded it, neither turned nor converted.
        data: the file, whose signature and IHDR chunk are sound.
    """
    if "transparency" not in image.info:
        return
    del image.info["transparency"]  # of a text that is called so, too
    depth, colour = data[24], data[25]
    entries = bytes(next(_chunks(data, b"tRNS"), b""))
    if colour == PALETTE and entries:
        image.info["transparency"] = entries
    elif colour in (GREY, RGB) and len(entries) >= 2 * CHANNELS[colour]:
        levels = struct.unpack_from(f">{CHANNELS[colour]}H", entries)
        if depth < 16:
            top = 2**depth - 1
            levels = tuple((level & top) * (255 // top) for level in levels)  # unused upper bits do not count
        if (depth, colour) == (16, RGB):
            alpha = np.where(_equals_16_bits(image, data, entries), np.uint8(0), np.uint8(255))
            image.putalpha(Image.fromarray(alpha))
        else:
            image.info["transparency"] = levels if colour == RGB else levels[0]


def _equals_16_bits(image: Image.Image, data: bytes, colour: bytes) -> np.ndarray:
    """Compare 16-bit RGB pixels with a colour of six bytes, big-endian: bool [h,w].

    ``image`` has the upper bytes of the pixels. The lower ones are decoded by taking the file for little-endian.
    """
    with Image.open(BytesIO(data), formats=("PNG",)) as lower:
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        upper_equal = np.asarray(image) == np.frombuffer(colour[0:6:2], np.uint8)
        equal: np.ndarray = (upper_equal & (np.asarray(lower) == np.frombuffer(colour[1:6:2], np.uint8))).all(2)
    return equal


def _chunks(data: bytes, name: bytes) -> Iterator[memoryview]:
    """Yield the data of each chunk of that name in a PNG."""
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == name:
            yield view[start + 8 : end - 4]
        start = end
