"""8-bit levels and the pixels in [0, 1] that they stand for: the one place where levels are divided by 255."""

from __future__ import annotations

import numpy as np

from service.aligned import aligned_empty

LEVELS = np.float32(255)


def unit_levels(levels: np.ndarray) -> np.ndarray:
    """8-bit levels, whole numbers 0 to 255 of any shape and dtype -> float32 pixels level/255 in [0,1].

    The division is float32's, the same number everywhere: k/255 rounded once.
    """
    pixels = aligned_empty(levels.shape, np.float32)
    pixels[...] = levels
    pixels /= LEVELS
    return pixels
