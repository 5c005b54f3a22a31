"""Typicality, complexity and the debiased ELBO, against what they say of simulated passes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scores.code_length import code_lengths
from service.scores.detectors import (
    Complexity,
    Debiased,
    Typicality,
    stretched,
)
from tests.ppca_bundle import images
from tests.service.scores.detectors.simulated import definition, in_parts, simulated
from tests.service.scores.test_forward_pass import of_kind

# Typicality and complexity.


def test_typicality_looks_to_both_sides(manifest):
    random = np.random.RandomState(0)
    inliers = simulated(images(40), 100 + random.standard_normal(40))
    detector = Typicality.fit(in_parts(inliers), definition("typicality"), manifest)
    mean = -inliers.log_w.mean()
    probes = simulated(images(5), mean + np.array([0.0, 10.0, -10.0, 50.0, -3.0]))
    assert detector.score(probes) == pytest.approx([0, 10, 10, 50, 3], abs=1e-9)


def test_complexity_removes_what_the_length_explains(manifest):
    random, x = np.random.RandomState(0), images(60)
    lengths = code_lengths(x)
    surprisals = 0.7 * lengths + 30 + random.standard_normal(60)
    detector = Complexity.fit(in_parts(simulated(x, surprisals)), definition("complexity"), manifest)
    scores = detector.score(simulated(x, surprisals))
    assert scores == pytest.approx(surprisals - np.polyval(np.polyfit(lengths, surprisals, 1), lengths), abs=1e-6)
    assert abs(np.corrcoef(scores, lengths)[0, 1]) < 1e-6
    assert scores.mean() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("picture", [images(1)[0], np.full((1, 8, 8), 0.3, np.float32)], ids=["waves", "flat"])
def test_complexity_of_pictures_of_one_length_has_no_slope(manifest, picture):
    """Their mean length differs from each by rounding: that is no slope to fit."""
    x = np.stack([picture] * 49)
    surprisals = np.random.RandomState(0).standard_normal(49) + 100
    detector = Complexity.fit(in_parts(simulated(x, surprisals)), definition("complexity"), manifest)
    other = simulated(images(3, seed=8), np.full(3, 100.0))
    assert detector.score(other) == pytest.approx(100 - surprisals.mean() * np.ones(3))


# Debiased.


def costs(x: np.ndarray) -> np.ndarray:
    """−log p of a perfect reconstruction that depends on the level alone, as a likelihood of pixels has it."""
    return 3 - 2 * np.cos(5 * x.astype(np.float64)) + x


def test_levels_that_are_equally_well_reconstructed_have_no_bias(manifest):
    rates = np.array([1.0, 2.0, -0.5])
    fitted = Debiased.fit(in_parts(simulated(X, distortion=costs(X))), definition("debiased"), manifest)
    x = stretched(images(3, seed=4))
    surprisal = costs(x).sum(axis=(1, 2, 3)) + rates
    assert fitted.score(simulated(x, surprisal, costs(x))) == pytest.approx(rates, abs=0.3)
    assert np.ptp(surprisal) > 30 * 0.3


def test_a_level_s_best_is_its_95_percent_quantile_channel_by_channel(manifest):
    random = np.random.RandomState(0)
    x = random.choice([0.0, 0.2, 1.0], size=(50, 3, 4, 4)).astype(np.float32)
    places = random.exponential(size=x.shape) + np.arange(3)[:, None, None]
    of_colours = of_kind(
        manifest,
        preprocessing={"mode": "RGB", "height": 4, "width": 4},
        signature={"shape": [3, 4, 4], "latent_dim": 5, "noise_dim": 5},
    )
    best = Debiased.fit(in_parts(simulated(x, distortion=places)), definition("debiased"), of_colours).best
    for channel in range(3):
        for level in (0, 51, 255):
            chosen = -places[:, channel][np.rint(x[:, channel] * 255) == level]
            assert best[channel, level] == pytest.approx(np.quantile(chosen, 0.95))
        known = best[channel, [0, 51, 255]]
        assert np.allclose(best[channel], np.interp(np.arange(256), [0, 51, 255], known))


X = stretched(images(200))


@given(st.floats(0.3, 1.0), st.floats(0, 1))
def test_contrast_and_brightness_are_stretched_away(contrast, brightness):
    x = images(3, (1, 16, 16))
    faded = (x * contrast + brightness * (1 - contrast)).astype(np.float32)
    assert np.abs(stretched(faded) - stretched(x)).max() <= 1.001 / 255


def test_stretching_sends_the_5th_and_95th_percentile_to_0_and_1():
    x = images(4, (3, 10, 10)) * 0.5 + 0.2
    out = stretched(x)
    assert np.allclose(out * 255, np.rint(out * 255), atol=1e-4)
    for image, result in zip(x, out, strict=True):
        low, high = np.percentile(image, [5, 95])
        assert (result[image <= low] == 0).all()
        assert (result[image >= high] == 1).all()
        inside = (image > low) & (image < high)
        assert np.allclose(result[inside], (image[inside] - low) / (high - low), atol=0.51 / 255)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_what_has_no_contrast_stays(value):
    x = np.full((1, 1, 8, 8), np.rint(value * 255) / 255, np.float32)
    assert np.array_equal(stretched(x), x)
    x[0, 0, 3, 3] = 0.0  # one pixel in 64 is beyond the percentiles
    assert np.array_equal(stretched(x), x)


def test_stretching_leaves_its_input_and_a_row_to_itself():
    x = images(5)
    kept = x.copy()
    together = stretched(x)
    assert np.array_equal(x, kept)
    assert all(np.array_equal(stretched(x[i : i + 1])[0], together[i]) for i in range(5))
