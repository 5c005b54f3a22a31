"""Averages over the neighbouring places of a row, with Gaussian weights, and over its channels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

REACH = 3  # deviations at which the kernel ends
MOST_PLACES = 256  # along an axis, up to which one product with a matrix is faster than a sum of shifted slices


def smoothed(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian averages along the last two axes, whose edges are mirrored; sigma in places, 0: as they are.

    An axis of one place stays as it is. What comes out of a row depends on its own shape alone, bitwise.
    """
    if not sigma:
        return values
    height, width = values.shape[-2:]
    down = _along(values, sigma, -2) if height > 1 else values
    return _along(down, sigma, -1) if width > 1 else down


def channel_mean(values: np.ndarray) -> np.ndarray:
    """[N,C,H,W] -> [N,H,W]."""
    mean: np.ndarray = values.mean(axis=1) if values.shape[1] > 1 else values[:, 0]
    return mean


def _along(values: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    if values.shape[axis] > MOST_PLACES:
        return _by_shifts(values, _kernel(sigma), axis % values.ndim)
    matrix = _matrix(values.shape[axis], sigma)
    averaged: np.ndarray = matrix @ values if axis == -2 else values @ matrix.T
    return averaged


@lru_cache
def _matrix(size: int, sigma: float) -> np.ndarray:
    """[size,size]: row i holds the weights of the places that the average at i is of."""
    return _by_shifts(np.eye(size), _kernel(sigma), 0)


def _kernel(sigma: float) -> np.ndarray:
    radius = int(np.ceil(REACH * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def _by_shifts(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    size, radius = values.shape[axis], len(weights) // 2
    widths = [(radius, radius) if at == axis else (0, 0) for at in range(values.ndim)]
    padded = np.moveaxis(np.pad(values, widths, mode="symmetric"), axis, 0)
    total = weights[0] * padded[:size]
    for shift in range(1, len(weights)):
        total += weights[shift] * padded[shift : shift + size]
    return np.moveaxis(total, 0, axis)
