"""The streams are frozen: these numbers must never change, or scores of yesterday are not those of today."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from scipy.stats import kstest

from service.inference import noise


def test_noise_streams_are_frozen():
    assert noise.posterior_noise(0, 2, 2).ravel().tolist() == [
        np.float32(value) for value in (1.764052345967664, 0.4001572083672233, 0.9787379841057392, 2.240893199201458)
    ]
    assert noise.prior_noise(0, 2, 2).tolist() == noise.posterior_noise(0, 2, 2).tolist()


def test_a_stream_begins_anew_whatever_the_thread_drew_before():
    """Normal numbers are drawn in pairs: of an odd count the second of a pair is left."""
    wanted = np.random.RandomState(7).standard_normal((3, 5)).astype(np.float32)
    for count in (0, 1, 2, 3):
        noise.prior_noise(11, 1, count)
        assert noise.prior_noise(7, 3, 5).tobytes() == wanted.tobytes()
    fresh = np.random.RandomState([7, noise.CHOICE]).randint(2**23, size=4)
    assert noise.prior_choice(7, 4).tolist() == ((fresh + 0.5) / 2**23).astype(np.float32).tolist()


def test_streams_of_several_threads_are_their_own():
    wanted = {seed: noise.prior_noise(seed, 50, 7).tobytes() for seed in range(8)}
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda seed: noise.prior_noise(seed % 8, 50, 7).tobytes(), range(2000)))
    assert found == [wanted[seed % 8] for seed in range(2000)]


def test_callers_seeds_do_not_fill_memory():
    """Arrays of 128 KB for 32 seeds: a few stay, not one a seed."""
    tracemalloc.start()
    for seed in range(32):
        noise.posterior_noise(seed, 1024, 32)
        noise.dither(seed, (1, 128, 256))
        noise.observation_noise(seed, (1, 128, 256), "uniform")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for cache in (noise.posterior_noise, noise.dither, noise.observation_noise):
        cache.cache_clear()
    assert held < 3 * 9 * 4 * 2**15


def test_uniform_noise_is_uniform_and_never_0_or_1():
    u = noise.dither(3, (1, 200, 200))
    assert kstest(u.ravel(), "uniform").pvalue > 0.01
    assert 0 < u.min() <= u.max() < 1
    extremes = (np.array([0.5, noise.RESOLUTION - 0.5]) / noise.RESOLUTION).astype(np.float32)
    assert (extremes > 0).all()
    assert (extremes < 1).all()


def test_streams_of_one_seed_differ():
    a, b = noise.dither(3, (1, 8, 8)), noise.observation_noise(3, (1, 8, 8), "uniform")
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.4
    with pytest.raises(ValueError, match="read-only"):
        a[0, 0, 0] = 1
