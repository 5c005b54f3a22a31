from __future__ import annotations

import numpy as np
import pytest

from service.calibration.conformal import p_values
from service.calibration.contamination import MIN_SCORES, contamination, rate_after_trimming, trimmed
from service.errors import InvalidInput

CLEAN = {
    "normal": lambda random, n: random.normal(size=n),
    "gamma": lambda random, n: random.gamma(2, size=n),
    "log-normal": lambda random, n: random.lognormal(0, 0.5, n),
    "two modes": lambda random, n: random.normal(size=n) + 3 * (random.random_sample(n) < 0.2),
}


def contaminated(random, n, count, shift, base="normal"):
    """Scores in random order, and which of them are the contaminants: ``shift`` standard deviations up, spread 1."""
    scores, bad = CLEAN[base](random, n), random.permutation(n)[:count]
    scores[bad] = np.median(scores) + scores.std() * (shift + random.normal(size=count))
    return scores, bad


@pytest.mark.parametrize("draw", CLEAN.values(), ids=CLEAN)
def test_clean_scores_are_rarely_suspected(draw):
    """12 sets at a level of 1%: two warnings have a probability below 0.7%."""
    warned = [contamination(draw(np.random.RandomState(seed), 150)).count > 0 for seed in range(12)]
    assert sum(warned) <= 1


def test_contaminants_are_found_counted_and_named():
    for seed in range(5):
        scores, bad = contaminated(np.random.RandomState(seed), 500, 15, shift=12)
        result = contamination(scores)
        assert result.p_value <= 0.01
        assert (result.count, result.share) == (15, 0.03)
        assert set(result.indices) == set(bad)
        assert (np.diff(scores[result.indices]) <= 0).all()
        assert "the 15 highest of 500 calibration scores (3.0%)" in result.message


def test_most_sets_with_three_in_a_hundred_six_deviations_up_are_found():
    counts = [contamination(contaminated(np.random.RandomState(seed), 1000, 30, 6)[0]).count for seed in range(8)]
    assert sum(count > 0 for count in counts) >= 6
    assert 25 <= np.median([count for count in counts if count]) <= 35


def test_a_spread_of_contaminants_without_a_gap_is_found_by_the_block():
    random = np.random.RandomState(1)
    scores = np.r_[random.normal(size=950), random.uniform(1, 20, 50)]
    assert contamination(scores).count > 20


def test_the_verdict_keeps_under_shift_scale_and_order_and_repeats():
    scores, _ = contaminated(np.random.RandomState(2), 300, 9, 6)
    result, other = contamination(scores), contamination(-7 + 1000 * scores[::-1])
    assert (result.p_value, result.count) == (other.p_value, other.count)
    np.testing.assert_array_equal(result.indices, 299 - other.indices)
    assert contamination(scores).p_value == result.p_value


def test_what_cannot_be_judged_says_so():
    few = contamination(np.arange(MIN_SCORES - 1.0))
    assert (few.p_value, few.count, few.indices.size) == (None, 0, 0)
    assert f"{MIN_SCORES} needed" in few.message
    tied = contamination(np.r_[np.zeros(100), 5.0])
    assert (tied.p_value, tied.count) == (None, 0)
    assert "equal" in tied.message
    for bad in ([], [np.nan], [[1.0]]):
        with pytest.raises(InvalidInput, match="calibration scores"):
            contamination(np.array(bad))


def test_trimming_removes_the_highest_share():
    scores = np.random.RandomState(3).normal(size=200)
    assert trimmed(scores, 0.015).tolist() == sorted(scores)[:197]
    assert trimmed(scores, 0.0).tolist() == sorted(scores)
    assert len(trimmed(scores, 7 / 200)) == 193, "a detected share removes exactly the detected count"
    for bad in (-0.1, 0.6, np.nan):
        with pytest.raises(InvalidInput, match="share to trim"):
            trimmed(scores, bad)


def realised(random, n, contaminants, removed, rate, level, repeats=4000):
    """False-positive rate over draws of n scores, ``contaminants`` of them at ``level``, their top trimmed."""
    flagged = 0
    for _ in range(repeats):
        inliers = random.random_sample(n - contaminants)
        kept = trimmed(np.r_[inliers, np.full(contaminants, level)], removed / n)
        flagged += p_values(kept, random.random_sample(1))[0] <= rate
    return flagged / repeats


@pytest.mark.parametrize(
    ("contaminants", "level", "stated"),
    [(0, 2.0, 0), (5, 2.0, 5), (3, 2.0, 3), (5, -1.0, None)],
    ids=["clean", "all trimmed", "fewer than trimmed", "below all others"],
)
def test_the_rate_after_trimming_is_the_stated_bound_and_attains_it(contaminants, level, stated):
    n, removed, rate = 100, 5, 0.1
    bound = rate_after_trimming(rate, n, removed, stated)
    realised_rate = realised(np.random.RandomState(4), n, contaminants, removed, rate, level)
    assert abs(realised_rate - bound) < 4 * np.sqrt(bound * (1 - bound) / 4000)


def test_without_trimming_contamination_only_costs_power():
    """At most α(n + 1)/(n − n₁ + 1) whatever they score, and far below α where they score high."""
    n, bad, rate = 100, 5, 0.1
    high = realised(np.random.RandomState(5), n, bad, 0, rate, 2.0)
    low = realised(np.random.RandomState(6), n, bad, 0, rate, -1.0)
    assert high < 0.07
    assert low <= rate * (n + 1) / (n - bad + 1) + 3 * np.sqrt(0.1 / 4000)


def test_the_bounds_of_trimming():
    assert rate_after_trimming(0.01, 9999, 0) == pytest.approx(0.01)
    assert rate_after_trimming(0.01, 10_000, 100) <= 0.01 + 100 / 9901
    assert rate_after_trimming(0.05, 1000, 10, 10) <= 0.05 < rate_after_trimming(0.05, 1000, 10, 0) <= 0.05 + 10 / 1001
    assert rate_after_trimming(0.001, 100, 5) == 0.0, "too few to flag anything"
    for removed, contaminants in ((3, 4), (100, None), (-1, None)):
        with pytest.raises(InvalidInput, match="expected 0 ≤ contaminants"):
            rate_after_trimming(0.1, 100, removed, contaminants)
