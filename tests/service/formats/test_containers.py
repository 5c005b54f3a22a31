"""Files that ask for endless work are refused by their structure, honest ones of the same kind are not."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest
from PIL import Image

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput
from service.formats.containers import MAX_CHUNKS, MAX_EXIF, MAX_FILL, MAX_SCANS, MAX_SEGMENTS, check_container
from service.formats.images import ImageLimits, decode_image
from tests import hostile
from tests.hostile import chunk, grey_8x8, pil, saved

RULE = Preprocessing(mode="L", height=8, width=8)
LIMITS = ImageLimits(2**24, 2**24)
JPEG = saved(pil((3, 64, 64)), "JPEG")
EXIF = b"Exif\0\0II*\0\x08\0\0\0\0\0"


def segment(code: int, body: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(body) + 2) + body


def with_segments(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def with_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated until it has that many."""
    data = saved(Image.fromarray(np.zeros((64, 64), np.uint8)), "JPEG", progressive=True)
    last_scan = data[data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda")) : -2]
    return data[:-2] + last_scan * (scans - data.count(b"\xff\xda")) + data[-2:]


def exif_of(size: int) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0\0\0" + bytes(size - 16)


HONEST = {
    "png": saved(pil((3, 64, 64)), "PNG"),
    "png, many chunks": grey_8x8(*[chunk(b"tEXt", b"a\0b")] * (MAX_CHUNKS - 3)),
    "png, bytes after the end": grey_8x8() + b"\xff" * 100,
    "jpeg": JPEG,
    "jpeg, many comments": with_segments(*[segment(0xFE, b"a")] * 9000),
    "jpeg, a marker inside a comment": with_segments(segment(0xFE, b"\xff\xda\xff\xd9" * 1000)),
    "jpeg, fill bytes": with_segments(b"\xff" * 100),
    "jpeg, restart markers": saved(pil((3, 64, 64)), "JPEG", restart_marker_blocks=1),
    "jpeg, bytes after the end": JPEG + b"\xff\xda" * 1000,
    "jpeg, progressive": saved(pil((3, 64, 64)), "JPEG", progressive=True),
    "jpeg, most scans": with_scans(MAX_SCANS),
    "jpeg, EXIF of 64 kB": with_segments(segment(0xE1, exif_of(65_533))),
    "webp": saved(pil((3, 64, 64)), "WEBP"),
}
ABSURD = {
    "png, too many chunks": grey_8x8(*[chunk(b"tEXt", b"a\0b")] * (MAX_CHUNKS - 2)),
    "png, too much EXIF": grey_8x8(chunk(b"eXIf", bytes(MAX_EXIF + 1))),
    "png, cut after its data": grey_8x8()[:-12],
    "png, a cut chunk": grey_8x8()[:-1],
    "jpeg, too many scans": with_scans(MAX_SCANS + 1),
    "jpeg, too many segments": with_segments(*[segment(0xFE, b"")] * MAX_SEGMENTS),
    "jpeg, too much fill": with_segments(b"\xff" * (MAX_FILL + 1)),
    "jpeg, junk between segments": with_segments(bytes(MAX_FILL + 1)),
    "jpeg, restart markers as fill": with_segments(b"\xff\xd0" * MAX_FILL),
    "jpeg, EXIF in many segments": with_segments(*[segment(0xE1, exif_of(65_533))] * 3),
    "jpeg, without its end": JPEG[:-2],
    "jpeg, scans hidden behind a comment": with_scans(300)[:-2].replace(
        b"\xff\xc4", segment(0xFE, b"\xff\xd9") + b"\xff\xc4"
    )
    + b"\xff\xd9",
    "webp, too much EXIF": saved(pil((3, 64, 64)), "WEBP", exif=EXIF + bytes(MAX_EXIF)),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_files_are_decoded(name):
    assert decode_image(HONEST[name], RULE, LIMITS).shape == (1, 8, 8)


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_files_are_refused(name):
    with pytest.raises(InvalidInput):
        decode_image(ABSURD[name], RULE, LIMITS)


@pytest.mark.parametrize(
    "byte", [b"\0", b"\xff", b"\xff\xfe\0\2", b"\xff\xd8", b"\xff\x01", b"\xff\0", b"\xff\xda\0\2"]
)
@pytest.mark.parametrize("head", [hostile.SIGNATURE, b"\xff\xd8", hostile.SIGNATURE + chunk(b"IDAT", b"")])
def test_16_megabytes_of_one_thing_are_judged_at_once(head, byte):
    """Pillow alone takes up to 10 s for these."""
    data = head + byte * (2**24 // len(byte))
    start = time.process_time()
    with pytest.raises(InvalidInput):
        check_container(data)
    assert time.process_time() - start < 0.5


def test_other_bytes_are_left_to_the_decoder():
    check_container(b"")
    check_container(b"RIFF\0\0\0\0WEBP")
