"""Bodies under a type that does not fit: files are never scored as raw pixels, and pixels never taken for a file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput, UnsupportedMediaType
from service.formats.arrays import parse_json
from service.formats.codecs import Limits, Reader
from service.formats.containers import describe_file
from service.formats.images import ImageLimits
from tests.hostile import JPEG, JSON, NPY, OCTETS, PNG, levels, npy, pil, saved

CASES = Path(__file__).parent / "cases"
LIMITS = Limits(1024, ImageLimits(2**24, 2**24), 2**27, 2**26)
ANY_LENGTH = Preprocessing(mode="L", height=1, width=1)
COLOUR = pil((3, 17, 23))
EXIF = Image.Exif()
EXIF[0x0112] = 6


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros(3))
    return buffer.getvalue()


FILES = {
    "PNG": (saved(COLOUR, "PNG"), "a PNG image: send it as image/png"),
    "PNG of a palette": (saved(COLOUR.quantize(9), "PNG"), "image/png"),
    "PNG, cut": (saved(COLOUR, "PNG")[:40], "image/png"),
    "JPEG": (saved(COLOUR, "JPEG"), "a JPEG image: send it as image/jpeg"),
    "JPEG with EXIF": (saved(COLOUR, "JPEG", exif=EXIF), "image/jpeg"),
    "progressive JPEG": (saved(COLOUR, "JPEG", progressive=True), "image/jpeg"),
    "grey JPEG": (saved(COLOUR.convert("L"), "JPEG"), "image/jpeg"),
    "CMYK JPEG": (saved(COLOUR.convert("CMYK"), "JPEG"), "image/jpeg"),
    "MPO": (saved(COLOUR, "MPO", save_all=True, append_images=[COLOUR]), "image/jpeg"),
    "WebP": (saved(COLOUR, "WEBP"), "a WebP image: send it as image/webp"),
    "lossless WebP": (saved(COLOUR, "WEBP", lossless=True), "image/webp"),
    "animated WebP": (saved(COLOUR, "WEBP", save_all=True, append_images=[COLOUR.rotate(90)]), "image/webp"),
    "npy": (npy(np.zeros((2, 3), np.float32)), "an npy array: send it as application/x-npy"),
    "npy of objects": (npy(np.array([None])), "application/x-npy"),
    "npz": (npz(), "send one array of it as npy"),
    "GIF": (saved(COLOUR, "GIF"), "a GIF image, which is not read: convert it"),
    "BMP": (saved(COLOUR, "BMP"), "a BMP image, which is not read: convert it"),
    "TIFF": (saved(COLOUR, "TIFF"), "a TIFF image, which is not read: convert it"),
    "big-endian TIFF": (b"MM\0*\0\0\0\x08\0\1\1\0\0\4\0\0\0\1\0\0\0\1\0\0\0\0", "a TIFF image"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "a HEIC or AVIF image"),
}


def read_octets(body: bytes, shape: tuple[int, int, int] = (1, 1, 1)) -> np.ndarray:
    rule = Preprocessing(mode="L" if shape[0] == 1 else "RGB", height=shape[1], width=shape[2])
    return Reader(rule, Limits(2**20, LIMITS.image, 2**27, 2**26)).read_levels(OCTETS, body, dict)


@pytest.mark.parametrize("name", FILES)
def test_a_file_as_octets_is_refused_and_named(name):
    body, advice = FILES[name]
    with pytest.raises(UnsupportedMediaType, match="raw pixels, but the body is .*" + advice):
        read_octets(body)


def test_a_png_of_the_right_length_is_no_pixels():
    with pytest.raises(UnsupportedMediaType, match="send it as image/png"):
        read_octets((CASES / "png784.png").read_bytes(), (1, 28, 28))


SIGNATURES = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"BM", b"GIF8", b"GIF89", b"II*\0", b"MM\0*", b"PK\3\4"]
SIGNATURES += [
    b"\x93NUMPY",
    b"\0\0\0\x18ftyp",
    b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    b"\xff\xd8\xff\xe1",
    b"\xff\xd8\xff\xc0",
]


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("rest", [b"\0", b"\xff", b"\x7f\x80\x81", None])
def test_pixels_that_begin_as_a_file_does_are_pixels(signature, rest):
    """784 of them: no header follows."""
    noise = levels((1, 28, 28)).tobytes()
    body = (signature + (noise if rest is None else rest * 784))[:784]
    assert read_octets(body, (1, 28, 28)).tobytes() == body
    assert describe_file(body) == ""


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 12, 20, 30])
@pytest.mark.parametrize("name", FILES)
def test_the_beginning_of_a_file_raises_nothing(name, length):
    assert isinstance(describe_file(FILES[name][0][:length]), str)


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        (PNG, "npy", "PNG, JPEG or WebP file was expected; it is an npy array: send it as application/x-npy"),
        (JPEG, "GIF", "PNG, JPEG or WebP file was expected; it is a GIF image, which is not read: convert it"),
        (JPEG, "HEIC", "it is a HEIC or AVIF image"),
        (NPY, "PNG", "no npy file: it does not begin as one; it is a PNG image: send it as image/png"),
        (NPY, "npz", "no npy file: .*; it is a zip archive or npz file: send one array of it as npy"),
        (JSON, "JPEG", "the body is no JSON: .*; it is a JPEG image: send it as image/jpeg"),
    ],
)
def test_a_file_under_another_type_is_named(kind, name, expected):
    body = FILES[name][0]
    with pytest.raises(InvalidInput, match=expected):
        Reader(ANY_LENGTH, LIMITS).read(kind, body, lambda: parse_json(body))
