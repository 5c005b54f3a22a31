"""Read request bodies into images and latents; every input format gives the same float32 pixels [N,C,H,W] in [0,1].

    image/png, image/jpeg, image/webp      one image
    multipart/form-data, field ``images``  one or many files: images or npy (service.formats.multipart: other names)
    application/x-npy                      uint8, or float in [0,1]; N×C×H×W and the natural shorter shapes
    application/json                       {"images": lists of numbers or base64 strings, "dtype": "float32" | "uint8"}
    application/octet-stream               uint8 pixels in the signature's shape, any number of images

Images of another size than the model's are resized by the bundle's rule (service.formats.images), or refused if
``strict``. Bodies for models of vectors and signals are read by service.formats.tables instead.
"""

from __future__ import annotations

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
    DType,
    as_images,
    as_latents,
    from_json,
    may_hold_booleans,
    read_npy,
    to_unit,
)
from service.formats.containers import describe_file
from service.formats.image_bodies import Limits, decode_base64, form_files, json_images, open_files, prefix_errors
from service.formats.images import open_image, read_image, resize_array
from service.formats.media_types import IMAGE_INPUTS, INPUTS, JSON, NPY, OCTETS, accepted_media_type
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
]


def encode_npy(array: np.ndarray) -> bytes:
    """Write an array as the bytes of an .npy file (format 1.0), in C order."""
    return _npy_header(array.dtype.str, array.shape) + array.tobytes()


@lru_cache(maxsize=256)
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Write the header of an .npy file in C order. It is cached, since it takes longer than a few rows of numbers."""
    buffer = BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


@dataclass(frozen=True)
class Reader:
    """Reads the images of request bodies for one bundle, and brings them to the model's size.

    Raises, from ``read`` and ``read_levels``:
        UnsupportedMediaType: the Content-Type is none of INPUTS, or says that a file is raw pixels.
        LimitExceeded: the body holds too many images, bytes or pixels.
        InvalidInput: the body is wrong in another way; the text names the image, what it holds, and what was expected.
    """

    preprocessing: Preprocessing
    limits: Limits
    strict: bool = False

    @cached_property
    def _numbers(self) -> int:
        """Count of numbers in one image of the model's size, C·H·W."""
        return math.prod(self.preprocessing.shape)

    def read(self, content_type: str, body: bytes, document: Callable[[], Any]) -> np.ndarray:
        """Read a body into pixels, float32 [N,C,H,W] in [0,1]; ``document`` parses it as JSON, if needed, and once."""
        return _to_pixels(self.read_levels(content_type, body, document))

    def read_levels(self, content_type: str, body: bytes, document: Callable[[], Any]) -> np.ndarray:
        """Read a body into uint8 levels [N,C,H,W] if all its pixels have 8 bits, else as ``read`` does."""
        kind = accepted_media_type(content_type, INPUTS)
        if not body:
            raise InvalidInput("the body is empty: images expected")
        if kind in IMAGE_INPUTS:
            return self._read_file(open_image(body, self.limits.image))
        if kind == NPY:
            return self._read_array(read_npy(body))
        if kind == OCTETS:
            return self._read_octets(body)
        if kind == JSON:
            return self._read_json(document(), may_hold_booleans(body))
        return self._read_files(form_files(content_type, body, self.limits))

    def _check_count(self, images: int) -> None:
        """Raise LimitExceeded for too many images, or PayloadTooLarge if they would hold too many numbers."""
        if images > self.limits.max_images:
            raise LimitExceeded(f"{images} images: at most {self.limits.max_images} here (setting max_batch)")
        max_images = self.limits.max_numbers // self._numbers
        if images > max_images:
            raise PayloadTooLarge(
                f"{images} images of shape {self.preprocessing.shape}: at most {max_images} here "
                "(setting max_numbers_in)"
            )

    def _read_array(self, array: np.ndarray, dtype: DType | None = None, first_row: int = 0) -> np.ndarray:
        images = as_images(array, self.preprocessing.shape, is_list=dtype is not None)  # dtype is JSON's
        self._check_count(first_row + len(images))
        if images.dtype != np.uint8:
            unit = to_unit(images, dtype, first_row)
            if dtype != "uint8":
                return resize_array(unit, self.preprocessing, self.strict)
            images = images.astype(np.uint8)
        return resize_array(images, self.preprocessing, self.strict)

    def _read_octets(self, body: bytes) -> np.ndarray:
        shape, size = self.preprocessing.shape, self._numbers
        description = describe_file(body)
        if description:
            raise UnsupportedMediaType(f"Content-Type {OCTETS!r} is of raw pixels, but the body is {description}")
        if len(body) % size:
            raise InvalidInput(f"{len(body)} bytes: a multiple of {size} expected, uint8 pixels of shape {shape}")
        self._check_count(len(body) // size)
        return np.frombuffer(body, np.uint8).reshape(-1, *shape)

    def _read_files(self, files: list[bytes]) -> np.ndarray:
        self._check_count(len(files))
        arrays: list[np.ndarray] = []
        for index, image in enumerate(open_files(files, self.limits)):
            with prefix_errors(f"image {index}: "):
                arrays.append(self._read_file(image))
            self._check_count(sum(map(len, arrays)))
        if len({array.dtype for array in arrays}) > 1:
            arrays = [_to_pixels(array) for array in arrays]
        return np.concatenate(arrays)

    def _read_file(self, image: np.ndarray | Image.Image) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return self._read_array(image)
        return read_image(image, self.preprocessing, self.strict)[None]

    def _read_json(self, document: Any, booleans: bool) -> np.ndarray:
        images, dtype = json_images(document)
        if all(isinstance(image, str) for image in images):
            self._check_count(len(images))
            return self._read_files(decode_base64(images))
        return self._read_lists(images, dtype, booleans)

    def _read_lists(self, images: list[Any], dtype: DType, booleans: bool) -> np.ndarray:
        """Read nested lists: one array if all images have one size, else each image by itself."""
        try:
            array = from_json(images, booleans=booleans)
        except InvalidInput:  # one image is wrong, which is then named, or the sizes differ, which is allowed
            lists = [from_json(image, f"image {index}: ") for index, image in enumerate(images)]
            if len({image.ndim for image in lists}) > 1 or lists[0].ndim < 2:
                raise
            resized: list[np.ndarray] = []
            for image in lists:
                resized.append(self._read_array(image, dtype, sum(map(len, resized))))
            return np.concatenate(resized)
        return self._read_array(array, dtype)


def _to_pixels(images: np.ndarray) -> np.ndarray:
    return unit_levels(images) if images.dtype == np.uint8 else images


def read_latents(
    content_type: str, body: bytes, document: Callable[[], Any], latent_dim: int, max_rows: int
) -> np.ndarray:
    """Read a body into latents, float32 [M,L], from npy or JSON {"latents": [[…], …]}.

    Args:
        document: parses the body as JSON.
        latent_dim: L.
        max_rows: the largest M that is allowed.

    Raises:
        UnsupportedMediaType: the Content-Type is neither npy nor JSON.
        LimitExceeded: there are more than ``max_rows`` latents.
        InvalidInput: the shape is another, or a number is not finite in float32.
    """
    if accepted_media_type(content_type, (NPY, JSON)) == NPY:
        return as_latents(read_npy(body), latent_dim, max_rows)
    content = document()
    if not isinstance(content, dict) or "latents" not in content:
        raise InvalidInput('a JSON object with "latents" expected')
    return as_latents(from_json(content["latents"], "latents: ", may_hold_booleans(body)), latent_dim, max_rows)
