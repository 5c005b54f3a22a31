"""Estimators of bounds from importance weights, and their Monte-Carlo errors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from service.scores import bounds as estimators


@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
def test_the_standard_error_is_the_spread_of_the_bound(estimator):
    """Against 4000 repetitions on log-normal weights; 4% is over 3 errors of a standard deviation of 4000 numbers."""
    log_w = 0.5 * np.random.RandomState(0).standard_normal((4000, 200)) - 100
    bound = estimators.mean(log_w) if estimator == "elbo" else estimators.log_mean_exp(log_w)
    assert estimators.standard_error(log_w, estimator).mean() == pytest.approx(bound.std(), rel=0.04)


def test_the_standard_error_is_unbiased_at_small_k():
    log_w = np.random.RandomState(0).standard_normal((20_000, 3))
    errors = estimators.standard_error(log_w, "elbo")
    assert (errors**2).mean() == pytest.approx(1 / 3, rel=0.04)


def test_log_mean_exp_is_stable_and_exact():
    log_w = np.array([[-2000.0, -2000.0], [5000.0, 4990.0], [-np.inf, -np.inf], [-np.inf, 0.0]])
    wanted = logsumexp(log_w, axis=1) - np.log(2)
    assert np.allclose(estimators.log_mean_exp(log_w), wanted, rtol=1e-15, equal_nan=False)
