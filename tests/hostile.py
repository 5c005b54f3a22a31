"""Hostile bodies that every server must refuse, and odd ones that it must answer. Built here, byte by byte.

``payloads`` and ``odd_but_good`` fit one model: its image shape (C, H, W), C 1 or 3, H and W from 4 up, and latent_dim.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Iterable
from itertools import cycle
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from PIL import Image

NPY, JSON, OCTETS, FORM = "application/x-npy", "application/json", "application/octet-stream", "multipart/form-data"
PNG, JPEG, WEBP = "image/png", "image/jpeg", "image/webp"
X_FORM = f"{FORM}; boundary=x"
Shape = tuple[int, int, int]
Body = tuple[str, str, bytes]
"""(name, Content-Type, body)"""


class Payload(NamedTuple):
    """One request body for ``verb``."""

    name: str
    verb: str
    content_type: str
    body: bytes


def payloads(shape: Shape, latent_dim: int) -> list[Payload]:
    """Bodies that must be refused (4xx), each by the verb it names."""
    images = [
        *content_types(shape),
        *npy_headers(shape),
        *npy_values(shape),
        *json_documents(shape),
        *json_values(shape),
        *json_files(),
        *png_headers(),
        *png_bombs(),
        *png_damage(shape),
        *other_pictures(shape),
        *octets(shape),
        *form_framing(shape),
        *form_parts(shape),
    ]
    found = _spread(images, ["encode", "score", "reconstruct"])
    found += _spread([body for index, body in enumerate(images) if index % 3 == 0], ["interpolate"])
    found += _spread(latents(latent_dim), ["decode"])
    return found + _spread(pairs(shape, latent_dim), ["interpolate"])


def odd_but_good(shape: Shape) -> list[Payload]:
    """Bodies of one to three images that must be answered (200) by encode, score and reconstruct."""
    return _spread([*odd_pictures(shape), *odd_arrays(shape), *odd_framing(shape)], ["encode", "score", "reconstruct"])


def _spread(bodies: Iterable[Body], verbs: list[str]) -> list[Payload]:
    return [Payload(name, verb, kind, body) for verb, (name, kind, body) in zip(cycle(verbs), bodies, strict=False)]


# Building blocks


def levels(shape: Shape, seed: int = 0) -> np.ndarray:
    """Noise, uint8 [C,H,W]: it does not compress, so that a cut file lacks pixels."""
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def unit(shape: Shape) -> np.ndarray:
    """One image, float32 [1,C,H,W] in [0,1]."""
    return (levels(shape)[None] / 255).astype(np.float32)


def pil(shape: Shape) -> Image.Image:
    """``levels`` as a Pillow image, L or RGB."""
    pixels = levels(shape)
    return Image.fromarray(pixels[0] if shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """A Pillow image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    """An array as numpy saves it; objects are pickled."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_raw(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """An npy file with any header text and data; a header beyond 64 kB takes version 2.0."""
    text = header.encode("latin-1") + b"\n"
    if version == (1, 0) and len(text) > 65_535:
        version = (2, 0)
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + data


def npy_of(descr: str, shape: str, data: bytes = b"", fortran: bool = False) -> bytes:
    """An npy file whose header claims ``descr`` and ``shape``."""
    return npy_raw(f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape}, }}", data)


def chunk(kind: bytes, body: bytes, damage: int = 0) -> bytes:
    """A PNG chunk; ``damage`` is mixed into its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ damage)


