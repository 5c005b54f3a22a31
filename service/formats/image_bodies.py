"""Open the images of a request body, be they resized or kept whole later: forms, base64, files, and their limits."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from service.errors import InvalidInput, PayloadTooLarge
from service.formats.arrays import NPY_MAGIC, DType, read_npy
from service.formats.images import ImageLimits, open_image
from service.formats.multipart import FIELD, read_multipart

_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class Limits:
    """Limits on the images of one request.

    Args:
        max_images: number of images.
        image: limits on each encoded image.
        max_pixels: width × height summed over the encoded images, before decoding.
        max_numbers: images × C × H × W, after resizing.
    """

    max_images: int
    image: ImageLimits
    max_pixels: int
    max_numbers: int


class prefix_errors:  # noqa: N801  # a context manager reads as a verb
    """Context manager that puts ``prefix`` before the text of an InvalidInput raised inside."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InvalidInput):
            raise type(error)(f"{self.prefix}{error}") from error


def form_files(content_type: str, body: bytes, limits: Limits) -> list[bytes]:
    """Return the files of a multipart form. Raises InvalidInput for none, and as ``read_multipart`` does."""
    files = read_multipart(content_type, body, limits.max_images)
    if not files:
        raise InvalidInput(f"the form holds no files: at least one field {FIELD!r} expected")
    return files


def json_images(document: Any) -> tuple[list[Any], DType]:
    """Return "images" of a JSON document, at least one, not read yet, and its "dtype". Raises InvalidInput."""
    if not isinstance(document, dict) or "images" not in document:
        raise InvalidInput('a JSON object with "images" expected')
    images, dtype = document["images"], document.get("dtype", "float32")
    if dtype not in ("float32", "uint8"):
        raise InvalidInput('dtype: "float32" (pixels in [0,1]) or "uint8" (0 to 255) expected')
    if isinstance(images, str):
        images = [images]
    if not isinstance(images, list) or not images:
        raise InvalidInput('"images": a non-empty list of images expected, as nested lists or base64 strings')
    return images, dtype


def decode_base64(texts: Sequence[str]) -> list[bytes]:
    """Decode files in base64, plain or as data URLs. Raises InvalidInput, which names the image.

    Line breaks and blanks, the URL-safe alphabet (RFC 4648, 5), and a missing padding are read as well.
    """
    return [_decode_base64(text, index) for index, text in enumerate(texts)]


def _decode_base64(text: str, index: int) -> bytes:
    try:
        if text[:5].lower() == "data:":
            text = _data_of_url(text)
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error:
            return base64.b64decode(_plain_base64(text.encode()), validate=True)
    except ValueError as error:
        raise InvalidInput(
            f"image {index}: base64 of a PNG, JPEG, WebP or npy file expected, or a data URL with such base64"
        ) from error


def _data_of_url(url: str) -> str:
    """Return the data in a data URL, whose characters may be percent-coded. Raises ValueError for bytes but UTF-8."""
    data = url.partition(",")[2]
    return unquote(data, errors="strict") if "%" in data else data


def _plain_base64(text: bytes) -> bytes:
    """Bring base64 to the standard alphabet, without blanks and with padding."""
    plain = text.translate(_STANDARD_ALPHABET, b" \t\r\n")
    return plain + b"=" * (-len(plain) % 4)


def open_files(files: Sequence[bytes], limits: Limits) -> list[np.ndarray | Image.Image]:
    """Open files, npy as arrays and others as images, all of them before the first pixel is decoded.

    Raises:
        InvalidInput: a file is no image and no npy; the text names it by its index.
        PayloadTooLarge: a file, or the pixels of all encoded images together, exceed ``limits``.
    """
    opened: list[np.ndarray | Image.Image] = []
    for index, data in enumerate(files):
        with prefix_errors(f"image {index}: "):
            opened.append(read_npy(data) if data.startswith(NPY_MAGIC) else open_image(data, limits.image))
    pixels = encoded_pixels(opened)
    if pixels > limits.max_pixels:
        raise PayloadTooLarge(
            f"the images have {pixels} pixels: at most {limits.max_pixels} here (setting max_batch_pixels)"
        )
    return opened


def encoded_pixels(opened: Sequence[np.ndarray | Image.Image]) -> int:
    """Sum width × height over the encoded images among files that were opened."""
    return sum(image.width * image.height for image in opened if isinstance(image, Image.Image))
