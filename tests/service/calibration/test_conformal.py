from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from service.bundle.files import open_bundle
from service.calibration.conformal import Calibrator, calibration_key, p_values
from service.errors import BundleFormatError, InvalidInput, UnsupportedVerb
from tests.ppca_bundle import images, write_ppca_bundle

# few distinct values, so that ties are common
scores = st.one_of(st.integers(-5, 5).map(float), st.floats(-1e6, 1e6))
calibrations = hnp.arrays(np.float64, st.integers(1, 60), elements=scores).map(np.sort)
rates = st.one_of(st.floats(1e-3, 0.999), st.fractions(0, 1, max_denominator=60).map(float).filter(lambda r: 0 < r < 1))


@given(calibrations, hnp.arrays(np.float64, 20, elements=scores))
def test_p_values_count_calibration_scores_at_least_as_high(calibration, new):
    expected = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in new]
    assert Calibrator({"elbo": calibration}).p_values("elbo", new).tolist() == expected


@given(calibrations, hnp.arrays(np.float64, 20, elements=scores))
def test_p_values_are_never_zero_and_fall_with_the_score(calibration, new):
    p = Calibrator({"elbo": calibration}).p_values("elbo", np.sort(new))
    assert ((p > 0) & (p <= 1)).all()
    assert (np.diff(p) <= 0).all()


@given(hnp.arrays(np.float64, st.integers(2, 40), elements=scores), rates)
def test_p_values_are_super_uniform_under_exchange(values, rate):
    """Hold out each of n + 1 values in turn against the rest: at most a share α of the p-values is ≤ α, ties or not."""
    held_out = [
        Calibrator({"elbo": np.sort(np.delete(values, i))}).p_values("elbo", values[i : i + 1])[0]
        for i in range(len(values))
    ]
    assert np.mean(np.array(held_out) <= rate) <= rate + 1e-12


@given(calibrations, rates, hnp.arrays(np.float64, 20, elements=scores))
def test_threshold_and_p_value_agree(calibration, rate, new):
    """p ≤ α exactly when score ≥ threshold, at the calibration scores themselves and beside them too."""
    calibrator = Calibrator({"elbo": calibration})
    edges = np.concatenate([new, calibration, np.nextafter(calibration, np.inf), np.nextafter(calibration, -np.inf)])
    p = calibrator.p_values("elbo", edges)
    try:
        threshold = calibrator.threshold("elbo", rate)
    except InvalidInput:
        assert (calibrator.p_values("elbo", np.array([np.inf])) > rate).all()
        return
    assert ((p <= rate) == (edges >= threshold)).all()


@given(rates)
def test_too_few_scores_tell_how_many_are_needed(rate):
    needed = next(n for n in range(1, 2000) if 1.0 / (n + 1) <= rate)
    assert np.isfinite(Calibrator({"elbo": np.arange(float(needed))}).threshold("elbo", rate))
    if needed > 1:
        with pytest.raises(InvalidInput, match=f"at least {needed} calibration scores, elbo has {needed - 1}"):
            Calibrator({"elbo": np.arange(float(needed - 1))}).threshold("elbo", rate)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0, np.nan, np.inf, 5e-324])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(InvalidInput, match="expected a number from"):
        Calibrator({"elbo": np.arange(9.0)}).threshold("elbo", rate)


def test_nan_has_no_p_value_and_infinity_the_smallest():
    calibrator = Calibrator({"elbo": np.arange(9.0)})
    with pytest.raises(InvalidInput, match="NaN"):
        calibrator.p_values("elbo", np.array([1.0, np.nan]))
    assert calibrator.p_values("elbo", np.array([np.inf, -np.inf])).tolist() == [0.1, 1.0]


@pytest.mark.parametrize("bad", [[2.0, 1.0], [0.0, np.nan], [0.0, np.inf], [[0.0]], []])
def test_calibration_scores_must_be_sorted_and_finite(bad):
    with pytest.raises(BundleFormatError, match="calibration of elbo"):
        Calibrator({"elbo": np.array(bad, np.float64)})


def test_a_score_without_calibration_gets_no_verdict(tmp_path, ppca_path):
    calibrator = Calibrator.from_bundle(open_bundle(ppca_path))
    assert calibrator.names == ["elbo", "iwae"]
    assert ("elbo" in calibrator, "other" in calibrator) == (True, False)
    assert calibrator.n("elbo") == 199
    with pytest.raises(UnsupportedVerb, match=r"'other' has no calibration here; calibrated: \['elbo', 'iwae'\]"):
        calibrator.p_values("other", np.zeros(1))

    def without(manifest, files):
        manifest["calibration"] = None
        del files["calibration.npz"]

    path, _ = write_ppca_bundle(tmp_path, change=without)
    assert Calibrator.from_bundle(open_bundle(path)).names == []