def header(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """A PNG's IHDR chunk."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


SIGNATURE, END = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")


def png(*chunks: bytes) -> bytes:
    """A PNG file of these chunks."""
    return SIGNATURE + b"".join(chunks)


def grey_8x8(*before: bytes) -> bytes:
    """A sound 8×8 grey PNG with chunks before its data."""
    return png(header(8, 8), *before, chunk(b"IDAT", zlib.compress(b"\0" * 72)), END)


def part(body: bytes, disposition: str = 'form-data; name="images"; filename="a.png"', extra: bytes = b"") -> bytes:
    """One part of a form with boundary x."""
    return b"--x\r\nContent-Disposition: " + disposition.encode() + b"\r\n" + extra + b"\r\n" + body + b"\r\n"


def document(value: Any) -> bytes:
    """JSON text; NaN and infinities as Python writes them."""
    return json.dumps(value).encode()


# Refused whatever the bundle


def content_types(shape: Shape) -> list[Body]:
    """A sound picture under types that name none of the formats."""
    types = ["", "text/plain", "image/*", "*/*", "png", ";image/png", "image/pngx", "image/png, image/png", "image png"]
    types += ["image/gif", "image/tiff", "image/bmp", "image/svg+xml", "application/pdf", "application/x-npz"]
    types += ["application/x-python-pickle", "multipart/mixed; boundary=x", "application/x-www-form-urlencoded"]
    types += ["application/json+x", "a" * 5000, "/", '"image/png"', "image/png/", "application/x-npy:image/png"]
    return [(f"Content-Type {kind[:30]!r}", kind, saved(pil(shape), "PNG")) for kind in types]


def npy_headers(shape: Shape) -> list[Body]:
    """npy files whose header lies, bombs or is code."""
    c, h, w = shape
    size = c * h * w
    pixels = b"\0" * size
    sound = f"(1, {c}, {h}, {w})"
    spoiled = {
        "claims 10^12 floats": npy_of("<f4", "(1000000, 1000000)"),
        "claims 2^63 rows": npy_of("|u1", f"({2**63}, {c}, {h}, {w})", pixels),
        "claims 2^64 by overflow": npy_of("|u1", f"({2**32}, {2**32}, {h}, {w})", pixels),
        "claims a 3000-digit side": npy_of("|u1", f"({'9' * 3000}, {c}, {h}, {w})", pixels),
        "negative side": npy_of("|u1", f"(-1, {c}, {h}, {w})", pixels),
        "two negative sides": npy_of("|u1", f"(-1, -{c}, {h}, {w})", pixels),
        "all sides 0": npy_of("|u1", "(0, 0, 0, 0)"),
        "10^5 dimensions": npy_of("|u1", "(" + "1," * 100_000 + ")", b"\0"),
        "500 dimensions": npy_of("|u1", "(" + "1," * 500 + ")", b"\0"),
        "33 dimensions": npy_of("|u1", "(" + "1," * 33 + ")", b"\0"),
        "too few bytes": npy_of("|u1", sound, pixels[:-1]),
        "too many bytes": npy_of("|u1", sound, pixels + b"\0"),
        "Fortran order, too few bytes": npy_of("<f4", sound, pixels, True),
        "fortran_order is text": npy_raw(f"{{'descr': '|u1', 'fortran_order': 'no', 'shape': {sound}}}", pixels),
        "sides are fractions": npy_of("|u1", f"(1.0, {c}, {h}, {w})", pixels),
        "sides are bools": npy_of("|u1", f"(True, {c}, {h}, None)", pixels),
        "two numbers are one side": npy_of("|u1", f"(1 2, {h}, {w})", pixels),
        "shape is a list": npy_of("|u1", f"[1, {c}, {h}, {w}]", pixels),
        "shape is a number": npy_of("|u1", str(size), pixels),
        "no descr": npy_raw(f"{{'fortran_order': False, 'shape': {sound}}}", pixels),
        "extra key": npy_raw(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {sound}, 'x': 1}}", pixels),
        "header is a call": npy_raw("__import__('os').system('true')", pixels),
        "header is a list": npy_raw("[1, 2, 3]", pixels),
        "header is 10,000 parentheses": npy_raw("(" * 10_000),
        "header is a long sum": npy_raw("+".join("1" * 20_000)),
        "header is unary minuses": npy_raw("-" * 20_000 + "1"),
        "header of 60 kB of blanks": npy_raw(
            f"{{'descr': '|u1', 'fortran_order': False, 'shape': {sound}}}" + " " * 60_000
        ),
        "header is empty": npy_raw(""),
        "header is NUL": npy_raw("\0" * 100, pixels),
        "header longer than the file": b"\x93NUMPY\x01\x00\xff\xffabc",
        "4 GB header, version 2": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr'",
        "version 3.0": npy_raw(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {sound}}}", pixels, (3, 0)),
        "version 9.9": npy_raw("{}", pixels, (9, 9)),
        "version 0.0": npy_raw("{}", pixels, (0, 0)),
        "magic only": b"\x93NUMPY",
        "one byte": b"\x93",
        "noise": bytes(range(256)),
        "npz": _npz(shape),
        "gzip of npy": gzip.compress(npy(unit(shape)), mtime=0),
        "pickle": b"\x80\x04\x95\x0a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os.",
        "empty": b"",
    }
    return [(f"npy: {name}", NPY, body) for name, body in spoiled.items()]


def _npz(shape: Shape) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=unit(shape))
    return buffer.getvalue()


def npy_values(shape: Shape) -> list[Body]:
    """Sound npy files of other types, ranks and ranges than pixels have."""
    c, h, w = shape
    x = unit(shape)
    descriptions = ["|O", "<U4", "|S4", "<c8", "<M8[s]", "<m8[s]", "|V4", "<i8", "|i1", "|b1", "<u2", "<f16", "<u8"]
    bodies = {f"dtype {d}": npy_of(d, f"(1, {c}, {h}, {w})", b"\0" * (c * h * w * 16)) for d in descriptions}
    bodies |= {
        "object array, pickled": npy(np.array([[{"a": 1}]], dtype=object)),
        "structured": npy(np.zeros((c, h, w), [("a", "<f4"), ("b", "u1")])),
        "nested structure": npy(np.zeros(3, [("a", [("b", "<f4", (h, w))])])),
        "subarray dtype": npy_raw(
            f"{{'descr': ('|u1', ({h}, {w})), 'fortran_order': False, 'shape': ({c},)}}", b"\0" * 64
        ),
        "scalar": npy(np.array(0.5, np.float32)),
        "no images": npy(x[:0]),
        "no rows": npy(x[:, :, :0]),
        "1 dimension": npy(x.ravel()),
        "5 dimensions": npy(x[None]),
        "2 channels": npy(np.zeros((1, 2, h, w), np.float32)),
        "4 channels": npy(np.zeros((1, 4, h, w), np.float32)),
        "2000 images": npy(np.zeros((2000, c, 1, 1), np.uint8)),
        "absurd aspect": npy(np.zeros((1, c, 1, 200_000), np.uint8)),
        "above 1": npy(x + 1),
        "0 to 255 as floats": npy(x * 255),
        "just above 1": npy(np.full_like(x, np.nextafter(np.float32(1), np.float32(2)))),
        "float64 just above 1": npy(np.full(x.shape, np.nextafter(1, 2))),
        "below 0": npy(x - 1.5),
        "tiny negative": npy(np.full_like(x, -1e-45)),
    }
    for name, value in {"NaN": np.nan, "infinity": np.inf, "-infinity": -np.inf}.items():
        for dtype in (np.float16, np.float32, np.float64):
            spoiled = x.astype(dtype)
            spoiled[0, -1, -1, -1] = value
            bodies[f"one {name}, {np.dtype(dtype)}"] = npy(spoiled)
    return [(f"npy: {name}", NPY, body) for name, body in bodies.items()]


def json_documents(shape: Shape) -> list[Body]:
    """Texts that are no JSON, or no object with images."""
    good = document({"images": unit(shape).tolist()})
    texts = {
        "empty": b"",
        "blanks": b" \r\n\t ",
        "BOM": b"\xef\xbb\xbf" + good,
        "UTF-16": good.decode().encode("utf-16"),
        "NUL after": good + b"\0",
        "two documents": good + good,
        "text": b"hello",
        "single quotes": b"{'images': [[0]]}",
        "trailing comma": b'{"images": [[0],]}',
        "comment": b'{"images": [[0]]} // images',
        "not UTF-8": b'{"images": "\xff\xfe"}',
        "lone surrogate": b'{"images": "\\ud800"}',
        "control character": b'{"images": "\x01"}',
        "250,000 deep": b"[" * 250_000 + b"]" * 250_000,
        "250,000 deep in images": b'{"images":' + b"[" * 250_000 + b"]" * 250_000 + b"}",
        "250,000 objects deep": b'{"images":' * 250_000 + b"0" + b"}" * 250_000,
        "never closed": b'{"images":' + b"[" * 250_000,
        "null": b"null",
        "number": b"7",
        "string": b'"images"',
        "true": b"true",
        "list": b"[[0, 0], [0, 0]]",
        "empty object": b"{}",
        "key in capitals": good.replace(b"images", b"IMAGES"),
        "key misspelt": good.replace(b"images", b"image"),
        "gzip": gzip.compress(good, mtime=0),
    }
    cuts = {f"cut to {share}%": good[: len(good) * share // 100] for share in (1, 10, 50, 90, 99)}
    return [(f"json: {name}", JSON, text) for name, text in {**texts, **cuts}.items()]


def json_values(shape: Shape) -> list[Body]:
    """JSON whose images are no pixels."""
    good = unit(shape).tolist()

    def spoil(text: bytes) -> bytes:
        """The good document with its last pixel replaced by ``text``."""
        start, _, _ = document({"images": good}).rpartition(b", ")
        return start + b", " + text + b"]]]]}"

    bodies = {f"a pixel is {token[:12].decode()}": spoil(token) for token in _no_pixels()}
    bodies |= {f"images are {name}": document({"images": value}) for name, value in _no_images(shape).items()}
    for index, (dtype, images) in enumerate(_lies(shape)):
        bodies[f"dtype {dtype} is a lie ({index})"] = document({"images": images, "dtype": dtype})
    return [(f"json: {name}", JSON, body) for name, body in bodies.items()]


def _no_pixels() -> list[bytes]:
    """What may stand in a pixel's place, JSON or not."""
    return [
        *(b"NaN", b"Infinity", b"-Infinity", b"nan", b"1e400", b"-1e400", b"1e39", b"9" * 400, b"-" + b"9" * 400),
        b"null",
        b"true",
        b'"0.5"',
        b'""',
        b"[0]",
        b"[]",
        b"{}",
        b"1.5",
        b"-0.5",
        b"0x1",
        b"01",
        b".5",
        b"+1",
        b"1_0",
    ]


def _no_images(shape: Shape) -> dict[str, Any]:
    """Values that are no list of images of one shape."""
    c, h, w = shape
    good = unit(shape).tolist()
    return {
        "null": None,
        "number": 1,
        "true": True,
        "object": {"a": 1},
        "empty list": [],
        "empty lists": [[[]]],
        "list of numbers": [0.1, 0.2, 0.3],
        "list of nulls": [None, None],
        "list of objects": [{}, {}],
        "all true": np.ones((c, h, w), bool).tolist(),
        "5 deep": [[good]],
        "70 deep": json.loads("[" * 70 + "0" + "]" * 70),
        "ragged rows": [[[0.0] * w] * (h - 1) + [[0.0] * (w - 1)]] * c,
        "ragged ranks": [good[0], 0.5],
        "long text among numbers": [["a" * 200_000] + [0] * 1000] * 3,
        "numbers among files": [good[0], "aGVsbG8="],
    }


def _lies(shape: Shape) -> list[tuple[Any, Any]]:
    """A dtype, and images that are of another."""
    c, h, w = shape
    good = unit(shape).tolist()
    whole = (levels(shape)[None]).tolist()
    return [
        ("uint8", good),
        ("float32", whole),
        ("float16", good),
        ("object", good),
        (None, good),
        (8, good),
        ([], good),
        ("uint8", [[[[256] * w] * h] * c]),
        ("uint8", [[[[-1] * w] * h] * c]),
        ("uint8", [[[[2**63] * w] * h] * c]),
    ]


def json_files() -> list[Body]:
    """JSON with base64 that is none, or that hides a bomb."""
    bomb = png(header(60_000, 60_000), chunk(b"IDAT", zlib.compress(bytes(1000))), END)
    texts = {
        "empty": "",
        "no base64": "%%%",
        "bad padding": "aGVsbG8",
        "padding inside": "aGVs=bG8=",
        "line breaks alone": "\n" * 80,
        "URL alphabet": "-_-_",
        "not ASCII": "é" * 8,
        "text": base64.b64encode(b"hello").decode(),
        "path": "/etc/passwd",
        "file URL": "file:///etc/passwd",
        "web address": "http://127.0.0.1/",
        "data URL without data": "data:image/png;base64",
        "data URL of text": "data:text/plain;base64,aGVsbG8=",
        "data URL, percent coding": "data:image/png,%89PNG",
        "PNG bomb": base64.b64encode(bomb).decode(),
        "npy bomb": base64.b64encode(npy_of("<f4", "(1000000, 1000000)")).decode(),
        "npy of objects": base64.b64encode(npy(np.array([None]))).decode(),
        "base64 twice": base64.b64encode(base64.b64encode(grey_8x8())).decode(),
        "half a PNG": base64.b64encode(grey_8x8()[:40]).decode(),
    }
    bodies = {name: document({"images": [text]}) for name, text in texts.items()}
    good = base64.b64encode(grey_8x8()).decode()
    bodies["second one bad"] = document({"images": [good, "aGVsbG8="]})
    bodies["2000 files"] = document({"images": [good] * 2000})
    bodies["in a nested list"] = document({"images": [[good]]})
    return [(f"base64: {name}", JSON, body) for name, body in bodies.items()]


def png_headers() -> list[Body]:
    """PNG files whose first chunk lies."""
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    sizes = [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (1, 2**31 - 1), (0, 0), (0, 8), (8, 0)]
    sizes += [(20_000_000, 1), (1, 20_000_000), (5000, 5000)]
    bodies = {f"claims {w} × {h}": png(header(w, h), data, END) for w, h in sizes}
    bodies |= {
        "1 × 100,000 strip": png(header(1, 100_000), chunk(b"IDAT", zlib.compress(bytes(200_000))), END),
        "depth 3": png(header(8, 8, 3), data, END),
        "colour type 5": png(header(8, 8, 8, 5), data, END),
        "no IHDR": png(data, END),
        "no IDAT": png(header(8, 8), END),
        "palette missing": png(header(8, 8, 8, 3), chunk(b"IDAT", zlib.compress(bytes(72))), END),
        "IHDR too short": png(chunk(b"IHDR", b"\0\0\0\x08"), data, END),
        "IHDR of 2 GB": SIGNATURE + struct.pack(">I", 2**31 - 1) + b"IHDR" + bytes(13),
        "IHDR of 4 GB": SIGNATURE + struct.pack(">I", 2**32 - 1) + b"IHDR" + bytes(13),
        "signature only": SIGNATURE,
        "signature in text mode": grey_8x8().replace(b"\r\n", b"\n"),
    }
    return [(f"png: {name}", PNG, body) for name, body in bodies.items()]


def png_bombs() -> list[Body]:
    """Small files that unpack to much, or ask for endless work."""
    zeros = zlib.compress(bytes(40_000_000), 9)
    tiny = chunk(b"IDAT", zlib.compress(bytes(72)))
    bodies = {
        "zTXt of 40 MB": grey_8x8(chunk(b"zTXt", b"a\0\0" + zeros)),
        "iTXt of 40 MB": grey_8x8(chunk(b"iTXt", b"a\0\x01\0\0\0" + zeros)),
        "iCCP of 40 MB": grey_8x8(chunk(b"iCCP", b"a\0\0" + zeros)),
        "IDAT of 40 MB under 30,000 × 30,000": png(header(30_000, 30_000, 1), chunk(b"IDAT", zeros), END),
        "20,000 empty chunks": grey_8x8(chunk(b"teSt", b"") * 20_000),
        "20,000 empty IDATs": png(header(8, 8), chunk(b"IDAT", b"") * 20_000, tiny, END),
        "20,000 text chunks": grey_8x8(chunk(b"tEXt", b"a\0b") * 20_000),
    }
    return [(f"png: {name}", PNG, body) for name, body in bodies.items()]


def png_damage(shape: Shape) -> list[Body]:
    """Sound PNG files, cut and damaged."""
    good = saved(pil(shape), "PNG", compress_level=0)
    cuts = {f"cut to {share}%": good[: len(good) * share // 100] for share in (3, 10, 20, 30, 40, 50, 60, 70)}
    pixels = zlib.compress(bytes(72))
    palette, idat = header(8, 8, 8, 3), chunk(b"IDAT", zlib.compress(bytes([0, *range(8)]) * 8))
    bodies = {
        **cuts,
        "wrong IHDR checksum": png(chunk(b"IHDR", header(8, 8)[8:21], damage=1), chunk(b"IDAT", pixels), END),
        "wrong IDAT checksum": png(header(8, 8), chunk(b"IDAT", pixels, damage=1), END),
        "wrong tEXt checksum": grey_8x8(chunk(b"tEXt", b"a\0b", damage=1)),
        "more transparencies than colours": png(
            palette, chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(300)), idat, END
        ),
        "transparency of another header": png(
            palette, chunk(b"tRNS", b"\0\5\6"), header(8, 8, 1), chunk(b"IDAT", zlib.compress(bytes(16))), END
        ),
        "IDAT is no zlib": png(header(8, 8), chunk(b"IDAT", b"hello, I am text"), END),
        "IDAT too short": png(header(8, 8), chunk(b"IDAT", zlib.compress(bytes(20))), END),
        "rows are missing": png(header(8, 8), chunk(b"IDAT", zlib.compress(bytes(63))), END),
        "rows of an interlaced one are missing": png(
            chunk(b"IHDR", header(8, 8)[8:20] + b"\1"), chunk(b"IDAT", zlib.compress(bytes(70))), END
        ),
        "bad filter": png(header(8, 8), chunk(b"IDAT", zlib.compress(b"\x09" * 72)), END),
        "text named png": b"I am a picture" * 10,
        "empty": b"",
        "GIF before": b"GIF89a" + good,
        "PDF before": b"%PDF-1.7\n" + good,
        "HTML": b"<html><script>alert(1)</script></html>",
        "twice the signature": SIGNATURE + good,
        "signature, then JPEG": SIGNATURE + saved(pil(shape), "JPEG"),
    }
    return [(f"png: {name}", PNG, body) for name, body in bodies.items()]


def other_pictures(shape: Shape) -> list[Body]:
    """Formats that are not read, and damaged JPEG and WebP."""
    image = pil(shape)
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><image href="file:///etc/passwd"/></svg>'
    found: list[Body] = [
        (f"{form} named png", PNG, saved(image, form)) for form in ("GIF", "TIFF", "BMP", "PPM", "ICO")
    ]
    found += [("SVG named png", PNG, svg), ("EPS named png", PNG, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")]
    found += [("ZIP named jpeg", JPEG, _npz(shape)), ("PDF named webp", WEBP, b"%PDF-1.7")]
    jpeg, webp = saved(image.resize((64, 64)), "JPEG", quality=95), saved(image.resize((64, 64)), "WEBP", lossless=True)
    for share in (5, 25, 50, 75):
        found.append((f"jpeg: cut to {share}%", JPEG, jpeg[: len(jpeg) * share // 100]))
        found.append((f"webp: cut to {share}%", WEBP, webp[: len(webp) * share // 100]))
    frame = jpeg.index(b"\xff\xc0")
    damage = {
        "0 × 0": jpeg[: frame + 5] + bytes(4) + jpeg[frame + 9 :],
        "65,535 × 65,535": jpeg[: frame + 5] + b"\xff" * 4 + jpeg[frame + 9 :],
        "12-bit": jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :],
        "9 components": jpeg[: frame + 9] + b"\x09" + jpeg[frame + 10 :],
        "no tables": jpeg.replace(b"\xff\xdb", b"\xff\xfe").replace(b"\xff\xc4", b"\xff\xfe"),
        "only markers": b"\xff\xd8" + b"\xff\xfe\x00\x02" * 20_000 + jpeg[2:],
        "fill bytes": b"\xff\xd8" + b"\xff" * 200_000 + jpeg[2:],
        "head only": jpeg[:4],
        "text": b"\xff\xd8\xff" + b"a" * 100,
        "empty": b"",
    }
    found += [(f"jpeg: {name}", JPEG, body) for name, body in damage.items()]
    broken = {
        "RIFF alone": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "claims 16,384 × 16,384": _webp_canvas(16_384, 16_384, webp),
        "claims 2^24 × 2^24": _webp_canvas(2**24, 2**24, webp),
        "a WAVE file": b"RIFF\x24\0\0\0WAVEfmt " + bytes(28),
        "zeros inside": webp[:30] + bytes(len(webp) - 30),
        "empty": b"",
    }
    return found + [(f"webp: {name}", WEBP, body) for name, body in broken.items()]


def _webp_canvas(width: int, height: int, still: bytes) -> bytes:
    """An extended WebP that claims this canvas."""
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides + still[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def octets(shape: Shape) -> list[Body]:
    """Raw pixels of lengths that are no number of images."""
    size = shape[0] * shape[1] * shape[2]
    lengths = [0, 1, size - 1, size + 1, size // 2, 2 * size - 1, 3 * size + size // 2]
    found = [(f"octets: {length} bytes", OCTETS, bytes(length)) for length in lengths]
    return [*found, ("octets: 2000 images", OCTETS, bytes(2000 * size))]


def form_framing(shape: Shape) -> list[Body]:
    """Forms whose boundaries are wrong, missing, huge or without end."""
    good = part(saved(pil(shape), "PNG"))
    whole = good + b"--x--\r\n"
    found: list[Body] = [
        (f"form: Content-Type {kind[:40]!r}", kind, whole)
        for kind in (
            FORM,
            f"{FORM}; boundary=",
            f'{FORM}; boundary=""',
            f"{FORM}; boundary=y",
            f"{FORM}; boundary=X",
            f"{FORM}; boundary={'b' * 300}",
            f"{FORM}; boundary={'b' * 8000}",
            f"{FORM}; border=x",
            f"{FORM}; boundary",
        )
    ]
    framing = {
        "empty": b"",
        "closing line alone": b"--x--\r\n",
        "opening line alone": b"--x\r\n",
        "no closing line": good,
        "no closing line after data": good[:-2],
        "second part has no closing line": good + good,
        "half a closing line": good + b"--x-",
        "closing line of another boundary": good + b"--y--\r\n",
        "cut in the headers": whole[:30],
        "cut in the data": whole[:-40],
        "bare line feeds": whole.replace(b"\r\n", b"\n"),
        "long preamble": b"z" * 4_000_000 + b"\r\n" + whole,
        "preamble of hyphens": b"\r\n" + b"-" * 1_000_000,
        "boundary in every line": part(b"\r\n--xy" * 300_000) + b"--x--\r\n",
        "boundary padded with blanks": good[:-2] + b"\r\n--x" + b" " * 1_000_000 + b"\r\n" + whole,
        "3000 parts": good * 3000 + b"--x--\r\n",
        "20,000 empty parts": part(b"") * 20_000 + b"--x--\r\n",
        "JSON": document({"images": unit(shape).tolist()}),
        "PNG": saved(pil(shape), "PNG"),
    }
    return found + [(f"form: {name}", X_FORM, body) for name, body in framing.items()]


def form_parts(shape: Shape) -> list[Body]:
    """Forms with sound boundaries around bad parts."""
    good = saved(pil(shape), "PNG")
    named = "form-data; name={}"
    many = b"".join(b"A%d: b\r\n" % index for index in range(500))
    inner = part(good).replace(b"--x", b"--y") + b"--y--\r\n"
    parts = {
        "other field": part(good, named.format('"picture"; filename="a.png"')),
        "field in capitals": part(good, named.format('"IMAGES"; filename="a.png"')),
        "field with a key": part(good, named.format('"images[a]"; filename="a.png"')),
        "field of 10,000 letters": part(good, named.format("a" * 10_000)),
        "empty field name": part(good, named.format('""; filename="a.png"')),
        "no field name": part(good, "form-data; filename=a.png"),
        "no disposition": b"--x\r\nContent-Type: image/png\r\n\r\n" + good + b"\r\n",
        "no headers": b"--x\r\n\r\n" + good + b"\r\n",
        "a header without colon": part(good, extra=b"hello\r\n"),
        "a header with a blank name": part(good, extra=b" : b\r\n"),
        "a header with NUL": part(good, extra=b"A\0: b\r\n"),
        "a header of 100 kB": part(good, extra=b"A: " + b"b" * 100_000 + b"\r\n"),
        "500 headers": part(good, extra=many),
        "unknown transfer encoding": part(good, extra=b"Content-Transfer-Encoding: gzip\r\n"),
        "base64 that is none": part(b"%" * 99, extra=b"Content-Transfer-Encoding: base64\r\n"),
        "base64 of text": part(b"aGVsbG8=", extra=b"Content-Transfer-Encoding: base64\r\n"),
        "quoted-printable text": part(b"=41" * 99, extra=b"Content-Transfer-Encoding: quoted-printable\r\n"),
        "nested form": part(inner, extra=b"Content-Type: multipart/mixed; boundary=y\r\n"),
        "empty file": part(b""),
        "empty file name, no content": part(b"", named.format('"images"; filename=""')),
        "text file": part(b"hello"),
        "text field": part(b"hello", named.format('"images"')),
        "path as a field": part(b"/etc/passwd", named.format('"images"')),
        "picture bomb": part(png(header(60_000, 60_000), END)),
        "npy bomb": part(npy_of("<f4", "(1000000, 1000000)")),
        "second file bad": part(good) + part(good[:40]),
        "a stray field beside": part(good) + part(b"1", named.format('"seed"')),
        "gzip of a picture": part(gzip.compress(good, mtime=0)),
    }
    return [(f"form: {name}", X_FORM, body + b"--x--\r\n") for name, body in parts.items()]


def latents(latent_dim: int) -> list[Body]:
    """Bodies that are no latents [M, L], for decode."""
    z = np.zeros((2, latent_dim), np.float32)
    arrays: dict[str, np.ndarray] = {
        "too narrow": z[:, 1:] if latent_dim > 1 else z[:, :0],
        "too wide": np.zeros((2, latent_dim + 1), np.float32),
        "none": z[:0],
        "3 dimensions": z[None],
        "scalar": np.array(0, np.float32),
        "2000 rows": np.zeros((2000, latent_dim), np.float32),
        "NaN": np.full_like(z, np.nan),
        "infinity": np.full_like(z, np.inf),
        "beyond float32": np.full(z.shape, 1e39),
        "float16 infinity": np.full(z.shape, np.inf, np.float16),
        "complex": z.astype(np.complex64),
        "text": np.full(z.shape, "a"),
        "objects": np.full(z.shape, None, object),
        "whole numbers": z.astype(np.int64),
    }
    found = [(f"latents: {name}", NPY, npy(array)) for name, array in arrays.items()]
    claims = npy_of("<f4", f"({10**12}, {latent_dim})")
    found += [("latents: claims 10^12 rows", NPY, claims), ("latents: empty npy", NPY, b"")]
    row = [0.0] * latent_dim
    values: list[Any] = [None, [], {}, "zeros", 0.5, [[None] * latent_dim], [["0"] * latent_dim], [[True] * latent_dim]]
    values += [
        [row, [*row, 0.0]],
        [row, 0.0],
        [[1e39] * latent_dim],
        [[10**30 * 10**9] * latent_dim],
        [[[[row]]]],
        [[]],
    ]
    values += [[row, [float("nan")] * latent_dim], [[float("-inf")] * latent_dim], [row] * 2000]
    found += [(f"latents: json {index}", JSON, document({"latents": value})) for index, value in enumerate(values)]
    found += [("latents: json without", JSON, b'{"seed": 1}'), ("latents: empty json", JSON, b"")]
    found += [("latents: json deep", JSON, b'{"latents":' + b"[" * 250_000 + b"]" * 250_000 + b"}")]
    types = [OCTETS, PNG, X_FORM, "text/csv", ""]
    return [*found, *((f"latents: as {kind!r}", kind, npy(z)) for kind in types)]


def pairs(shape: Shape, latent_dim: int) -> list[Body]:
    """Bodies that are not two images, nor two latents, for interpolate."""
    x, z = unit(shape), np.zeros((1, latent_dim), np.float32)
    picture = saved(pil(shape), "PNG")
    return [
        ("pair: one image, npy", NPY, npy(x)),
        ("pair: three images, npy", NPY, npy(np.concatenate([x] * 3))),
        ("pair: one picture", PNG, picture),
        ("pair: one file", X_FORM, part(picture) + b"--x--\r\n"),
        ("pair: three files", X_FORM, part(picture) * 3 + b"--x--\r\n"),
        ("pair: one image, octets", OCTETS, levels(shape).tobytes()),
        ("pair: one image, json", JSON, document({"images": x.tolist()})),
        ("pair: one latent, json", JSON, document({"latents": z.tolist()})),
        ("pair: three latents, json", JSON, document({"latents": np.concatenate([z] * 3).tolist()})),
        ("pair: latents of NaN", JSON, document({"latents": [[float("nan")] * latent_dim] * 2})),
        ("pair: neither", JSON, b'{"steps": 3}'),
    ]


# Odd, and to be answered


def odd_pictures(shape: Shape) -> list[Body]:
    """Pictures in modes and sizes that few senders use."""
    _, h, w = shape
    grey, colour = pil((1, h, w)), pil((3, h, w))
    deep = Image.fromarray(np.random.RandomState(1).randint(0, 65536, (h, w), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = grey.transpose(Image.Transpose.ROTATE_90)
    frames = {"save_all": True, "append_images": [turned.resize((w, h))], "duration": 50}
    pictures = {
        "grey": (PNG, saved(grey, "PNG")),
        "colour": (PNG, saved(colour, "PNG")),
        "palette": (PNG, saved(colour.quantize(16), "PNG")),
        "palette, transparent": (PNG, saved(colour.quantize(16), "PNG", transparency=0)),
        "16 bits": (PNG, saved(deep, "PNG")),
        "1 bit": (PNG, saved(grey.convert("1"), "PNG")),
        "alpha": (PNG, saved(Image.merge("RGBA", [*colour.split(), grey]), "PNG")),
        "grey and alpha": (PNG, saved(Image.merge("LA", [grey, grey]), "PNG")),
        "grey, transparent level": (PNG, saved(grey, "PNG", transparency=7)),
        "EXIF in a PNG": (PNG, saved(turned, "PNG", exif=exif)),
        "animated PNG": (PNG, saved(grey, "PNG", **frames)),
        "1 × 1": (PNG, saved(grey.resize((1, 1)), "PNG")),
        "3 × 77": (PNG, saved(grey.resize((3, 77)), "PNG")),
        "large": (PNG, saved(colour.resize((700, 400)), "PNG")),
        "interlaced": (PNG, INTERLACED),
        "data after the end": (PNG, saved(grey, "PNG") + b"PK\x03\x04 anything"),
        "many text chunks": (PNG, grey_8x8(chunk(b"tEXt", b"a\0b") * 100)),
        "JPEG": (JPEG, saved(colour, "JPEG")),
        "grey JPEG": (JPEG, saved(grey, "JPEG")),
        "CMYK JPEG": (JPEG, saved(colour.convert("CMYK"), "JPEG")),
        "progressive JPEG": (JPEG, saved(colour.resize((200, 200)), "JPEG", progressive=True)),
        "EXIF-rotated JPEG": (JPEG, saved(turned, "JPEG", exif=exif)),
        "EXIF that is none": (JPEG, saved(colour, "JPEG", exif=b"Exif\0\0nothing of the kind")),
        "JPEG named png": (PNG, saved(colour, "JPEG")),
        "lossless WebP": (WEBP, saved(colour, "WEBP", lossless=True)),
        "WebP": (WEBP, saved(grey, "WEBP")),
        "WebP with alpha": (WEBP, saved(Image.merge("RGBA", [*colour.split(), grey]), "WEBP")),
        "animated WebP": (WEBP, saved(grey.convert("RGB"), "WEBP", **frames)),
    }
    return [(f"odd: {name}", kind, body) for name, (kind, body) in pictures.items()]


# An 8×8 grey PNG, Adam7: every pixel 0, so all seven passes are zeros (15 rows: 15 filter bytes and 64 pixels).
INTERLACED = png(
    chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)), chunk(b"IDAT", zlib.compress(bytes(79))), END
)


def odd_arrays(shape: Shape) -> list[Body]:
    """Arrays in other byte orders, memory orders, widths and ranks."""
    x, pixels = unit(shape), levels(shape)[None]
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    ranks = {"no batch": x[0], "channels last": last, "channels last, no batch": last[0]}
    if shape[0] == 1:
        ranks = {"height and width": x[0, 0], "no channel": x[0], "channels last": last}
    arrays = {
        "big-endian float32": x.astype(">f4"),
        "big-endian float64": x.astype(">f8"),
        "Fortran float32": np.asfortranarray(x),
        "Fortran uint8": np.asfortranarray(np.concatenate([pixels, 255 - pixels])),
        "float16": x.astype(np.float16),
        "float64": x.astype(np.float64),
        "uint8": pixels,
        "3 images": np.concatenate([x, 1 - x, x]),
        "another size": np.kron(x, np.ones((1, 1, 3, 2), np.float32)),
        "1 × 1": x[:, :, :1, :1],
        **ranks,
    }
    two = io.BytesIO()
    np.lib.format.write_array(two, x, version=(2, 0))
    return [
        *((f"odd: {name}", NPY, npy(array)) for name, array in arrays.items()),
        ("odd: npy 2.0", NPY, two.getvalue()),
    ]


def odd_framing(shape: Shape) -> list[Body]:
    """Sound content in unusual wrapping."""
    c, h, w = shape
    picture = saved(pil(shape), "PNG")
    text = base64.b64encode(picture)
    whole = part(picture) + b"--x--\r\n"
    smaller = [[[0.5] * 4] * 4] * c
    extra = b"content-transfer-encoding: base64\r\n"
    return [
        ("odd: octets, 3 images", OCTETS, bytes(3 * c * h * w)),
        ("odd: json uint8", JSON, document({"images": levels(shape)[None].tolist(), "dtype": "uint8"})),
        ("odd: json of whole numbers", JSON, document({"images": (levels(shape)[None] // 128).tolist()})),
        ("odd: json of two sizes", JSON, document({"images": [unit(shape)[0].tolist(), smaller]})),
        ("odd: json, blanks around", JSON, b" \n" + document({"images": unit(shape).tolist()}) + b"\n "),
        ("odd: one base64 text", JSON, document({"images": text.decode()})),
        ("odd: data URL", JSON, document({"images": [f"data:image/png;base64,{text.decode()}"]})),
        (
            "odd: base64 of npy and of PNG",
            JSON,
            document({"images": [base64.b64encode(npy(unit(shape))).decode(), text.decode()]}),
        ),
        ("odd: type in capitals", "IMAGE/PNG", picture),
        ("odd: type with parameters", 'application/json; charset="utf-8"', document({"images": unit(shape).tolist()})),
        ("odd: form, quoted boundary", f'{FORM}; charset=utf-8; boundary="x"', whole),
        ("odd: form with epilogue", X_FORM, whole + b"epilogue"),
        ("odd: form without last line break", X_FORM, whole[:-2]),
        ("odd: form of npy and PNG", X_FORM, part(npy(unit(shape))) + whole),
        ("odd: form, base64 part", X_FORM, part(text, extra=extra) + b"--x--\r\n"),
        *(
            (
                f"odd: form, field {name}",
                X_FORM,
                part(picture, f'form-data; name="{name}"; filename="a"') + b"--x--\r\n",
            )
            for name in ("file", "files", "image", "images[]", "file[0]")
        ),
        *(
            (f"odd: base64 {name}", JSON, document({"images": [coded]}))
            for name, coded in {
                "with line breaks": base64.encodebytes(picture).decode(),
                "with CRLF": base64.encodebytes(picture).replace(b"\n", b"\r\n").decode(),
                "URL-safe, no padding": base64.urlsafe_b64encode(picture).decode().rstrip("="),
                "in a percent-coded data URL": "DATA:image/png;base64," + quote(text.decode(), safe=""),
            }.items()
        ),
        *((f"odd: type {kind}", kind, picture) for kind in ("image/jpg", "image/x-png", "image/pjpeg; q=1")),
        ("odd: form, no file name", X_FORM, part(picture, 'form-data; name="images"') + b"--x--\r\n"),
    ]


# Vectors and signals


def table_payloads(features: list[str]) -> list[Payload]:
    """Bodies that a model of vectors with these features (two or more, no quotes) must refuse, as ``payloads``."""
    bodies = [*row_documents(features), *row_arrays(len(features)), *csv_texts(features), *foreign_bodies()]
    return _spread(bodies, ["encode", "score", "reconstruct"])


def row_documents(features: list[str]) -> list[Body]:
    """JSON bodies."""
    size = len(features)
    row, named = [0.5] * size, dict.fromkeys(features, 0.5)
    lists: dict[str, Any] = {
        "no list": "rows",
        "an empty list": [],
        "an empty row": [[]],
        "one number short": [row, row[1:]],
        "one number more": [row, [*row, 1]],
        "all of another length": [[*row, 1]] * 2,
        "too deep": [[[row]]],
        "a text": [[*row[1:], "1"]],
        "null": [[*row[1:], None]],
        "true": [[*row[1:], True]],
        "beyond float32": [[*row[1:], 1e39]],
        "a number among rows": [row, 1],
        "an object among lists": [row, named],
        "a list among objects": [named, row],
        "a feature missing": [named, dict.fromkeys(features[1:], 1)],
        "an unknown feature": [named | {"other": 1}],
        "a feature in capitals": [{name.upper(): 1 for name in features}],
        "a text for a feature": [named | {features[0]: "1"}],
        "null for a feature": [named | {features[0]: None}],
        "a list for a feature": [named | {features[0]: [1]}],
        "too many rows": [row] * 2000,
        "too many objects": [named] * 2000,
        "a flood of names": [{f"x{i}": 1 for i in range(10_000)}],
    }
    found = [(f"rows: {name}", JSON, json.dumps({"rows": rows}).encode()) for name, rows in lists.items()]
    found += [
        ("rows: no key", JSON, json.dumps({"data": [row]}).encode()),
        ("rows: no object", JSON, json.dumps([row]).encode()),
        ("rows beside images", JSON, json.dumps({"rows": [row], "images": [row]}).encode()),
        ("rows: NaN", JSON, json.dumps({"rows": [[float("nan")] * size]}).encode()),
        ("rows: infinity", JSON, json.dumps({"rows": [[float("inf")] * size]}).encode()),
        ("rows: a flood of lists", JSON, b'{"rows": [' + b"[]," * 1_000_000 + b"[]]}"),
    ]
    return found


def row_arrays(size: int) -> list[Body]:
    """npy bodies."""
    good = np.full((2, size), 0.5, np.float32)
    bad, beyond = good.copy(), good.astype(np.float64)
    bad[1, 1], beyond[1, 0] = np.nan, -1e39
    arrays = {
        "rows of another width": good[:, 1:],
        "three dimensions": good[None],
        "no rows": good[:0],
        "a single number": np.float32(1),
        "NaN": bad,
        "beyond float32": beyond,
        "too many rows": np.repeat(good, 1000, axis=0),
        "whole numbers of 64 bits": good.astype(np.int64),
        "texts": good.astype(str),
    }
    return [(f"npy rows: {name}", NPY, npy(array)) for name, array in arrays.items()]


def csv_texts(features: list[str]) -> list[Body]:
    """CSV bodies."""
    size = len(features)
    header, row = ",".join(f'"{name}"' for name in features), ",".join(["0.5"] * size)
    other = ",".join(["other", *(f'"{name}"' for name in features[1:])])
    twice = ",".join([f'"{features[0]}"', *(f'"{name}"' for name in features[:-1])])
    texts = {
        "nothing": "",
        "blank lines": "\r\n" * 3,
        "a flood of blank lines": row + "\n" * 2_000_000 + row,
        "a mark alone": "\ufeff",
        "a header alone": header,
        "two headers": f"{header}\n{header}\n{row}",
        "a header below": f"{row}\n{header}",
        "a name twice": f"{twice}\n{row}",
        "a name and its twin": f'{header},"{features[0]}"\n{row},1',
        "an unknown name": f"{other}\n{row}",
        "a name missing": header.rsplit(",", 1)[0] + "\n1",
        "a number short": f"{row}\n{row[4:]}",
        "a number more": f"{row}\n{row},1",
        "a comma at the end": f"{row},",
        "an empty field": f"{row}\n,{row[4:]}",
        "a text": f"{row}\nabc,{row[4:]}",
        "semicolons": row.replace(",", ";"),
        "tabs": row.replace(",", "\t"),
        "spaces": row.replace(",", " "),
        "decimal commas": row.replace(",", ";").replace(".", ","),
        "NaN": f"{row}\nnan,{row[4:]}",
        "infinity": f"{row}\n-inf,{row[4:]}",
        "beyond float32": f"{row}\n1e39,{row[4:]}",
        "digit groups": f"{row}\n1_000,{row[4:]}",
        "a hexadecimal number": f"{row}\n0x10,{row[4:]}",
        "a comment": f"# made by hand\n{row}",
        "an open quote": f'{row}\n"0.5,{row[4:]}',
        "a quote inside": f'{row}\n"0.5"5,{row[4:]}',
        "a field without end": '"' + "a" * 300_000 + '"',
        "a flood of fields": "1," * 500_000,
        "a flood of names": "a," * 500_000,
        "too many rows": "\n".join([row] * 2000),
        "a nul": f"{row}\n0.\0" + f"5,{row[4:]}",
    }
    found = [(f"csv: {name}", "text/csv", text.encode()) for name, text in texts.items()]
    found += [
        ("csv: latin-1", "text/csv", header.encode() + b"\n\xe9," + row[4:].encode()),
        ("csv: UTF-16", "text/csv", f"{header}\n{row}".encode("utf-16")),
        ("csv: compressed", "text/csv", gzip.compress(row.encode())),
        ("csv: a PNG", "text/csv", grey_8x8()),
    ]
    return found


def foreign_bodies() -> list[Body]:
    """What only models of images read, or none."""
    kinds = [PNG, JPEG, WEBP, OCTETS, X_FORM, "", "text/plain", "application/vnd.ms-excel"]
    return [(f"foreign: {kind or 'no Content-Type'}", kind, grey_8x8()) for kind in kinds]
