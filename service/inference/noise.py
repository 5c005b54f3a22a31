"""Random numbers by seed, from ``numpy.random.RandomState``: NumPy guarantees that its streams never change.

Standard normal noise comes from the stream RandomState(seed); every other kind i has a stream RandomState([seed, i]) of
its own. Numbers are float32. Arrays that many calls share are read-only.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np

DITHER, OBSERVATION, CHOICE = 1, 2, 3
"""Second word of the seed of each kind of noise but the standard normal one."""
RESOLUTION = 2**23
CACHED = 8
"""Arrays of each kind that are kept: enough for the bundles' own scores, since callers may choose any seed and size."""


@lru_cache(maxsize=CACHED)
def posterior_noise(seed: int, k: int, noise_dim: int) -> np.ndarray:
    """Standard normal [k, noise_dim], shared by all images; the first rows of a larger k are those of a smaller."""
    return _frozen(_stream(seed).standard_normal((k, noise_dim)).astype(np.float32))


@lru_cache(maxsize=CACHED)
def posterior_chunk(seed: int, k: int, noise_dim: int, start: int, chunk: int) -> np.ndarray:
    """Samples ``start`` to ``start + chunk`` of ``posterior_noise``, [chunk, noise_dim]; zeros beyond k."""
    padded = np.zeros((chunk, noise_dim), np.float32)
    samples = posterior_noise(seed, k, noise_dim)[start : start + chunk]
    padded[: len(samples)] = samples
    return _frozen(padded)


@lru_cache(maxsize=CACHED)
def dither(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Uniform numbers in (0, 1), [C,H,W], shared by all images."""
    return _frozen(_uniform(_stream([seed, DITHER]), shape))


@lru_cache(maxsize=CACHED)
def observation_noise(seed: int, shape: tuple[int, int, int], distribution: str) -> np.ndarray:
    """Noise of one draw x ~ p(x|z), [C,H,W]: ``distribution`` is "uniform" in (0, 1) or "standard_normal"."""
    random = _stream([seed, OBSERVATION])
    if distribution == "uniform":
        return _frozen(_uniform(random, shape))
    return _frozen(random.standard_normal(shape).astype(np.float32))


def prior_noise(seed: int, n: int, noise_dim: int) -> np.ndarray:
    """Standard normal [n, noise_dim]; the first rows of a larger n are those of a smaller."""
    return _stream(seed).standard_normal((n, noise_dim)).astype(np.float32)


def prior_choice(seed: int, n: int) -> np.ndarray:
    """Uniform numbers in (0, 1), [n]; the first of a larger n are those of a smaller."""
    return _uniform(_stream([seed, CHOICE]), (n,))


def _stream(seed: int | list[int]) -> np.random.RandomState:
    """Begin the stream RandomState(seed) on this thread, which ends the one that it was given before.

    A new RandomState would first ask the operating system for a seed, for 80 µs; reseeding takes 1 µs.
    """
    if not hasattr(_of_thread, "random"):
        _of_thread.random = np.random.RandomState()
    random: np.random.RandomState = _of_thread.random
    random.seed(seed)
    return random


_of_thread = threading.local()


def _uniform(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Midpoints (i + ½)/2²³: exact in float32, and neither 0 nor 1, where a logit would be infinite."""
    return ((random.randint(RESOLUTION, size=shape) + 0.5) / RESOLUTION).astype(np.float32)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array
