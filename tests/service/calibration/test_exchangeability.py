"""The tests of exchangeability against scipy, against their definitions, and against simulated streams."""

from __future__ import annotations

import warnings
from itertools import permutations
from math import factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from service.calibration.exchangeability import BETS, Martingale, Urn, kolmogorov_tail, ks_two_sample, log_bets


def ranks_among(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    return len(calibration) - np.searchsorted(np.sort(calibration), scores)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 60), st.floats(-2, 2))
def test_the_statistic_is_that_of_two_samples(seed, m, n, shift):
    random = np.random.RandomState(seed)
    calibration, scores = random.standard_normal(n), random.standard_normal(m) + shift
    statistic, _ = ks_two_sample(ranks_among(calibration, scores), n)
    with warnings.catch_warnings(action="ignore"):  # where scipy's exact p-value fails, which is not asked for
        expected = stats.ks_2samp(scores, calibration).statistic
    assert statistic == pytest.approx(expected, abs=1e-12)


def test_kolmogorovs_tail_is_scipys():
    x = np.linspace(1e-3, 6, 3000)
    np.testing.assert_allclose([kolmogorov_tail(value) for value in x], special.kolmogorov(x), rtol=1e-12, atol=1e-15)


def exact_tail(m: int, n: int, d: float) -> float:
    """P(D ≥ d) of two samples of sizes m and n: the share of lattice paths that leave the band (Hodges 1957)."""
    inside = np.zeros(m + 1)
    inside[0] = 1.0
    for s in range(1, m + n + 1):
        i = np.arange(m + 1)
        stepped = inside * (s - i) / s
        stepped[1:] += inside[:-1] * i[1:] / s
        inside = np.where((s - i >= 0) & (s - i <= n) & (np.abs(i / m - (s - i) / n) < d - 1e-9), stepped, 0.0)
    return 1 - inside[m]


def test_the_exact_tail_of_these_tests_is_scipys():
    first, second = np.arange(40) + 17.25, np.arange(60) + 0.0
    test = stats.ks_2samp(first, second, method="exact")
    assert exact_tail(40, 60, test.statistic) == pytest.approx(test.pvalue, rel=1e-9)


@pytest.mark.parametrize(
    ("m", "n"), [(1, 50), (2, 50), (5, 50), (20, 50), (50, 199), (500, 199), (100, 1000), (1000, 1000), (1000, 3000)]
)
def test_the_ks_p_value_errs_on_the_safe_side_only(m, n):
    """Wherever it matters, in tails up to a half: windows shifted ever further against an evenly spaced calibration."""
    calibration = np.arange(n) / n
    for shift in np.linspace(0.01, 0.9, 60):
        statistic, p = ks_two_sample(ranks_among(calibration, np.arange(m) / m + shift + 1e-6), n)
        exact = exact_tail(m, n, statistic) if p > 1e-9 else 0.0
        assert exact > 0.5 or p >= exact * (1 - 1e-3) - 1e-12
        if min(m, n) >= 1000 and exact > 1e-4:
            assert p < 1.08 * exact


def test_ranks_follow_polyas_urn():
    """Of all orders of n + t distinct scores, the share with given ranks is the product of the urn's probabilities."""
    n, t = 2, 3
    counts: dict[tuple[int, ...], int] = {}
    for order in permutations(range(n + t)):
        ranks = tuple(ranks_among(np.array(order[:n]), np.array(order[n:])).tolist())
        counts[ranks] = counts.get(ranks, 0) + 1
    for ranks, count in counts.items():
        urn = Urn(n)
        steps = [(urn.p_value(rank, 1.0), urn._counts[rank] / (urn._total - 1)) for rank in ranks]
        assert count / factorial(n + t) == pytest.approx(np.prod([probability for _, probability in steps]))


@given(st.integers(1, 40), st.data())
def test_the_urns_p_value_is_the_randomised_transform_of_its_law(n, data):
    ranks = data.draw(st.lists(st.integers(0, n), max_size=60))
    urn = Urn(n)
    for t, rank in enumerate(ranks):
        weights = 1 + np.bincount(np.array(ranks[:t], int), minlength=n + 1)
        expected = (weights[:rank].sum() + 0.25 * weights[rank]) / weights.sum()
        assert urn.p_value(rank, 0.25) == pytest.approx(expected, abs=1e-15)


