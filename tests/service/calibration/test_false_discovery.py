from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from service.calibration.conformal import p_values
from service.calibration.false_discovery import benjamini_hochberg, min_discoveries, q_values
from service.errors import InvalidInput

batches = hnp.arrays(np.float64, st.integers(1, 40), elements=st.integers(0, 50).map(lambda i: i / 50))


@given(batches)
def test_q_values_are_the_adjusted_p_values_of_scipy(p):
    np.testing.assert_allclose(q_values(p), stats.false_discovery_control(p, method="bh"), rtol=1e-14)


@given(batches, st.floats(0.001, 0.999))
def test_the_procedure_calls_the_largest_step_up_set(p, rate):
    """As the paper states it: with j the largest rank of p_(j) ≤ j rate/N, call the j smallest (ties with them)."""
    rate += 1e-7 * np.sqrt(2)  # off the lattice of p j/N, where rounding alone decides
    ranked = np.sort(p)
    passing = [value for j, value in enumerate(ranked, 1) if value <= j * rate / len(p)]
    cut = max(passing, default=-1.0)
    np.testing.assert_array_equal(benjamini_hochberg(p, rate), p <= cut)


def batch_of_conformal_p_values(random, n, inliers, outliers, groups=1):
    """P-values of a batch against one calibration set a group."""
    parts = []
    for group in range(groups):
        calibration = np.sort(random.normal(0, 1 + group, n))
        scores = np.r_[random.normal(0, 1 + group, inliers), random.normal(4 + 4 * group, 1, outliers)]
        parts.append(p_values(calibration, scores))
    return np.concatenate(parts), np.tile(np.r_[np.ones(inliers, bool), np.zeros(outliers, bool)], groups)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_false_discovery_rate_is_kept_and_the_power_is_there(groups):
    """Mean share of inliers among the called over 2000 batches: at most rate · share of inliers, and close to it."""
    random, rate, shares, powers = np.random.RandomState(11), 0.2, [], []
    for _ in range(2000):
        p, inlier = batch_of_conformal_p_values(random, 200, 40, 10, groups)
        called = benjamini_hochberg(p, rate)
        shares.append((called & inlier).sum() / max(1, called.sum()))
        powers.append((called & ~inlier).sum() / (10 * groups))
    promised, error = rate * 0.8, np.std(shares) / np.sqrt(len(shares))
    assert promised - 6 * error - 0.02 < np.mean(shares) <= promised + 3 * error
    assert np.mean(powers) > 0.8


def test_calling_p_below_the_rate_does_not_control_the_false_discoveries():
    random = np.random.RandomState(12)
    shares = []
    for _ in range(300):
        p, inlier = batch_of_conformal_p_values(random, 200, 95, 5)
        shares.append(((p <= 0.2) & inlier).sum() / max(1, (p <= 0.2).sum()))
    assert np.mean(shares) > 0.6, "the difference that the procedure makes"


@pytest.mark.parametrize(("n", "batch", "rate"), [(99, 10, 0.1), (99, 1000, 0.1), (9, 1000, 0.01), (999, 64, 0.05)])
def test_so_many_must_be_extreme_before_one_is_called(n, batch, rate):
    min_count = min_discoveries(n, batch, rate)

    def called(extreme):
        p = np.ones(batch)
        p[:extreme] = 1 / (n + 1)
        return benjamini_hochberg(p, rate).sum()

    assert called(min(min_count, batch)) == (min_count if min_count <= batch else 0)
    assert called(min(min_count - 1, batch)) == 0


@pytest.mark.parametrize("bad", [[-0.1], [1.1], [np.nan], [[0.5]]])
def test_what_is_no_p_value_is_refused(bad):
    with pytest.raises(InvalidInput, match="p-values"):
        q_values(np.array(bad))


@pytest.mark.parametrize("rate", [0.0, 1.0, np.nan])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(InvalidInput, match="false_discovery_rate"):
        benjamini_hochberg(np.array([0.5]), rate)


def test_an_empty_batch_has_no_discoveries():
    assert benjamini_hochberg(np.empty(0), 0.1).tolist() == []
