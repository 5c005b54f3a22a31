"""Request bodies -> whole images for a model of tiles: service.formats.codecs' formats, each image in its own size.

8-bit pixels stay uint8 [C,h,w], a quarter of their float32: the model makes floats of a few tiles at a time. Raw octets
are not read, since they do not say how wide an image is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput, LimitExceeded, PayloadTooLarge, UnsupportedMediaType
from service.formats.arrays import NPY_MAGIC, DType, as_images, from_json, read_npy, to_unit
from service.formats.codecs import Limits, from_base64, named
from service.formats.images import open_image, read_whole
from service.formats.media_types import IMAGE_INPUTS, JSON, MULTIPART, NPY, media_type
from service.formats.multipart import FIELD, read_multipart
from service.formats.tiling import check_size

INPUT_TYPES = (*IMAGE_INPUTS, MULTIPART, NPY, JSON)


@dataclass(frozen=True)
class WholeReader:
    """Reads whole images for one bundle.

    Raises, from ``read``:
        UnsupportedMediaType: the Content-Type is none of INPUT_TYPES.
        LimitExceeded: too many images, bytes or pixels.
        InvalidInput: anything else, an image smaller than a tile among it; the text names the image.
    """

    preprocessing: Preprocessing
    limits: Limits

    def read(self, content_type: str, body: bytes, document: Callable[[], Any]) -> list[np.ndarray]:
        """A body -> images [C,h,w], uint8 or float32 in [0,1]. ``document`` parses the body as JSON, if needed."""
        kind = media_type(content_type)
        if kind not in INPUT_TYPES:
            raise UnsupportedMediaType(f"Content-Type {kind[:80]!r}: one of {', '.join(INPUT_TYPES)} expected")
        if not body:
            raise InvalidInput("the body is empty: images expected")
        if kind in IMAGE_INPUTS:
            return self._files([body])
        if kind == NPY:
            return self._array(read_npy(body))
        if kind == JSON:
            return self._json(document())
        parts = read_multipart(content_type, body, self.limits.max_images)
        if not parts:
            raise InvalidInput(f"the form holds no files: at least one field {FIELD!r} expected")
        return self._files(parts)

    def _files(self, parts: Iterable[bytes]) -> list[np.ndarray]:
        """Files: npy by their magic, else pictures. All headers are read before the first pixel is decoded."""
        opened: list[np.ndarray | Image.Image] = []
        for index, data in enumerate(parts):
            with named(f"image {index}: "):
                opened.append(read_npy(data) if data.startswith(NPY_MAGIC) else open_image(data, self.limits.image))
        pictures = [image for image in opened if isinstance(image, Image.Image)]
        pixels = sum(image.width * image.height for image in pictures)
        if pixels > self.limits.max_pixels:
            raise PayloadTooLarge(
                f"the images have {pixels} pixels: at most {self.limits.max_pixels} here (setting max_batch_pixels)"
            )
        self._check_room(len(opened), pixels * self.preprocessing.channels)
        found: list[np.ndarray] = []
        for index, image in enumerate(opened):
            with named(f"image {index}: "):
                found += self._array(image) if isinstance(image, np.ndarray) else [self._picture(image)]
        self._check_room(len(found), sum(image.size for image in found))
        return found

    def _picture(self, image: Image.Image) -> np.ndarray:
        try:
            return read_whole(image, self.preprocessing)
        finally:
            image.close()  # its decoded pixels, which Pillow would keep as long as the list

    def _array(self, array: np.ndarray, dtype: DType | None = None, first_row: int = 0) -> list[np.ndarray]:
        images = as_images(array, self.preprocessing.channels)
        self._check_room(first_row + len(images), images.size)
        check_size(self.preprocessing, *images.shape[2:])
        if images.dtype == np.uint8:
            return list(images)
        unit = to_unit(images, dtype, first_row)
        return list(images.astype(np.uint8) if dtype == "uint8" else unit)

    def _json(self, document: Any) -> list[np.ndarray]:
        if not isinstance(document, dict) or "images" not in document:
            raise InvalidInput('a JSON object with "images" expected')
        images, dtype = document["images"], document.get("dtype", "float32")
        if dtype not in ("float32", "uint8"):
            raise InvalidInput('dtype: "float32" (pixels in [0,1]) or "uint8" (0 to 255) expected')
        if isinstance(images, str):
            images = [images]
        if not isinstance(images, list) or not images:
            raise InvalidInput('"images": a non-empty list of images expected, as nested lists or base64 strings')
        self._check_room(len(images), 0)
        if all(isinstance(image, str) for image in images):
            return self._files([from_base64(image, index) for index, image in enumerate(images)])
        return self._lists(images, dtype)

    def _lists(self, images: list[Any], dtype: DType) -> list[np.ndarray]:
        try:
            whole = from_json(images)
        except InvalidInput:  # which image is it, or are they only of different sizes?
            whole = None
        if whole is not None:
            return self._array(whole, dtype)
        found: list[np.ndarray] = []
        for index, image in enumerate(images):
            with named(f"image {index}: "):
                found += self._array(from_json(image), dtype, index)
        self._check_room(len(found), sum(image.size for image in found))
        return found

    def _check_room(self, images: int, numbers: int) -> None:
        if images > self.limits.max_images:
            raise LimitExceeded(f"{images} images: at most {self.limits.max_images} here (setting max_batch)")
        if numbers > self.limits.max_numbers:
            raise PayloadTooLarge(
                f"the images hold {numbers} numbers: at most {self.limits.max_numbers} here (setting max_numbers_in)"
            )
