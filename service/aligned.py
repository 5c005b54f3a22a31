"""Arrays at addresses divisible by 64, where vectorised kernels always start alike."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

BYTES = 64


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """An array of undefined numbers, in C order."""
    dtype = np.dtype(dtype)
    length = math.prod(shape) * dtype.itemsize
    raw = np.empty(length + BYTES, np.uint8)
    start = -_address(raw) % BYTES
    return raw[start : start + length].view(dtype).reshape(shape)


def is_aligned(array: np.ndarray) -> bool:
    """Whether it is such an array."""
    return array.flags.c_contiguous and _address(array) % BYTES == 0


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
