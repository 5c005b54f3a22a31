"""The p-value of contamination, against an oracle: scipy's laws and the likelihood as the docstring has it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from service.calibration.contamination import contamination

OWN, DRAWN = 399, 2000  # replicates that the service draws, and the oracle
RATIOS = 2 ** np.linspace(1e-3, 1.5, 32) - 1  # of ξ to σ times the median, which a law of such a ξ has as its median


def maxima(upper: np.ndarray, max_count: int) -> tuple[np.ndarray, np.ndarray]:
    """Both scans' maxima, [2,…], and ξ below all suspects, […], of ascending exceedances […,m].

    A generalised Pareto law is fitted to all but the top k, which are known to be beyond the edge: at a ratio ξ/σ the
    likelihood is highest where ξ is the mean of log(1 + yξ/σ).
    """
    logs = np.log1p((RATIOS / np.median(upper, axis=-1, keepdims=True))[..., None] * upper[..., None, :])
    gaps, blocks = [], []
    for k in range(1, max_count + 1):
        kept = upper.shape[-1] - k
        total, edge = logs[..., :kept].sum(-1), logs[..., kept - 1]
        xi = (total + k * edge) / kept
        log_likelihood = kept * np.log(RATIOS / xi) - (1 + 1 / xi) * total - k * edge / xi
        best = log_likelihood.argmax(-1)[..., None]
        shape = np.take_along_axis(xi, best, -1)
        exponential = np.take_along_axis(logs[..., kept - 1 :], best[..., None], -2)[..., 0, :] / shape
        above = exponential[..., 1:] - exponential[..., :1]
        gaps.append(-stats.f.logsf(k * above[..., 0], 2, 2 * kept))
        blocks.append(stats.norm.isf(stats.f.sf(above.mean(-1), 2 * k, 2 * kept)))
    return np.array([np.max(gaps, axis=0), np.max(blocks, axis=0)]), shape[..., 0]


def oracle(scores: np.ndarray, least_shape: float = 0.15) -> float:
    """Twice the smaller of the scans' shares of simulated tails that are as extreme as the scores'."""
    ordered, m, max_count = np.sort(scores), len(scores) // 2, len(scores) // 10
    observed, shape = maxima(ordered[-m:] - ordered[-m - 1], max_count)
    xi = max(least_shape, float(shape + (1 + shape) / np.sqrt(m - max_count)))  # a standard error up
    random, as_extreme = np.random.RandomState(1), np.ones(2)
    for _ in range(DRAWN // 200):
        tails = np.sort(stats.genpareto.rvs(xi, size=(200, m), random_state=random))
        as_extreme += (maxima(tails, max_count)[0] >= observed[:, None]).sum(1)
    return float(min(1.0, 2 * as_extreme.min() / (DRAWN + 1)))


def with_outliers(seed: int, n: int, count: int, at: float, body: str = "normal") -> np.ndarray:
    """n − count draws of the law ``body``, and ``count`` of N(at, 1)."""
    random = np.random.RandomState(seed)
    return np.r_[getattr(random, body)(size=n - count), at + random.normal(size=count)]


def deviation(p: float) -> float:
    """Standard deviation of the difference of two Monte-Carlo estimates of p, each twice a share."""
    return 2 * np.sqrt(p / 2 * (1 - p / 2) * (1 / OWN + 1 / DRAWN))


LIGHT = {"400 scores": with_outliers(2, 400, 16, 4.0), "600 scores": with_outliers(1, 600, 8, 4.0)}
"""Contaminated, with bodies whose fitted ξ is near 0 and less than a standard error of 0.15."""
SETS = LIGHT | {
    "clean, log-normal": np.random.RandomState(1).lognormal(size=200),
    "clean, exponential": np.random.RandomState(2).exponential(size=100),
    "outliers of a heavier tail": with_outliers(2, 200, 6, 8.0, body="exponential"),
}


@pytest.mark.parametrize("scores", SETS.values(), ids=SETS)
def test_the_p_value_is_the_share_of_simulated_tails_as_extreme(scores):
    expected = oracle(scores)
    assert 0.1 < expected < 0.9, "or it would say little"
    assert abs(contamination(scores).p_value - expected) < 3 * deviation(expected)


@pytest.mark.parametrize("scores", LIGHT.values(), ids=LIGHT)
@pytest.mark.parametrize("least_shape", [0.0, 0.3])
def test_the_tail_under_the_null_is_never_lighter_than_the_least_shape(scores, least_shape):
    """Under a lighter tail the outliers would be told sooner, under a heavier one later, each beyond the noise."""
    other, p = oracle(scores, least_shape), contamination(scores).p_value
    assert abs(p - other) > 2 * deviation(other)
    assert (p > other) == (least_shape < 0.15)


def test_the_least_p_value_is_that_of_one_in_all_replicates():
    result = contamination(with_outliers(0, 500, 15, 12.0))
    assert result.p_value == pytest.approx(2 / (OWN + 1))
    assert result.count == 15
