"""Request bodies -> images and latents. Every input format ends in the same float32 pixels [N,C,H,W] in [0,1].

    image/png, image/jpeg, image/webp      one image
    multipart/form-data, field ``images``  one or many files: images or npy
    application/x-npy                      uint8, or float in [0,1]; N×C×H×W and the natural shorter shapes
    application/json                       {"images": lists of numbers or base64 strings, "dtype": "float32" | "uint8"}
    application/octet-stream               uint8 pixels in the signature's shape, any number of images

Images of another size go through the bundle's own rule (service.formats.images), or are refused if ``strict``. Models
of vectors and signals read the formats of service.formats.tables instead.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput, LimitExceeded, PayloadTooLarge, UnsupportedMediaType
from service.formats.arrays import (
    NPY_MAGIC,
    DType,
    as_images,
    as_latents,
    from_json,
    may_hold_booleans,
    read_npy,
    to_unit,
)
from service.formats.images import ImageLimits, open_image, read_image, resize_array
from service.formats.media_types import IMAGE_INPUTS, INPUTS, JSON, NPY, OCTETS, media_type
from service.formats.multipart import FIELD, read_multipart
from service.formats.rendering import encode_gif, encode_png, encode_webp
from service.pixels import unit_levels

__all__ = [
    "Limits",
    "Reader",
    "encode_gif",
    "encode_npy",
    "encode_png",
    "encode_webp",
    "read_latents",
    "read_multipart",
]


@dataclass(frozen=True)
class Limits:
    """Most images in one request, the limits of each encoded image, and of all of them together.

    ``max_pixels``: width × height summed over the encoded images, before decoding.
    ``max_numbers``: images × C × H × W, after resizing.
    """

    max_images: int
    image: ImageLimits
    max_pixels: int
    max_numbers: int


def encode_npy(array: np.ndarray) -> bytes:
    """An array -> the bytes of an .npy file (format 1.0)."""
    return _npy_header(array.dtype.str, array.shape) + array.tobytes()


@lru_cache(maxsize=256)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Of an array in C order; writing it takes longer than the numbers of a few rows."""
    buffer = BytesIO()
    about = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, about)
    return buffer.getvalue()


