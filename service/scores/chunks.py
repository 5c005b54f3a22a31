"""Row-wise functions evaluated in chunks of rows, which bounds the memory of their intermediate arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import numpy as np

NUMBERS = 2**17
"""Numbers of the first array in one chunk: a megabyte as float64."""

F = TypeVar("F", bound=Callable[..., np.ndarray])


def apply_in_chunks(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """Evaluate a function of arrays with N rows each, which gives an array of N rows, in chunks of rows.

    A row's result must not depend on the rows beside it.
    """
    first = arrays[0]
    size = max(1, NUMBERS // max(1, first[0].size)) if len(first) else 1
    if len(first) <= size:
        return function(*arrays)
    return np.concatenate([function(*(array[i : i + size] for array in arrays)) for i in range(0, len(first), size)])


def in_chunks(function: F) -> F:
    """Decorate a function of arrays of rows, and of nothing else: it is evaluated by ``apply_in_chunks``."""

    @wraps(function)
    def wrapped(*arrays: np.ndarray) -> np.ndarray:
        return apply_in_chunks(function, *arrays)

    return wrapped  # type: ignore[return-value]
