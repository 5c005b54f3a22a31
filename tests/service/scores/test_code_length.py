from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.scores.code_length import ESCAPE, MIN_ERROR, code_lengths, probability
from tests.ppca_bundle import images

pictures = hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
ERRORS = np.arange(-255, 256)


def nats(levels: np.ndarray) -> float:
    return float(code_lengths((levels / 255).astype(np.float32)[None])[0])


def decoder_s_length(levels: np.ndarray) -> float:
    """The same code as a decoder walks it: pixel by pixel, from what was decoded before, by LOCO-I's own wording."""
    total = 0.0
    for plane in levels.astype(int):
        errors = np.zeros(plane.shape)

        def at(values, i, j, width=plane.shape[1]):
            return values[i, j] if i >= 0 and 0 <= j < width else 0

        for i, j in np.ndindex(*plane.shape):
            a, b, c = at(plane, i, j - 1), at(plane, i - 1, j), at(plane, i - 1, j - 1)
            if c >= max(a, b):
                predicted = min(a, b)
            elif c <= min(a, b):
                predicted = max(a, b)
            else:
                predicted = a + b - c
            seen = [at(errors, i, j - 1), at(errors, i - 1, j), at(errors, i - 1, j - 1), at(errors, i - 1, j + 1)]
            mean = sum(seen) / 4 + MIN_ERROR
            theta = (math.sqrt(1 + mean**2) - 1) / mean
            errors[i, j] = abs(plane[i, j] - predicted)
            p = (1 - ESCAPE) * (1 - theta) / (1 + theta) * theta ** errors[i, j] + ESCAPE / 511
            total -= math.log(p)
    return total


@given(pictures)
def test_a_decoder_can_follow(levels):
    """Every pixel is coded from pixels decoded before it: the length is that of a code that can be read."""
    assert nats(levels) == pytest.approx(decoder_s_length(levels), rel=1e-12)


@pytest.mark.parametrize("expected", [MIN_ERROR, 0.3, 1.0, 20.0, 255.0])
def test_probabilities_sum_to_one_at_most(expected):
    """Kraft's inequality, and no more than the geometric's tails beyond ±255 is lost."""
    p = probability(np.abs(ERRORS).astype(float), np.full(len(ERRORS), expected))
    assert p.sum() <= 1 + 1e-12
    far = np.arange(-(10**5), 10**5 + 1)
    whole = probability(np.abs(far).astype(float), np.full(len(far), expected)) - ESCAPE / 511
    assert whole.sum() == pytest.approx(1 - ESCAPE, rel=1e-9)
    assert (whole * np.abs(far)).sum() == pytest.approx((1 - ESCAPE) * expected, rel=1e-6)


@pytest.mark.parametrize("level", [0, 1, 100, 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_constant_picture_costs_next_to_nothing(level, channels):
    """A channel's first pixel, at most 12 nats, some 5 for each of three neighbours, and a fortieth for all others."""
    picture = np.full((channels, 28, 28), level)
    assert 0 < nats(picture) < channels * (12 + 3 * 5 + 784 / 40)


def test_a_step_from_black_to_white_does_not_cost_a_picture():
    """One white pixel on black: it and its neighbour to the east are surprises of 12 nats, six more of less."""
    picture = np.zeros((1, 28, 28))
    empty = nats(picture)
    picture[0, 14, 14] = 255
    assert nats(picture) - empty < 70


def test_noise_takes_its_bits_and_no_picture_many_more():
    noise = np.random.RandomState(0).randint(256, size=(1, 64, 64))
    bits = nats(noise) / math.log(2) / noise.size
    assert 8 < bits < 9.5
    board = np.indices((28, 28)).sum(axis=0)[None] % 2 * 255
    assert nats(board) / math.log(2) / board.size < 11


def blurred(x: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    h, w = x.shape[2:]
    return np.mean([padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


def test_blur_shortens_and_noise_lengthens():
    x = images(20, (1, 16, 16))
    random = np.random.RandomState(1)
    lengths = [
        code_lengths(rows)
        for rows in (blurred(blurred(x)), blurred(x), x, np.clip(x + 0.2 * random.standard_normal(x.shape), 0, 1))
    ]
    for shorter, longer in itertools.pairwise(lengths):
        assert (shorter < longer).all()


@given(pictures)
def test_channels_add_up(levels):
    assert nats(levels) == pytest.approx(sum(nats(plane[None]) for plane in levels), rel=1e-12)


@given(pictures, st.floats(-0.4, 0.4))
def test_pixels_between_levels_are_rounded(levels, shift):
    assert code_lengths(((levels + shift) / 255)[None])[0] == nats(levels)


@given(pictures, st.integers(0, 2**31))
def test_rows_below_cost_more_and_change_nothing_above(levels, seed):
    """What was coded before does not depend on them, so the length only grows."""
    more = np.random.RandomState(seed).randint(256, size=levels.shape)
    tall = np.concatenate([levels, more], axis=1)
    assert nats(tall) > nats(levels)


def test_one_pixel():
    assert nats(np.zeros((1, 1, 1))) == pytest.approx(-math.log(probability(np.zeros(1), np.full(1, MIN_ERROR))[0]))
    assert nats(np.full((1, 1, 1), 255)) < 12
