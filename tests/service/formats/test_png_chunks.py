"""A PNG that lacks rows is refused, whatever its kind; a whole one is read, however black its last row."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput
from service.formats import png_chunks
from service.formats.images import ImageLimits, decode_image
from service.formats.png_chunks import PASSES, holds_all_rows, inflates_to_at_least

LIMITS = ImageLimits(2**22, 2**22)
KINDS = {(1, 0): 1, (2, 0): 2, (4, 0): 4, (8, 0): 8, (16, 0): 16, (8, 2): 24, (16, 2): 48, (1, 3): 1, (4, 3): 4}
KINDS |= {(8, 3): 8, (8, 4): 16, (16, 4): 32, (8, 6): 32, (16, 6): 64}
"""Bits of a pixel, by bit depth and colour type."""
SIZES = [(1, 1), (5, 3), (8, 8), (17, 9)]


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def rows_of(width, height, bits, interlaced):
    """Sizes in bytes of the filtered rows, in the order in which they are written."""
    if not interlaced:
        return [1 + (width * bits + 7) // 8] * height
    columns = [(len(range(x, width, dx)), len(range(y, height, dy))) for x, y, dx, dy in PASSES]
    return [1 + (wide * bits + 7) // 8 for wide, high in columns if wide for _ in range(high)]


def png(width, height, depth, colour, data, interlaced=False, parts=1):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(range(3, 3 + 3 * 2 ** min(depth, 6)))) if colour == 3 else b""
    packed = zlib.compress(data)
    step = -(-len(packed) // parts)
    pieces = b"".join(chunk(b"IDAT", packed[i : i + step]) for i in range(0, len(packed), step))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + pieces + chunk(b"IEND", b"")


def read(data):
    return decode_image(data, Preprocessing(height=8, width=8, mode="RGB"), LIMITS)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, 1, 0xFF])
def test_a_whole_one_is_read_and_one_that_lacks_a_row_is_refused(kind, size, interlaced, value):
    fill = bytes([value if kind[1] != 3 else min(value, 2 ** min(kind[0], 6) - 1)])
    rows = [b"\0" + fill * (length - 1) for length in rows_of(*size, KINDS[kind], interlaced)]
    for last_row in (rows[-1], bytes(len(rows[-1]))):
        complete = png(*size, *kind, b"".join([*rows[:-1], last_row]), interlaced, parts=3)
        assert holds_all_rows(complete)
        assert read(complete).shape == (3, 8, 8)
    lacking = png(*size, *kind, b"".join(rows[:-1]), interlaced)
    assert not holds_all_rows(lacking)
    with pytest.raises(InvalidInput, match="damaged or truncated"):
        read(lacking)


@pytest.mark.parametrize("side", [28, 300])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "1"])
def test_black_pictures_of_pillows_are_read(mode, side):
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "PNG")
    assert np.array_equal(np.unique(read(buffer.getvalue())), [0])


def test_a_damaged_stream_holds_nothing():
    data = png(8, 8, 8, 0, bytes(72))
    assert not holds_all_rows(data.replace(b"IDAT\x78", b"IDAT\x00"))


def test_nothing_is_read_behind_the_end_of_a_stream():
    """What follows would be copied with each piece: a megabyte of them, ten thousand times."""
    yielded = []

    def chunks():
        for data in (zlib.compress(bytes(10)), b"junk", b"more"):
            yielded.append(data)
            yield data

    assert not inflates_to_at_least(chunks(), 11)
    assert len(yielded) == 1


def test_a_large_piece_is_read_little_by_little(monkeypatch):
    sizes, made = [], zlib.decompressobj

    class Recorder:
        def __init__(self):
            self._stream = made()

        def __getattr__(self, name):
            return getattr(self._stream, name)

        def decompress(self, data, max_length):
            sizes.append((len(data), max_length))
            return self._stream.decompress(data, max_length)

    monkeypatch.setattr(png_chunks.zlib, "decompressobj", Recorder)
    noise = np.random.RandomState(0).bytes(2**20)
    assert inflates_to_at_least([zlib.compress(noise)], 2**20)
    assert not inflates_to_at_least([zlib.compress(noise)], 2**20 + 1)
    assert max(sizes) <= (png_chunks.PIECE_BYTES, png_chunks.PIECE_BYTES)


def test_much_is_counted_in_pieces():
    """Nine pixels of ten million stand in 10 kB."""
    assert holds_all_rows(png(10_000, 1_000, 8, 0, bytes(10_001 * 1_000)))
    assert not holds_all_rows(png(10_000, 1_001, 8, 0, bytes(10_001 * 1_000)))
