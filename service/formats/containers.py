"""Check the containers of PNG and JPEG files before a decoder sees them, so that no file can ask for endless work.

Pillow reads chunks and markers one by one in Python, and libjpeg goes over the whole image once for each scan: a file
of a few megabytes with a million empty chunks or scans would occupy a worker for minutes. Pillow also skips the
checksums of a PNG's pixels, but a flipped bit must be refused, not scored. WebP needs no check: libwebp walks its
chunks fast.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

from service.errors import InvalidInput

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 10_000
"""Chunks of one PNG; libpng writes one for each 8 kB of compressed pixels, so that this allows files of 80 MB."""
MAX_SEGMENTS = 10_000
"""Segments of one JPEG; metadata usually come in segments of 64 kB."""
MAX_SCANS = 50
"""Scans of one progressive JPEG; encoders write 10 to 20, and each goes over the whole image."""
MAX_FILL = 10_000
"""Bytes between the segments of a JPEG's header; usual files have none or a few."""
MAX_EXIF = 2**17
"""Bytes of EXIF data; twice what one segment of a JPEG can hold."""
_START, _JPEG_END, _SCAN, _APP1, _TEMPORARY = 0xD8, 0xD9, 0xDA, 0xE1, 0x01
# A marker is 0xFF and a code (ITU-T T.81, B.1.1.2). Stuffed zeros, fill bytes and restart markers are not matched,
# since they occur inside the pixels' data.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def check_container(data: bytes) -> None:
    """Refuse a PNG or JPEG whose structure is damaged or excessive; other bytes pass and are left to the decoder.

    Raises:
        InvalidInput: the file is truncated, has a wrong checksum, or too many chunks, segments, scans or EXIF data.
    """
    if data.startswith(PNG_SIGNATURE):
        _check_png(data)
    elif data.startswith(b"\xff\xd8"):
        _check_jpeg(data)


def _check_png(data: bytes) -> None:
    """Check the length and the checksum of every chunk (PNG specification, section 5)."""
    view, position = memoryview(data), len(PNG_SIGNATURE)
    for _ in range(MAX_CHUNKS):
        end = position + 12 + int.from_bytes(view[position : position + 4], "big")
        if end > len(data) or position + 12 > len(data):
            raise InvalidInput("the PNG image is truncated")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise InvalidInput("the PNG image is damaged: the checksum of a chunk is wrong")
        if view[position + 4 : position + 8] == b"IEND":
            return
        position = end
    raise InvalidInput(f"the PNG image has too many chunks: at most {MAX_CHUNKS} expected")


def _check_jpeg(data: bytes) -> None:
    """Count segments, scans, EXIF data and the bytes between segments, up to the end-of-image marker."""
    fill = scans = exif = 0
    for count, (gap, code, body) in enumerate(_segments(data)):
        if code == _JPEG_END:
            return
        fill += 0 if scans else gap
        scans += code == _SCAN
        exif += len(body) if code == _APP1 and body[:6] == b"Exif\0\0" else 0
        if count > MAX_SEGMENTS or fill > MAX_FILL:
            raise InvalidInput(f"the JPEG image has over {MAX_SEGMENTS} segments, or {MAX_FILL} bytes between them")
        if scans > MAX_SCANS:
            raise InvalidInput(f"the JPEG image has over {MAX_SCANS} scans")
        check_exif(exif)
    raise InvalidInput("the JPEG image is truncated")


def _segments(data: bytes) -> Iterator[tuple[int, int, memoryview]]:
    """Yield each segment as (bytes skipped before it, marker code, body); a scan's pixels count as skipped bytes."""
    view, position = memoryview(data), 2
    while marker := _MARKER.search(data, position):
        code, start = marker[0][1], marker.end()
        has_no_body = code in (_START, _JPEG_END, _TEMPORARY)
        size = 0 if has_no_body else int.from_bytes(view[start : start + 2], "big")
        yield marker.start() - position, code, view[start + 2 : start + size]
        position = start + size


def check_exif(size: int) -> None:
    """Raise InvalidInput for more than MAX_EXIF bytes of EXIF data: Pillow reads every tag in Python."""
    if size > MAX_EXIF:
        raise InvalidInput(f"the image has {size} bytes of EXIF data: at most {MAX_EXIF} expected")
