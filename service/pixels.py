"""8-bit levels and the pixels in [0, 1] that they stand for: the one place where levels are divided by 255."""

from __future__ import annotations

import numpy as np

from service.aligned import aligned_empty

LEVELS = np.float32(255)


def unit_levels(levels: np.ndarray) -> np.ndarray:
    """Convert 8-bit levels k, whole numbers from 0 to 255 of any shape and dtype, to float32 pixels k/255 in [0,1].

    The division is float32's, so that a level becomes the same pixel everywhere: k/255 rounded once.
    """
    pixels = aligned_empty(levels.shape, np.float32)
    pixels[...] = levels
    pixels /= LEVELS
    return pixels
