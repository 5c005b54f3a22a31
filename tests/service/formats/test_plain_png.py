"""Plain PNGs decoded without the plugin: the same pixels, and nothing taken that the plugin would refuse."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput
from service.formats import images
from service.formats.images import ImageLimits, decode_image
from service.formats.plain_png import MAX_PIXELS, read_plain_png

LIMITS = ImageLimits(2**22, 2**22)


def levels(height, width, channels=1, seed=0):
    """Smooth, so that encoders choose every filter."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    planes = [127 + 100 * np.sin(x / 5 + c) * np.cos(y / 3) + random.normal(0, 9, x.shape) for c in range(channels)]
    return np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8).squeeze(-1 if channels == 1 else ())


def png(image, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def built(rows, width, height, parts=1, tail=b""):
    """An 8-bit grey PNG of filtered ``rows``, its data in several chunks."""
    data = zlib.compress(rows) + tail
    step = -(-len(data) // parts)
    pieces = b"".join(chunk(b"IDAT", data[i : i + step]) for i in range(0, len(data), step))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + pieces + chunk(b"IEND", b"")


def by_plugin(data, monkeypatch, rule):
    monkeypatch.setattr(images, "read_plain_png", lambda data: None)
    return decode_image(data, rule, LIMITS)


def rule(height, width, channels):
    return Preprocessing(height=height, width=width, mode="L" if channels == 1 else "RGB")


PLAIN = {
    "grey": png(levels(28, 28)),
    "colour": png(levels(17, 31, 3), optimize=True),
    "one pixel": png(levels(1, 1)),
    "every filter": built(b"".join(bytes([i % 5]) + bytes(range(i, i + 20)) for i in range(10)), 20, 10),
    "in pieces": built(b"".join(b"\0" + bytes(range(20)) for _ in range(10)), 20, 10, parts=7),
    "more data than pixels": built(b"".join(b"\0" + bytes(range(20)) for _ in range(30)), 20, 10),
    "bytes after the stream": built(b"".join(b"\0" + bytes(range(20)) for _ in range(10)), 20, 10, tail=b"more"),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("other_size", [False, True])
def test_pixels_are_the_plugins(name, other_size, monkeypatch):
    data = PLAIN[name]
    image = read_plain_png(data)
    assert image is not None
    preprocessing = rule(9, 8, 1) if other_size else rule(image.height, image.width, len(image.getbands()))
    pixels = decode_image(data, preprocessing, LIMITS)
    assert np.array_equal(pixels, by_plugin(data, monkeypatch, preprocessing))


def flipped(data, position):
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


GREY = PLAIN["grey"]
OTHER = {
    "a palette": png(Image.fromarray(levels(8, 8)).convert("P")),
    "alpha": png(Image.fromarray(levels(8, 8)).convert("LA")),
    "16 bits": png(levels(8, 8).astype(np.uint16) * 257),
    "one bit": png(Image.fromarray(levels(8, 8) > 127)),
    "a transparent level": png(levels(8, 8), transparency=7),
    "text": GREY[:33] + chunk(b"tEXt", b"a\0b") + GREY[33:],
    "orientation": GREY[:33] + chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0") + GREY[33:],
    "many pixels": png(np.zeros((MAX_PIXELS // 16 + 1, 16), np.uint8)),
    "many chunks": built(np.random.RandomState(0).bytes(21 * 99), 20, 99, parts=70),
    "a JPEG": b"\xff\xd8\xff\xe0",
}
DAMAGED = {
    "a checksum of pixels": flipped(GREY, len(GREY) - 15),
    "a checksum of the header": flipped(GREY, 30),
    "a width": flipped(GREY, 19),
    "cut short": GREY[:-20],
    "no end": GREY[:-12],
    "no pixels": built(b"", 0, 0),
    "no stream": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0))
    + chunk(b"IEND", b""),
}


@pytest.mark.parametrize("data", OTHER.values(), ids=OTHER)
def test_others_are_left_to_the_plugin(data):
    assert read_plain_png(data) is None


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_what_is_damaged_is_refused_in_the_same_words(data, monkeypatch):
    assert read_plain_png(data) is None
    with pytest.raises(InvalidInput):
        decode_image(data, rule(28, 28, 1), LIMITS)
