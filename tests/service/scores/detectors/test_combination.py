"""Tail probabilities joined by Fisher's method."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import expon, gamma, kstest

from service.scores.detectors import (
    Combination,
)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_combination_of_independent_parts_is_fisher_s(parts):
    """−log of a uniform probability is exponential, the sum of P of them gamma: on rows that nothing was fitted to."""
    random = np.random.RandomState(0)
    combination = Combination.fit(random.standard_normal((5000, parts)))
    fresh = random.standard_normal((2000, parts))
    scores = combination.score(list(fresh.T))
    assert kstest(scores, gamma(parts).cdf).pvalue > 0.01


def test_inside_the_scores_the_probability_is_a_share():
    scores = np.random.RandomState(1).permutation(np.arange(200.0))[:, None]
    surprisals = Combination.fit(scores).score([np.array([-5.0, 0, 50, 100, 179])])
    assert surprisals == pytest.approx(-np.log([1, 1, 150 / 200, 100 / 200, 21 / 200]))


def test_the_tail_is_exponential_beyond_the_90_percent_quantile():
    random = np.random.RandomState(0)
    slopes = []
    for _ in range(300):
        combination = Combination.fit(random.exponential(2.0, (60, 1)))
        far = combination.score([np.array([100.0, 101.0])])
        slopes.append(far[1] - far[0])
    # σ is the mean of 6 excesses of mean 2
    assert kstest(1 / np.array(slopes), gamma(6, scale=2 / 6).cdf).pvalue > 0.01
    exact = Combination.fit(expon(scale=2).ppf((np.arange(10**5) + 0.5) / 10**5)[:, None])
    probes = np.array([1.0, 4.0, 6.0, 30.0])
    assert exact.score([probes]) == pytest.approx(probes / 2, rel=0.01)


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(2, 60), st.just(2)), elements=st.sampled_from([0.0, 1.0, 2.5, -9.0]))
)
def test_tied_scores_count_all_that_are_as_high(scores):
    n = len(scores)
    combination = Combination.fit(scores)
    below = min(math.ceil(0.9 * n), n - 1)
    for index in range(2):
        for value in np.unique(np.sort(scores[:, index])[:below]):
            share = (scores[:, index] >= value).mean()
            assert combination.arrays["surprisals"][index][
                combination.arrays["knots"][index] == value
            ] == pytest.approx(-np.log(share))
    probes = np.linspace(-10, 5, 50)
    assert (np.diff(combination.score([probes, probes])) >= 0).all()


@pytest.mark.parametrize("value", [0.0, -400.0])
def test_a_part_that_never_changed_is_not_decided_by_rounding(value):
    combination = Combination.fit(np.full((50, 1), value))
    scores = combination.score([np.array([value, value * (1 + 1e-12) + 1e-12, value + 1.0])])
    assert np.isfinite(scores).all()
    assert scores[:2] == pytest.approx([0, 0], abs=1e-3)
    assert scores[2] > 1000


def test_many_scores_keep_few_knots():
    combination = Combination.fit(np.random.RandomState(0).standard_normal((3000, 2)))
    assert combination.arrays["knots"].shape == (2, 256)