@dataclass(frozen=True)
class Reader:
    """Reads images for one bundle.

    Raises, from ``read``:
        UnsupportedMediaType: the Content-Type is none of INPUTS.
        LimitExceeded: too many images, bytes or pixels.
        InvalidInput: anything else; the text names the row, what was found, and what was expected.
    """

    preprocessing: Preprocessing
    limits: Limits
    strict: bool = False

    @cached_property
    def _numbers(self) -> int:
        """Of an image of the model's own size."""
        return math.prod(self.preprocessing.shape)

    def read(self, content_type: str, body: bytes, document: Callable[[], Any]) -> np.ndarray:
        """A body -> float32 [N,C,H,W] in [0,1]. ``document`` parses the body as JSON, once, if it is needed."""
        return _pixels(self.read_levels(content_type, body, document))

    def read_levels(self, content_type: str, body: bytes, document: Callable[[], Any]) -> np.ndarray:
        """As ``read``, but 8-bit pixels stay what they are: their levels, uint8 [N,C,H,W]."""
        kind = media_type(content_type)
        if kind not in INPUTS:
            raise UnsupportedMediaType(f"Content-Type {kind[:80]!r}: one of {', '.join(INPUTS)} expected")
        if not body:
            raise InvalidInput("the body is empty: images expected")
        if kind in IMAGE_INPUTS:
            return self._one(open_image(body, self.limits.image))
        if kind == NPY:
            return self._array(read_npy(body))
        if kind == OCTETS:
            return self._octets(body)
        return self._json(document(), may_hold_booleans(body)) if kind == JSON else self._multipart(content_type, body)

    def _count(self, images: int) -> None:
        if images > self.limits.max_images:
            raise LimitExceeded(f"{images} images: at most {self.limits.max_images} here (setting max_batch)")
        most = self.limits.max_numbers // self._numbers
        if images > most:
            raise PayloadTooLarge(
                f"{images} images of shape {self.preprocessing.shape}: at most {most} here (setting max_numbers_in)"
            )

    def _array(self, array: np.ndarray, dtype: DType | None = None, first_row: int = 0) -> np.ndarray:
        images = as_images(array, self.preprocessing.channels)
        self._count(first_row + len(images))
        if images.dtype != np.uint8:
            unit = to_unit(images, dtype, first_row)
            if dtype != "uint8":
                return resize_array(unit, self.preprocessing, self.strict)
            images = images.astype(np.uint8)
        return resize_array(images, self.preprocessing, self.strict)

    def _octets(self, body: bytes) -> np.ndarray:
        shape, size = self.preprocessing.shape, self._numbers
        if len(body) % size:
            raise InvalidInput(f"{len(body)} bytes: a multiple of {size} expected, uint8 pixels of shape {shape}")
        self._count(len(body) // size)
        return np.frombuffer(body, np.uint8).reshape(-1, *shape)

    def _many(self, parts: list[bytes]) -> np.ndarray:
        """Files: npy by their magic, else pictures. All headers are read before the first pixel is decoded."""
        self._count(len(parts))
        opened: list[np.ndarray | Image.Image] = []
        for index, data in enumerate(parts):
            with named(f"image {index}: "):
                opened.append(read_npy(data) if data.startswith(NPY_MAGIC) else open_image(data, self.limits.image))
        pixels = sum(image.width * image.height for image in opened if isinstance(image, Image.Image))
        if pixels > self.limits.max_pixels:
            raise PayloadTooLarge(
                f"the images have {pixels} pixels: at most {self.limits.max_pixels} here (setting max_batch_pixels)"
            )
        found: list[np.ndarray] = []
        for index, image in enumerate(opened):
            with named(f"image {index}: "):
                found.append(self._one(image))
            self._count(sum(map(len, found)))
        alike = len({rows.dtype for rows in found}) == 1
        return np.concatenate(found if alike else [_pixels(rows) for rows in found])

    def _one(self, image: np.ndarray | Image.Image) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return self._array(image)
        return read_image(image, self.preprocessing, self.strict)[None]

    def _json(self, document: Any, booleans: bool) -> np.ndarray:
        if not isinstance(document, dict) or "images" not in document:
            raise InvalidInput('a JSON object with "images" expected')
        images, dtype = document["images"], document.get("dtype", "float32")
        if dtype not in ("float32", "uint8"):
            raise InvalidInput('dtype: "float32" (pixels in [0,1]) or "uint8" (0 to 255) expected')
        if isinstance(images, str):
            images = [images]
        if not isinstance(images, list) or not images:
            raise InvalidInput('"images": a non-empty list of images expected, as nested lists or base64 strings')
        if all(isinstance(image, str) for image in images):
            self._count(len(images))
            return self._many([from_base64(image, index) for index, image in enumerate(images)])
        return self._lists(images, dtype, booleans)

    def _lists(self, images: list[Any], dtype: DType, booleans: bool) -> np.ndarray:
        try:
            whole = from_json(images, booleans=booleans)
        except InvalidInput:  # which row is it, or are they only of different sizes?
            rows = [from_json(image, f"image {index}: ") for index, image in enumerate(images)]
            if len({row.ndim for row in rows}) > 1 or rows[0].ndim < 2:
                raise
            found: list[np.ndarray] = []
            for row in rows:
                found.append(self._array(row, dtype, sum(map(len, found))))
            return np.concatenate(found)
        return self._array(whole, dtype)

    def _multipart(self, content_type: str, body: bytes) -> np.ndarray:
        parts = read_multipart(content_type, body, self.limits.max_images)
        if not parts:
            raise InvalidInput(f"the form holds no files: at least one field {FIELD!r} expected")
        return self._many(parts)


def _pixels(rows: np.ndarray) -> np.ndarray:
    return unit_levels(rows) if rows.dtype == np.uint8 else rows


class named:  # noqa: N801  # a context manager reads as a verb
    """Put ``prefix`` before the text of an InvalidInput raised inside."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InvalidInput):
            raise type(error)(f"{self.prefix}{error}") from error


def from_base64(text: str, index: int) -> bytes:
    """Base64, plain or as a data URL, -> bytes."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"image {index}: base64 of a PNG, JPEG, WebP or npy file expected") from error


def read_latents(
    content_type: str, body: bytes, document: Callable[[], Any], latent_dim: int, limit: int
) -> np.ndarray:
    """A body -> latents float32 [M,L], from npy or {"latents": [[…], …]}. Raises as Reader.read does."""
    kind = media_type(content_type)
    if kind == NPY:
        return as_latents(read_npy(body), latent_dim, limit)
    if kind != JSON:
        raise UnsupportedMediaType(f"Content-Type {kind[:80]!r}: one of {NPY}, {JSON} expected")
    content = document()
    if not isinstance(content, dict) or "latents" not in content:
        raise InvalidInput('a JSON object with "latents" expected')
    return as_latents(from_json(content["latents"], "latents: ", may_hold_booleans(body)), latent_dim, limit)
