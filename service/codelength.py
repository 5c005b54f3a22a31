"""How complex a picture is: the ideal length of a lossless code, the same on every machine.

Serra et al. 2020 (arXiv:1909.11480, eq. 3) subtract an image's complexity L(x), measured by a compressor, from its
negative log-likelihood. A compressor's length changes with its version; this is the length that an ideal arithmetic
coder would reach with the predictor of LOCO-I (Weinberger et al. 2000, sec. III-A) and two-sided geometric residuals
whose scale follows the errors of the causal neighbours (in the spirit of its context modelling).
"""

from __future__ import annotations

import numpy as np

LEVELS = 255.0
LEAST_ERROR = 0.02  # mean error that a context of zeros is taken to promise: no pixel is for free


def code_length(x: np.ndarray) -> float:
    """Nats to code one image [C,H,W] of pixels in [0, 1], rounded to 8 bits.

    Each pixel is predicted from its causal neighbours by the median edge detector; its error e is coded with
    P(e) = (1 − θ)/(1 + θ) θ^|e|, where θ gives |e| the mean that the errors at these neighbours had.
    """
    levels = np.rint(x.astype(np.float64) * LEVELS)
    west, north, north_west, _ = _neighbours(levels)
    high, low = np.maximum(west, north), np.minimum(west, north)
    predicted = np.where(north_west >= high, low, np.where(north_west <= low, high, west + north - north_west))
    error = np.abs(levels - predicted)
    expected = sum(_neighbours(error)) / 4 + LEAST_ERROR
    theta = (np.sqrt(1 + expected**2) - 1) / expected  # solves 2θ/(1 − θ²) = E|e|
    return float(-(np.log((1 - theta) / (1 + theta)) + error * np.log(theta)).sum())


def _neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The pixels to the west, north, north-west and north-east of each, 0 beyond the edge: [C,H,W] each."""
    padded = np.pad(values, ((0, 0), (1, 0), (1, 1)))
    return padded[:, 1:, :-2], padded[:, :-1, 1:-1], padded[:, :-1, :-2], padded[:, :-1, 2:]
