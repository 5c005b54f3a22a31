"""Tails of scores: shares of the fitted ones, exponential beyond."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import expon, gamma, kstest

from service.scores.tail import Tail, fit_tails


def fitted(scores: np.ndarray) -> Tail:
    (tail,) = fit_tails(scores[:, None])
    return tail


def test_inside_the_scores_the_probability_is_a_share():
    tail = fitted(np.random.RandomState(1).permutation(np.arange(200.0)))
    surprisals = tail.surprisal(np.array([-5.0, 0, 50, 100, 179]))
    assert surprisals == pytest.approx(-np.log([1, 1, 150 / 200, 100 / 200, 21 / 200]))


def test_beyond_the_90_percent_quantile_it_is_exponential():
    random = np.random.RandomState(0)
    slopes = []
    for _ in range(300):
        far = fitted(random.exponential(2.0, 60)).surprisal(np.array([100.0, 101.0]))
        slopes.append(far[1] - far[0])
    # σ is the mean of 6 excesses of mean 2
    assert kstest(1 / np.array(slopes), gamma(6, scale=2 / 6).cdf).pvalue > 0.01
    exact = fitted(expon(scale=2).ppf((np.arange(10**5) + 0.5) / 10**5))
    probes = np.array([1.0, 4.0, 6.0, 30.0])
    assert exact.surprisal(probes) == pytest.approx(probes / 2, rel=0.01)


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(2, 60), st.just(2)), elements=st.sampled_from([0.0, 1.0, 2.5, -9.0]))
)
def test_tied_scores_count_all_that_are_as_high(scores):
    n = len(scores)
    below = min(math.ceil(0.9 * n), n - 1)
    for column, tail in zip(scores.T, fit_tails(scores), strict=True):
        for value in np.unique(np.sort(column)[:below]):
            assert tail.surprisals[tail.knots == value] == pytest.approx(-np.log((column >= value).mean()))
        assert (np.diff(tail.surprisal(np.linspace(-10, 5, 50))) >= 0).all()


@pytest.mark.parametrize("value", [0.0, -400.0])
def test_a_score_that_never_changed_is_not_decided_by_rounding(value):
    surprisals = fitted(np.full(50, value)).surprisal(np.array([value, value * (1 + 1e-12) + 1e-12, value + 1.0]))
    assert np.isfinite(surprisals).all()
    assert surprisals[:2] == pytest.approx([0, 0], abs=1e-3)
    assert surprisals[2] > 1000


def test_many_scores_keep_few_knots():
    assert fitted(np.random.RandomState(0).standard_normal(3000)).knots.shape == (256,)


def test_its_curve_is_the_same_function():
    random = np.random.RandomState(0)
    tail, probes = fitted(random.standard_normal(500)), random.uniform(-6, 9, 1000)
    np.testing.assert_allclose(tail.curve()(probes), tail.surprisal(probes), atol=1e-12)
