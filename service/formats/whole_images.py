"""Read request bodies into whole images, each in its own size, for a model of tiles.

The formats are those of service.formats.codecs without raw octets, which do not say how wide an image is. 8-bit pixels
stay uint8 [C,h,w], a quarter of the memory of float32: the model converts a few tiles at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput, LimitExceeded, PayloadTooLarge
from service.formats.arrays import DType, as_images, from_json, read_npy, to_unit
from service.formats.image_bodies import (
    Limits,
    decode_base64,
    encoded_pixels,
    form_files,
    json_images,
    open_files,
    prefix_errors,
)
from service.formats.images import read_whole_image
from service.formats.media_types import IMAGE_INPUTS, JSON, NPY, WHOLE_IMAGE_INPUTS, accepted_media_type
from service.formats.tiling import check_size


@dataclass(frozen=True)
class WholeImageReader:
    """Reads the images of request bodies for one bundle, each in its own size.

    Raises, from ``read``:
        UnsupportedMediaType: the Content-Type is none of WHOLE_IMAGE_INPUTS.
        LimitExceeded: the body holds too many images, bytes or pixels.
        InvalidInput: the body is wrong in another way, or an image is smaller than a tile; the text names the image.
    """

    preprocessing: Preprocessing
    limits: Limits

    def read(self, content_type: str, body: bytes, document: Callable[[], Any]) -> list[np.ndarray]:
        """Read a body into images [C,h,w], uint8 or float32 in [0,1]; ``document`` parses it as JSON, if needed."""
        kind = accepted_media_type(content_type, WHOLE_IMAGE_INPUTS)
        if not body:
            raise InvalidInput("the body is empty: images expected")
        if kind in IMAGE_INPUTS:
            return self._read_files([body])
        if kind == NPY:
            return self._read_array(read_npy(body))
        if kind == JSON:
            return self._read_json(document())
        return self._read_files(form_files(content_type, body, self.limits))

    def _read_files(self, files: Sequence[bytes]) -> list[np.ndarray]:
        opened = open_files(files, self.limits)
        self._check_limits(len(opened), encoded_pixels(opened) * self.preprocessing.channels)
        images: list[np.ndarray] = []
        for index, image in enumerate(opened):
            with prefix_errors(f"image {index}: "):
                images += self._read_array(image) if isinstance(image, np.ndarray) else [self._decode(image)]
        self._check_limits(len(images), sum(image.size for image in images))
        return images

    def _decode(self, image: Image.Image) -> np.ndarray:
        try:
            return read_whole_image(image, self.preprocessing)
        finally:
            image.close()  # its decoded pixels, which Pillow would keep as long as the list

    def _read_array(self, array: np.ndarray, dtype: DType | None = None, first_row: int = 0) -> list[np.ndarray]:
        images = as_images(array, self.preprocessing.shape, is_list=dtype is not None)  # dtype is JSON's
        self._check_limits(first_row + len(images), images.size)
        check_size(self.preprocessing, *images.shape[2:])
        if images.dtype == np.uint8:
            return list(images)
        unit = to_unit(images, dtype, first_row)
        return list(images.astype(np.uint8) if dtype == "uint8" else unit)

    def _read_json(self, document: Any) -> list[np.ndarray]:
        images, dtype = json_images(document)
        self._check_limits(len(images), 0)
        if all(isinstance(image, str) for image in images):
            return self._read_files(decode_base64(images))
        return self._read_lists(images, dtype)

    def _read_lists(self, images: list[Any], dtype: DType) -> list[np.ndarray]:
        """Read nested lists: one array if all images have one size, else each image by itself."""
        try:
            array = from_json(images)
        except InvalidInput:  # one image is wrong, which is then named, or the sizes differ, which is allowed
            array = None
        if array is not None:
            return self._read_array(array, dtype)
        arrays: list[np.ndarray] = []
        for index, image in enumerate(images):
            with prefix_errors(f"image {index}: "):
                arrays += self._read_array(from_json(image), dtype, index)
        self._check_limits(len(arrays), sum(image.size for image in arrays))
        return arrays

    def _check_limits(self, images: int, numbers: int) -> None:
        """Raise LimitExceeded for too many images, or PayloadTooLarge for too many numbers in all of them."""
        if images > self.limits.max_images:
            raise LimitExceeded(f"{images} images: at most {self.limits.max_images} here (setting max_batch)")
        if numbers > self.limits.max_numbers:
            raise PayloadTooLarge(
                f"the images hold {numbers} numbers: at most {self.limits.max_numbers} here (setting max_numbers_in)"
            )
