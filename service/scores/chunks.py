"""Many rows, a few at a time: an expression over all of them would hold intermediate arrays of all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import numpy as np

NUMBERS = 2**17  # of x that go through at once: a megabyte as float64

F = TypeVar("F", bound=Callable[..., np.ndarray])


def apply_in_chunks(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """``function`` of arrays of N rows each, which gives an array of N rows: that of all, by a few rows at a time.

    Each row must come out as it does alone.
    """
    first = arrays[0]
    size = max(1, NUMBERS // max(1, first[0].size)) if len(first) else 1
    if len(first) <= size:
        return function(*arrays)
    return np.concatenate([function(*(array[i : i + size] for array in arrays)) for i in range(0, len(first), size)])


def in_chunks(function: F) -> F:
    """A function of arrays of rows, and of nothing else, that goes through them as ``apply_in_chunks`` does."""

    @wraps(function)
    def wrapped(*arrays: np.ndarray) -> np.ndarray:
        return apply_in_chunks(function, *arrays)

    return wrapped  # type: ignore[return-value]