def test_every_bet_is_a_density():
    for bet in range(len(BETS)):
        area, _ = integrate.quad(lambda p, bet=bet: np.exp(log_bets(np.array([p]))[0, bet]), 0, 1, limit=500)
        assert area == pytest.approx(1, abs=1e-6)
    p = np.array([0.01, 0.3, 0.99])
    np.testing.assert_allclose(log_bets(p), np.stack([stats.beta(a, b).logpdf(p) for a, b in BETS], axis=1))
    extreme = np.array([1e-15, 1e-9, 1 - 2.0**-40])
    np.testing.assert_allclose(log_bets(extreme), np.stack([stats.beta(a, b).logpdf(extreme) for a, b in BETS], axis=1))
    assert np.isfinite(log_bets(np.array([0.0, 1.0]))).all()


@given(st.lists(st.floats(0.001, 0.999), min_size=1, max_size=25), st.integers(0, 25))
def test_the_martingale_is_the_mixture_of_its_definition(values, cut):
    p = np.array(values)
    martingale, t = Martingale(), len(p)
    martingale.bet(p[:cut])
    martingale.bet(p[cut:])
    bets = np.exp(log_bets(p))
    expected = 1 / (t + 1)
    for k in range(1, t + 1):
        expected += np.prod(bets[k - 1 :], axis=0).mean() / (k * (k + 1))
    assert martingale.log_value == pytest.approx(np.log(expected), abs=1e-9)
    assert martingale.count == t
    assert martingale.log_maximum >= max(0.0, martingale.log_value) - 1e-12


def stream(seed: int, n: int, length: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ranks of a stream against n calibration scores, and two columns of uniform numbers."""
    random = np.random.RandomState(seed)
    calibration, scores = random.standard_normal(n), random.standard_normal(length) + shift
    return ranks_among(calibration, scores), 1 - random.random_sample(length), random.random_sample(length)


def through_the_urn(n: int, ranks: np.ndarray, u: np.ndarray) -> np.ndarray:
    urn = Urn(n)
    return np.array([urn.p_value(rank, uniform) for rank, uniform in zip(ranks.tolist(), u.tolist(), strict=True)])


def test_one_calibration_set_misleads_a_martingale_that_ignores_it_and_not_this_one():
    """200 streams of 1500 inliers, 50 calibration scores: how many ever reach 1/α, α = 10%."""
    n, alpha, alarms = 50, 0.1, {"urn": 0, "naive": 0}
    for seed in range(200):
        ranks, u, v = stream(seed, n, 1500)
        for name, p in (("urn", through_the_urn(n, ranks, u)), ("naive", (ranks + v) / (n + 1))):
            martingale = Martingale()
            martingale.bet(p)
            alarms[name] += martingale.log_maximum >= np.log(1 / alpha)
    # Ville: at most 20 expected, and 33 or more with probability 0.3% (binomial) were it as many.
    assert alarms["urn"] <= 32
    assert alarms["naive"] >= 50


def test_the_urns_p_values_are_uniform_and_independent():
    p = np.stack([through_the_urn(20, *stream(seed, 20, 100)[:2]) for seed in range(150)])
    assert stats.kstest(p.ravel(), "uniform").pvalue > 0.01
    later = p[:, 50:].mean(axis=1)
    assert abs(np.corrcoef(p[:, :50].mean(axis=1), later)[0, 1]) < 3 / np.sqrt(150)
    assert stats.kstest((later - 0.5) * np.sqrt(12 * 50), "norm").pvalue > 0.01


@pytest.mark.parametrize("shift", [0.6, -0.6])
def test_a_shift_after_a_long_quiet_time_is_found(shift):
    n, martingale, urn = 1000, Martingale(), Urn(1000)
    random = np.random.RandomState(0)
    calibration = random.standard_normal(n)
    for offset, length in ((0.0, 20_000), (shift, 400)):
        ranks = ranks_among(calibration, random.standard_normal(length) + offset)
        u = 1 - random.random_sample(length)
        martingale.bet(np.array([urn.p_value(r, x) for r, x in zip(ranks.tolist(), u.tolist(), strict=True)]))
        if offset == 0:
            assert martingale.log_value >= -np.log(20_001)
            assert martingale.log_maximum < np.log(1000)
    assert martingale.log_value > np.log(1000)
