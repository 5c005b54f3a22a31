from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis
from scipy.stats import chi2, kstest, norm
from sklearn.covariance import ledoit_wolf

from service.scores.gaussian import Gaussian, normalised, quantiles, shrunk_covariance

MIXING = np.random.RandomState(0).standard_normal((6, 6))


def rows(n: int, size: int = 6, seed: int = 1) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal((n, size)) @ MIXING[:size, :size] + np.arange(size)


@pytest.mark.parametrize("n", [2, 3, 5, 20, 300])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_the_covariance_is_ledoit_and_wolf_s(n, size):
    drawn = rows(n, size)
    wanted, _ = ledoit_wolf(drawn)
    assert np.allclose(shrunk_covariance(drawn), wanted, rtol=1e-10, atol=1.01e-6)


@pytest.mark.parametrize("drawn", [np.zeros((10, 3)), np.ones((1, 3)), np.eye(3), rows(2)], ids=str)
def test_a_covariance_is_positive_definite_whatever_the_rows(drawn):
    covariance = shrunk_covariance(drawn)
    assert (np.linalg.eigvalsh(covariance) > 0).all()
    assert np.array_equal(covariance, covariance.T)


def test_the_distance_is_mahalanobis_s():
    drawn = rows(100)
    gaussian = Gaussian.fit(drawn)
    scale = drawn.std(axis=0)
    covariance = shrunk_covariance((drawn - drawn.mean(axis=0)) / scale) * np.outer(scale, scale)
    for row in rows(20, seed=2):
        wanted = mahalanobis(row, drawn.mean(axis=0), np.linalg.inv(covariance)) ** 2
        assert gaussian.distance(row) == pytest.approx(wanted, rel=1e-9)


def test_the_distance_of_many_gaussian_rows_is_chi_squared():
    gaussian = Gaussian.fit(rows(20000))
    distances = [gaussian.distance(row) for row in rows(1000, seed=3)]
    assert kstest(distances, chi2(6).cdf).pvalue > 0.01


@given(st.floats(1e-6, 1e6), st.floats(-1e3, 1e3))
def test_units_and_origins_do_not_matter(unit, origin):
    drawn, row = rows(50, 3), rows(1, 3, seed=4)[0]
    scales, shifts = np.array([unit, 1.0, 3.0]), np.array([origin * unit, -2.0, 0.0])
    moved = Gaussian.fit(drawn * scales + shifts).distance(row * scales + shifts)
    assert moved == pytest.approx(Gaussian.fit(drawn).distance(row), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e6])
@pytest.mark.parametrize("rounding", [0.0, 1e-9])
def test_a_statistic_that_never_changes_counts_by_a_thousandth_of_its_size(value, rounding):
    """And leaves the others as they are; a change by rounding is none."""
    drawn = rows(200, 3)
    jitter = np.random.RandomState(5).standard_normal((200, 1)) * rounding * (1 + abs(value))
    gaussian = Gaussian.fit(np.hstack([drawn, np.full((200, 1), value) + jitter]))
    unit = 1e-3 * (1 + abs(value))
    alone = Gaussian.fit(drawn).distance(drawn[0])
    for deviations in (0.0, 1.0, -3.0):
        distance = gaussian.distance(np.append(drawn[0], value + deviations * unit))
        assert distance == pytest.approx(alone + deviations**2, rel=1e-4, abs=1e-4)
    assert gaussian.distance(np.append(drawn[0], value * (1 + 1e-7))) == pytest.approx(alone, rel=1e-3)


def test_rows_that_are_all_equal_fit():
    gaussian = Gaussian.fit(np.tile([1.0, 0.0], (20, 1)))
    assert gaussian.distance(np.array([1.0, 0.0])) == 0
    assert gaussian.distance(np.array([1.002, 0.0])) == pytest.approx(1)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e300])
def test_an_infinite_statistic_is_far_and_finite(value):
    distance = Gaussian.fit(rows(50)).distance(np.append(rows(1)[0][:5], value))
    assert np.isfinite(distance)
    assert distance > 1e100


def test_nan_stays_nan():
    assert np.isnan(Gaussian.fit(rows(50)).distance(np.append(rows(1)[0][:5], np.nan)))


# Quantiles.


def test_skewed_rows_become_gaussian():
    random = np.random.RandomState(0)
    grid = quantiles(random.exponential(size=(5000, 2)))
    fresh = np.array([normalised(row, grid) for row in random.exponential(size=(1000, 2))])
    assert kstest(fresh[:, 0], norm.cdf).pvalue > 0.01
    assert kstest(fresh[:, 1], norm.cdf).pvalue > 0.01


def test_the_map_is_of_rank():
    """At a quantile of the rows stands Φ⁻¹ of its level: of 257 levels the middle is the median."""
    drawn = np.random.RandomState(1).lognormal(size=(999, 1))
    grid = quantiles(drawn)
    assert normalised(np.median(drawn, axis=0), grid)[0] == pytest.approx(0, abs=1e-3)
    for level in (0.1, 0.5, 0.9):
        assert normalised(np.quantile(drawn, level, axis=0), grid)[0] == pytest.approx(norm.ppf(level), abs=0.02)


discrete = st.lists(st.sampled_from([0.0, 1.0, 1.5, -3.0]), min_size=3, max_size=40)


@given(discrete, st.lists(st.floats(-10, 10), min_size=2, max_size=10))
def test_the_map_rises_everywhere_ties_or_not(values, probes):
    grid = quantiles(np.array(values)[:, None])
    assert (np.diff(grid) > 0).all()
    probes = sorted(set(probes))
    mapped = [normalised(np.array([probe]), grid)[0] for probe in probes]
    for low, high, step in zip(probes, probes[1:], np.diff(mapped), strict=False):
        assert step > 0 or high - low < 1e-12


@given(st.floats(-1e3, 1e3))
def test_a_change_by_rounding_of_what_never_changed_is_no_deviation(value):
    """Another processor may round a constant otherwise."""
    grid = quantiles(np.full((50, 1), value))
    assert normalised(np.array([value]), grid)[0] == pytest.approx(0, abs=1e-6)
    assert abs(normalised(np.array([value + 1e-7 * (1 + abs(value))]), grid)[0]) < 0.01


def test_beyond_the_quantiles_the_map_goes_on_straight():
    grid = quantiles(np.linspace(0, 1, 100)[:, None])
    far = np.array([normalised(np.array([x]), grid)[0] for x in (2.0, 3.0, 4.0, -1.0)])
    assert far[1] - far[0] == pytest.approx(far[2] - far[1])
    assert far[0] > 5
    assert far[3] < -5


@pytest.mark.parametrize("n", [1, 2, 255, 256, 5000])
def test_quantiles_are_few(n):
    assert quantiles(np.random.RandomState(0).standard_normal((n, 3))).shape == (3, min(257, n + 2))
