"""PNG and JPEG containers, walked before a decoder sees them: nobody's file may ask for endless work.

Pillow reads chunks and markers one by one in Python, and libjpeg goes over the whole image once a scan: a file of a few
megabytes with a million empty chunks or scans would hold a worker for minutes. Pillow also skips the checksums of a
PNG's pixels; a flipped bit must be refused, not scored. WebP is walked by libwebp itself, in no time.
"""

from __future__ import annotations

import re
import zlib

from service.errors import InvalidInput

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 10_000
"""Chunks of one PNG; libpng writes one for each 8 kB of pixels, so this is 80 MB of honest file."""
MAX_SEGMENTS = 10_000
"""Segments of one JPEG; honest metadata comes in pieces of 64 kB."""
MAX_SCANS = 100
"""Scans of one progressive JPEG; encoders write 10 to 20."""
MAX_FILL = 10_000
"""Bytes between the segments of a JPEG's header; honest ones have none or a few."""
_START, _JPEG_END, _SCAN, _TEMPORARY = 0xD8, 0xD9, 0xDA, 0x01
# 0xFF and a code; not a stuffed zero, a fill byte or a restart marker, which all stand inside the pixels' data.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def check_container(data: bytes) -> None:
    """Refuse a PNG or JPEG whose structure is damaged or absurd; other bytes pass, a decoder will judge them.

    Raises:
        InvalidInput: truncated, a wrong checksum, or too many chunks, segments or scans.
    """
    if data.startswith(PNG_SIGNATURE):
        _check_png(data)
    elif data.startswith(b"\xff\xd8"):
        _check_jpeg(data)


def _check_png(data: bytes) -> None:
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
    position, fill, scans = 2, 0, 0
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(data, position)
        if marker is None:
            raise InvalidInput("the JPEG image is truncated")
        if not scans:
            fill += marker.start() - position
        code, position = marker[0][1], marker.end()
        if code == _JPEG_END:
            return
        scans += code == _SCAN
        if scans > MAX_SCANS or fill > MAX_FILL:
            raise InvalidInput(f"the JPEG image has over {MAX_SCANS} scans, or too many bytes between its segments")
        if code not in (_START, _TEMPORARY):
            position += int.from_bytes(data[position : position + 2], "big")
    raise InvalidInput(f"the JPEG image has too many segments: at most {MAX_SEGMENTS} expected")
