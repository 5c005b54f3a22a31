"""Scikit-learn's handwritten digits: 1,797 images of 8×8 pixels that come with the library."""

from __future__ import annotations

import numpy as np

from training.config import DataConfig
from training.data.arrays import ArrayPixels, native_preprocessing
from training.data.source import Source

LEVELS = 16  # pixel values are counts 0 … 16


def open_digits(config: DataConfig) -> Source:
    """The digits as grey 8-bit images: count c of 0 … 16 becomes ⌊255·c/16 + ½⌋.

    Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI repository, 1998 (its test part).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.floor(bunch.images * (255 / LEVELS) + 0.5).astype(np.uint8)[:, None]
    preprocessing = native_preprocessing(images.shape[1:], config)
    return Source(
        name="digits",
        pixels=ArrayPixels(images, preprocessing, "digits"),
        count=len(images),
        preprocessing=preprocessing,
        labels=bunch.target.astype(np.int64),
        label_names=[str(name) for name in bunch.target_names],
    )
