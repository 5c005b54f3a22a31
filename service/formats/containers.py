"""Tell files by their first bytes, and check PNG and JPEG before a decoder sees them: none can ask for endless work.

Pillow reads chunks and markers one by one in Python, and libjpeg goes over the whole image once for each scan: a file
of a few megabytes with a million empty chunks or scans would occupy a worker for minutes. Pillow also skips the
checksums of a PNG's pixels, but a flipped bit must be refused, not scored. WebP needs no check: libwebp walks its
chunks fast.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator

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
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START, _JPEG_END, _SCAN, _APP1, _TEMPORARY = 0xD8, 0xD9, 0xDA, 0xE1, 0x01
# A marker is 0xFF and a code (ITU-T T.81, B.1.1.2). Stuffed zeros, fill bytes and restart markers are not matched,
# since they occur inside the pixels' data.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def describe_file(data: bytes) -> str:
    """Say which file bytes are and what to do with it, as "a PNG image: send it as image/png"; "" for other bytes.

    A signature alone is not enough, since pixels may begin alike (FF D8 FF is three of them): a header must follow.
    """
    for signature, has_header, description in _FILES:
        if data.startswith(signature) and has_header(data):
            return description
    return ""


def advise(data: bytes) -> str:
    """Return what ``describe_file`` says, as the end of a sentence about the bytes; "" if it says nothing."""
    description = describe_file(data)
    return f"; it is {description}" if description else ""


def _has_png_header(data: bytes) -> bool:
    """True if the first chunk is IHDR, undamaged (PNG specification, 11.2.1)."""
    return data[8:16] == b"\0\0\0\rIHDR" and zlib.crc32(data[12:29]) == int.from_bytes(data[29:33], "big")


def _has_jpeg_header(data: bytes) -> bool:
    """True if segments lead to a frame header that states a size (ITU-T T.81, B.2.2)."""
    for count, (gap, code, body) in enumerate(_segments(data)):
        if code in _FRAMES:
            return len(body) >= 6 and len(body) == 6 + 3 * body[5] and body[3:5] != b"\0\0"
        if gap > MAX_FILL or code in (_START, _JPEG_END, _SCAN) or count > MAX_SEGMENTS:
            return False
    return False


def _has_npy_header(data: bytes) -> bool:
    """True if a version and a dictionary with a dtype follow (numpy.lib.format)."""
    return data[6:8] in (b"\1\0", b"\2\0", b"\3\0") and b"descr" in data[10:1024]


def _has_bmp_header(data: bytes) -> bool:
    """True if the pixels are said to lie in the file, behind a header of a known size."""
    if len(data) < 18:
        return False
    offset, size = struct.unpack_from("<II", data, 10)
    return size in (12, 40, 52, 56, 64, 108, 124) and 14 + size <= offset < len(data)


def _has_tiff_header(data: bytes) -> bool:
    """True if the first directory is said to lie in the file (TIFF 6.0, section 2)."""
    return 8 <= int.from_bytes(data[4:8], "little" if data[:1] == b"I" else "big") < len(data)


_HEIF_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_CONVERT = "which is not read: convert it to PNG, JPEG, WebP or npy"
_FILES: tuple[tuple[bytes, Callable[[bytes], bool], str], ...] = (
    (PNG_SIGNATURE, _has_png_header, "a PNG image: send it as image/png"),
    (b"\xff\xd8\xff", _has_jpeg_header, "a JPEG image: send it as image/jpeg"),
    (b"RIFF", lambda data: data[8:15] == b"WEBPVP8", "a WebP image: send it as image/webp"),
    (b"\x93NUMPY", _has_npy_header, "an npy array: send it as application/x-npy"),
    (b"GIF8", lambda data: data[4:6] in (b"7a", b"9a") and len(data) > 13, f"a GIF image, {_CONVERT}"),
    (b"BM", _has_bmp_header, f"a BMP image, {_CONVERT}"),
    (b"II*\0", _has_tiff_header, f"a TIFF image, {_CONVERT}"),
    (b"MM\0*", _has_tiff_header, f"a TIFF image, {_CONVERT}"),
    (b"\0\0\0", lambda data: data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS, f"a HEIC or AVIF image, {_CONVERT}"),
    (b"PK\3\4", lambda data: data[-22:-18] == b"PK\5\6", "a zip archive or npz file: send one array of it as npy"),
)
"""Signature, a check of the header behind it, and the description of a file."""


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