def test_p_values_of_fresh_inliers_are_uniform_and_outliers_small(model, ppca_path):
    """Through the real model: mean ½ within 5 standard errors of calibration and test draws together."""
    calibrator = Calibrator.from_bundle(open_bundle(ppca_path))
    p = calibrator.p_values("elbo", model.score(images(300, seed=77)).score)
    assert abs(p.mean() - 0.5) < 5 * np.sqrt((1 / 300 + 1 / 199) / 12)
    noise = np.random.RandomState(0).random_sample((10, 1, 8, 8)).astype(np.float32)
    assert (calibrator.p_values("elbo", model.score(noise).score) == 1 / 200).all()


DRAWS = {
    "normal": lambda random, n: random.normal(size=n),
    "log-normal": lambda random, n: random.lognormal(0, 1, n),
    "rounded": lambda random, n: np.round(random.gamma(2, size=n), 1),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_false_positive_rate_keeps_its_promise_over_calibrations(draw):
    """4000 calibrations of 99 and one new inlier each: share of p ≤ α at most α + 3 s.e., for every α at once."""
    random = np.random.RandomState(3)
    p = np.array([p_values(np.sort(draw(random, 99)), draw(random, 1))[0] for _ in range(4000)])
    for rate in (0.01, 0.05, 0.1, 0.5):
        assert np.mean(p <= rate) <= rate + 3 * np.sqrt(rate * (1 - rate) / len(p))


def test_without_ties_a_p_value_is_uniform_over_its_steps():
    random = np.random.RandomState(4)
    p = np.array([p_values(np.sort(random.normal(size=9)), random.normal(size=1))[0] for _ in range(5000)])
    counts = np.bincount(np.rint(p * 10).astype(int), minlength=11)[1:]
    assert counts.sum() == 5000
    assert stats.chisquare(counts).pvalue > 0.001


def test_given_the_calibration_the_false_positive_rate_follows_a_beta_law():
    """l = ⌊α(n + 1)⌋: the rate, 1 − F(threshold), is Beta(l, n + 1 − l) over the draw of the calibration images."""
    random, n, rate = np.random.RandomState(5), 199, 0.05
    draws = [Calibrator({"s": np.sort(random.normal(size=n))}).threshold("s", rate) for _ in range(2000)]
    realised = stats.norm.sf(draws)
    assert stats.kstest(realised, stats.beta(10, n + 1 - 10).cdf).pvalue > 0.001
    assert stats.kstest(realised, stats.beta(11, n + 1 - 11).cdf).pvalue < 0.001, "the test can tell l from l + 1"


def grouped(random, n=2000):
    """Scores of a quiet group and of one whose inliers are as noisy as the quiet one's outliers."""
    quiet, noisy = random.normal(0, 1, n), random.normal(0, 3, n)
    return {"s": np.sort(np.r_[quiet, noisy]), "s@noisy": np.sort(noisy), "s@quiet": np.sort(quiet)}


def test_a_group_keeps_the_rate_that_the_whole_breaks():
    random = np.random.RandomState(7)
    calibrator, new = Calibrator(grouped(random)), random.normal(0, 3, 4000)
    assert np.mean(calibrator.p_values("s", new) <= 0.05) > 0.09
    p = calibrator.p_values("s", new, ["noisy"] * len(new))
    # spread of the new images and of the calibration together
    assert abs(np.mean(p <= 0.05) - 0.05) < 4 * np.sqrt(0.05 * 0.95 * (1 / 4000 + 1 / 2000))
    quiet = calibrator.p_values("s", random.normal(0, 1, 4000), ["quiet"] * 4000)
    assert abs(np.mean(quiet <= 0.05) - 0.05) < 4 * np.sqrt(0.05 * 0.95 * (1 / 4000 + 1 / 2000))


def test_every_score_is_held_against_its_own_group():
    scores = grouped(np.random.RandomState(8), n=50)
    calibrator, new = Calibrator(scores), np.array([2.0, 2.0, 2.0, -1.0])
    groups = ["noisy", None, "quiet", "noisy"]
    keys = [calibration_key("s", group) for group in groups]
    expected = [p_values(scores[key], new[i : i + 1])[0] for i, key in enumerate(keys)]
    assert calibrator.p_values("s", new, groups).tolist() == expected
    assert len(set(expected)) == 4
    assert calibrator.names == ["s"]
    assert calibrator.groups("s") == ["noisy", "quiet"]
    assert (calibrator.n("s"), calibrator.n("s", "quiet")) == (100, 50)


def test_thresholds_of_groups_agree_with_their_p_values():
    calibrator = Calibrator(grouped(np.random.RandomState(9), n=99))
    thresholds = calibrator.thresholds("s", 0.1)
    assert set(thresholds) == {"noisy", "quiet"}
    new = np.linspace(-5, 8, 400)
    for group, threshold in thresholds.items():
        np.testing.assert_array_equal(calibrator.p_values("s", new, [group] * 400) <= 0.1, new >= threshold)


def test_a_group_with_too_few_scores_says_how_many_it_needs():
    calibrator = Calibrator({"s": np.arange(999.0), "s@small": np.arange(50.0)})
    assert np.isfinite(calibrator.threshold("s", 0.01))
    with pytest.raises(InvalidInput, match="at least 99 calibration scores, s of group 'small' has 50"):
        calibrator.thresholds("s", 0.01)


def test_an_unknown_group_is_told_the_known_ones():
    calibrator = Calibrator(grouped(np.random.RandomState(0), n=5))
    for call in (
        lambda: calibrator.p_values("s", np.zeros(2), ["noisy", "loud"]),
        lambda: calibrator.n("s", "loud"),
        lambda: calibrator.threshold("s", 0.5, "loud"),
    ):
        with pytest.raises(InvalidInput, match=r"no calibration of group 'loud'; known groups: \['noisy', 'quiet'\]"):
            call()
    with pytest.raises(InvalidInput, match="known groups: none"):
        Calibrator({"s": np.zeros(1)}).n("s", "loud")
    with pytest.raises(InvalidInput, match="1 groups for 2 scores"):
        calibrator.p_values("s", np.zeros(2), ["noisy"])
    with pytest.raises(UnsupportedVerb, match="'other' has no calibration"):
        calibrator.p_values("other", np.zeros(1), ["noisy"])


@pytest.mark.parametrize("group", ["3", "good parts", "caf\u00e9", "cafe\u0301", "класс-1", "a.b_c+", "x" * 64])
def test_a_name_of_a_group_makes_one_key(group):
    key = calibration_key("iwae-5.x_y", group)
    calibrator = Calibrator({"iwae-5.x_y": np.zeros(1), key: np.zeros(3)})
    assert (calibrator.names, len(calibrator.groups("iwae-5.x_y"))) == (["iwae-5.x_y"], 1)
    assert calibrator.n("iwae-5.x_y", group) == 3


def test_an_accent_is_the_same_however_it_is_written():
    assert calibration_key("s", "caf\u00e9") == calibration_key("s", "cafe\u0301")


@pytest.mark.parametrize("group", ["", " a", "a ", "a/b", "..", "a\\b", "a@b", "a\n", "a\x00", "x" * 65, "-a", "a."])
def test_a_name_that_is_no_group_is_refused(group):
    with pytest.raises(InvalidInput, match="a group's name is"):
        calibration_key("s", group)
    with pytest.raises(BundleFormatError, match="expected SCORE or SCORE@GROUP"):
        Calibrator({"s": np.zeros(1), f"s@{group}": np.zeros(1)})


def test_a_group_without_the_score_of_all_images_is_refused():
    with pytest.raises(BundleFormatError, match="beside SCORE"):
        Calibrator({"s@a": np.zeros(1)})
    with pytest.raises(BundleFormatError, match="calibration of s@a: expected finite"):
        Calibrator({"s": np.zeros(1), "s@a": np.array([1.0, 0.0])})


def test_counts_are_those_that_p_values_are_made_of():
    random = np.random.RandomState(0)
    scores = np.sort(random.randint(0, 30, 99).astype(np.float64))
    calibrator = Calibrator({"elbo": scores, "elbo@dark": scores[50:]})
    new = random.randint(-2, 33, 40).astype(np.float64)
    for group, calibration in ((None, scores), ("dark", scores[50:])):
        above, at_least = calibrator.counts("elbo", new, group)
        assert above.tolist() == [(calibration > s).sum() for s in new]
        assert at_least.tolist() == [(calibration >= s).sum() for s in new]
        p = (1 + at_least) / (len(calibration) + 1)
        np.testing.assert_array_equal(p, calibrator.p_values("elbo", new, [group] * 40))
    with pytest.raises(InvalidInput, match="NaN"):
        calibrator.counts("elbo", np.array([np.nan]))
    with pytest.raises(InvalidInput, match="no calibration of group"):
        calibrator.counts("elbo", new, "light")
