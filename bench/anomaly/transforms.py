"""What becomes of an image that is no inlier any more: whole-image transformations, uint8 [N,1,H,W] -> the same.

Random ones draw from the RandomState that they are given, so that equal seeds give equal images.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

BLUR_SIGMA, NOISE_SIGMA, JPEG_QUALITY = 1.5, 0.2, 5

Transform = Callable[[np.ndarray, np.random.RandomState], np.ndarray]


def rotated(x: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """By 90° counter-clockwise."""
    return np.ascontiguousarray(np.rot90(x, axes=(2, 3)))


def inverted(x: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """255 − x."""
    return 255 - x


def blurred(x: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Gaussian blur of σ = BLUR_SIGMA pixels, over the image's own edge repeated."""
    smooth = gaussian_filter(x.astype(np.float32), (0, 0, BLUR_SIGMA, BLUR_SIGMA), mode="nearest")
    return as_levels(smooth)


def noisy(x: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Gaussian noise of σ = NOISE_SIGMA of the range, clipped to it."""
    return as_levels(x + 255 * NOISE_SIGMA * random.standard_normal(x.shape))


def uniform_noise(x: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Every pixel uniform on 0 … 255; of x only the shape counts."""
    return random.randint(256, size=x.shape, dtype=np.uint8)


def constant(x: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """One level an image, uniform on 0 … 255; of x only the shape counts."""
    levels = random.randint(256, size=(len(x), 1, 1, 1), dtype=np.uint8)
    return np.broadcast_to(levels, x.shape).copy()


def jpeg(x: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Through JPEG at quality JPEG_QUALITY and back."""
    return np.stack([_through_jpeg(image[0])[None] for image in x])


TRANSFORMS: dict[str, Transform] = {
    "rotated": rotated,
    "inverted": inverted,
    "blurred": blurred,
    "noisy": noisy,
    "uniform-noise": uniform_noise,
    "constant": constant,
    "jpeg": jpeg,
}


def as_levels(x: np.ndarray) -> np.ndarray:
    """Numbers on the scale 0 … 255 -> the nearest levels, uint8."""
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)


def _through_jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return np.asarray(Image.open(buffer).convert("L"))
