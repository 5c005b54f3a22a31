"""Averages of maps: over neighbouring places with Gaussian weights, and over channels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

REACH = 3
"""Deviations at which the kernel ends."""
LONGEST_PRODUCT = 256
"""Length of the longest axis for which one product with a matrix is faster than a sum of shifted slices."""


def smoothed(values: np.ndarray, sigma: float) -> np.ndarray:
    """Average values [N,…,H,W] along the last two axes with Gaussian weights; the edges are mirrored.

    ``sigma`` is in places; with 0, and along an axis of one place, the values stay as they are. A row's result depends
    on its own numbers alone, bitwise.
    """
    if not sigma:
        return values
    height, width = values.shape[-2:]
    down = _along(values, sigma, -2) if height > 1 else values
    return _along(down, sigma, -1) if width > 1 else down


def channel_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the channels: [N,C,H,W] -> [N,H,W]."""
    mean: np.ndarray = values.mean(axis=1) if values.shape[1] > 1 else values[:, 0]
    return mean


def _along(values: np.ndarray, sigma: float, axis: int) -> np.ndarray:
    if values.shape[axis] > LONGEST_PRODUCT:
        return _by_shifts(values, _kernel(sigma), axis % values.ndim)
    matrix = _matrix(values.shape[axis], sigma)
    averaged: np.ndarray = matrix @ values if axis == -2 else values @ matrix.T
    return averaged


@lru_cache
def _matrix(size: int, sigma: float) -> np.ndarray:
    """Matrix [size,size] of the averages along an axis: row i holds the weights of the places that enter place i."""
    return _by_shifts(np.eye(size), _kernel(sigma), 0)


def _kernel(sigma: float) -> np.ndarray:
    """Gaussian weights that sum to 1, from −REACH to REACH sigmas."""
    radius = int(np.ceil(REACH * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.asarray(weights / weights.sum())


def _by_shifts(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    """Weighted averages along an axis, as a sum of shifted slices."""
    size, radius = values.shape[axis], len(weights) // 2
    widths = [(radius, radius) if at == axis else (0, 0) for at in range(values.ndim)]
    padded = np.moveaxis(np.pad(values, widths, mode="symmetric"), axis, 0)
    total = weights[0] * padded[:size]
    for shift in range(1, len(weights)):
        total += weights[shift] * padded[shift : shift + size]
    return np.moveaxis(total, 0, axis)
