"""Checks of fitted arrays, as detectors.npz holds them, when a bundle is loaded: they may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np

from service.bundle.manifest import DETECTORS
from service.errors import BundleFormatError

Arrays = dict[str, np.ndarray]


class ArraySpec(NamedTuple):
    """Requirements on one finite array of float32 or float64.

    ``shape``: sizes, a range of them where the bundle may choose. ``positive``: every number is > 0. ``order``: of the
    numbers along the last axis.
    """

    shape: tuple[int | range, ...]
    positive: bool = False
    order: Literal["rising", "not falling"] | None = None


ArraySpecs = Mapping[str, ArraySpec]
DISORDER = {"rising": "does not rise", "not falling": "falls"}


def keyed(by_score: Mapping[str, Arrays]) -> Arrays:
    """Arrays by PARAMETER of each SCORE, as a file holds them: by the key "SCORE/PARAMETER"."""
    return {f"{name}/{parameter}": array for name, own in by_score.items() for parameter, array in own.items()}


def by_score(arrays: Arrays) -> dict[str, Arrays]:
    """Undo ``keyed``."""
    found: dict[str, Arrays] = {}
    for key, array in arrays.items():
        name, _, parameter = key.rpartition("/")
        found.setdefault(name, {})[parameter] = array
    return found


def check_arrays(kind: str, arrays: Arrays, specs: ArraySpecs, file: str = DETECTORS) -> None:
    """Raise BundleFormatError unless ``arrays`` fulfil ``specs``, by name.

    The error names the ``file`` and the ``kind`` of what the arrays belong to.
    """
    if set(arrays) != set(specs):
        raise BundleFormatError(f"{file}: a {kind} has {sorted(arrays)}, expected {sorted(specs)}")
    for name, spec in specs.items():
        fault = _fault(arrays[name], spec)
        if fault:
            raise BundleFormatError(f"{file}: {name} of a {kind} {fault}")


def _fault(array: object, spec: ArraySpec) -> str | None:
    """The first requirement that the array breaks, in words, or None."""
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float64, np.float32):
        return "is no array of float32 or float64"
    if len(array.shape) != len(spec.shape) or not all(map(_fits, array.shape, spec.shape)):
        return f"has shape {array.shape}, expected ({', '.join(map(_size, spec.shape))})"
    if not np.isfinite(array).all():
        return "holds numbers that are not finite"
    if spec.positive and not (array > 0).all():
        return "holds numbers that are not positive"
    if spec.order and not _in_order(array, spec.order):
        return f"{DISORDER[spec.order]} along its last axis"
    return None


def _fits(size: int, expected: int | range) -> bool:
    return size in expected if isinstance(expected, range) else size == expected


def _size(expected: int | range) -> str:
    return f"{expected.start} to {expected.stop - 1}" if isinstance(expected, range) else str(expected)


def _in_order(array: np.ndarray, order: str) -> bool:
    steps = np.diff(array, axis=-1)
    return bool((steps > 0).all() if order == "rising" else (steps >= 0).all())
