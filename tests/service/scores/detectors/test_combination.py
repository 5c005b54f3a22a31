"""Tail probabilities joined by Fisher's method."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import gamma, kstest

from service.scores.detectors import Combination
from service.scores.tail import fit_tails


@pytest.mark.parametrize("parts", [1, 3])
def test_a_combination_of_independent_parts_is_fisher_s(parts):
    """−log of a uniform probability is exponential, the sum of P of them gamma: on rows that nothing was fitted to."""
    random = np.random.RandomState(0)
    combination = Combination(fit_tails(random.standard_normal((5000, parts))))
    fresh = random.standard_normal((2000, parts))
    scores = combination.score(list(fresh.T))
    assert kstest(scores, gamma(parts).cdf).pvalue > 0.01
