"""Textures by scipy's filter and by their formulas, and the least spread that a plain place is given."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from service.scores.maps.textures import TEXTURES, ExpectedEnergy, textures

SIGMA, UNIT = 1.5, 0.2


def averaged(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian averages over the last two axes, of weights that end at three deviations."""
    radius = int(np.ceil(3 * sigma))
    return gaussian_filter(image, sigma, mode="reflect", radius=radius, axes=(-2, -1))


@pytest.mark.parametrize("channels", [1, 3])
def test_textures_are_averages_of_slopes_details_and_brightness(channels):
    """Over 5/3 of the map's sigma; a detail is what 2/3 of it does not average away."""
    random = np.random.RandomState(0)
    x, mean = random.random_sample((2, 2, channels, 20, 17)).astype(np.float32)
    u = x.astype(np.float64) / UNIT
    slope = np.zeros_like(u)
    slope[:, :, :-1] += np.abs(np.diff(u, axis=2)) / 2
    slope[:, :, :, :-1] += np.abs(np.diff(u, axis=3)) / 2
    slope, detail = slope.mean(1), ((u - averaged(u, SIGMA * 2 / 3)) ** 2).mean(1)
    result = textures(x, mean, UNIT, SIGMA)
    np.testing.assert_allclose(result[:, 0], np.log(averaged(slope, SIGMA * 5 / 3) + 0.1))
    np.testing.assert_allclose(result[:, 1], np.log(averaged(detail, SIGMA * 5 / 3) + 0.01))
    np.testing.assert_allclose(result[:, 2], averaged(mean.astype(np.float64).mean(1) / UNIT, SIGMA * 5 / 3), rtol=1e-6)
    np.testing.assert_allclose(result[:, 3], np.log(slope.mean((1, 2)) + 0.1)[:, None, None] * np.ones((2, 20, 17)))


def test_no_spread_is_less_than_a_fifth_of_the_mean_one():
    """Places of the lowest texture hardly differ; those of the highest do, by 1 on average, and the mean is ½."""
    random, texture = np.random.RandomState(0), np.repeat([0.0, 1.0], 2000)
    energies = np.where(texture > 0, random.choice([-1.0, 1.0], 4000), 1e-9 * random.normal(size=4000))
    measured = np.zeros((1, TEXTURES, 1, 4000))
    measured[0, 0, 0] = texture
    fitted = ExpectedEnergy.fit(energies[None, None], measured)
    assert fitted.least == pytest.approx(0.2 * 0.5, rel=0.05)
    excess = fitted.excess(np.full((1, 1, 4000), 3.0), measured)[0, 0]
    assert excess[0] == pytest.approx(3 / 0.1, rel=0.05)
    assert excess[-1] == pytest.approx(3 / 1.0, rel=0.05)
