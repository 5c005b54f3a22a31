"""Complexity of images: the length of an ideal lossless code, which no compressor's version changes.

Serra et al. 2020 (arXiv:1909.11480) subtract an image's complexity L(x), measured by a compressor, from its negative
log-likelihood. This is the length that an ideal arithmetic coder would reach with the predictor of LOCO-I (Weinberger
et al. 2000, sec. III-A) and two-sided geometric residuals whose scale follows the errors of the causal neighbours (in
the spirit of its context modelling). As LOCO-I bounds the length of a code word, so does an escape here: without it a
single step from black to white would cost more than the rest of a picture.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from service.scores.chunks import in_chunks

LEVELS = 255.0
MIN_ERROR = 0.02
"""Mean error that a context without errors is taken to predict: no pixel is coded for free."""
ESCAPE = 1 / 256
"""Probability that an error does not follow its context's distribution, but is uniform on the 511 possible ones."""


@in_chunks
def code_lengths(x: np.ndarray) -> np.ndarray:
    """Code length of each image in nats, float64 [N], of x [N,C,H,W], pixels in [0, 1] that are rounded to 8 bits.

    Each pixel is predicted from its causal neighbours by the median edge detector; its error e is coded with
    P(e) = (1 − ε) (1 − θ)/(1 + θ) θ^|e| + ε/511, where θ gives |e| the mean that the errors at these neighbours had and
    ε is ESCAPE. A pixel takes 12 nats at most.
    """
    levels = np.rint(x.astype(np.float64) * LEVELS).astype(np.int16)
    west, north, north_west, _ = _neighbours(levels)
    # The median of west, north and west + north − north-west.
    predicted = np.clip(west + north - north_west, np.minimum(west, north), np.maximum(west, north))
    error = np.abs(levels - predicted)
    west, north, north_west, north_east = _neighbours(error)
    lengths = -np.log(_probabilities(error, west + north + north_west + north_east))
    total: np.ndarray = lengths.reshape(len(x), -1).sum(axis=1)
    return total


def probability(error: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """P(e) of errors of size ``error`` where the mean size is ``expected``, arrays of one shape.

    Σ P ≤ 1 over e = −255 … 255.
    """
    theta = _theta(expected)
    return _with_escape((1 - theta) / (1 + theta), theta, error)


def _probabilities(error: np.ndarray, neighbours_sum: np.ndarray) -> np.ndarray:
    """P(e) of errors whose four neighbours' errors add up to ``neighbours_sum``, int16 both."""
    theta, share = _by_sum()
    return _with_escape(share.take(neighbours_sum), theta.take(neighbours_sum), error)


@cache
def _by_sum() -> tuple[np.ndarray, np.ndarray]:
    """Tables of θ and (1 − θ)/(1 + θ), indexed by the sum of four neighbours' errors, 0 … 4·255."""
    theta = _theta(np.arange(4 * int(LEVELS) + 1) / 4 + MIN_ERROR)
    return theta, (1 - theta) / (1 + theta)


def _theta(expected: np.ndarray) -> np.ndarray:
    """The θ of a two-sided geometric distribution of that mean size: the solution of 2θ/(1 − θ²) = E|e|."""
    theta: np.ndarray = (np.sqrt(1 + expected**2) - 1) / expected
    return theta


def _with_escape(share: np.ndarray, theta: np.ndarray, error: np.ndarray) -> np.ndarray:
    """(1 − ε) share θ^|e| + ε/511, with ``share`` = (1 − θ)/(1 + θ)."""
    probability: np.ndarray = share * theta**error
    probability *= 1 - ESCAPE
    probability += ESCAPE / (2 * LEVELS + 1)
    return probability


def _neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """West, north, north-west and north-east neighbours of every pixel, 0 beyond the edge: [N,C,H,W] each."""
    n, channels, height, width = values.shape
    padded = np.zeros((n, channels, height + 1, width + 2), values.dtype)
    padded[:, :, 1:, 1:-1] = values
    return padded[:, :, 1:, :-2], padded[:, :, :-1, 1:-1], padded[:, :, :-1, :-2], padded[:, :, :-1, 2:]
