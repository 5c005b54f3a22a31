from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.bundle import open_bundle
from service.calibration import Calibrator
from service.errors import BundleFormatError, InvalidInput, UnsupportedVerb
from tests.ppca_bundle import images, write_ppca_bundle

# few distinct values, so that ties are common
scores = st.one_of(st.integers(-5, 5).map(float), st.floats(-1e6, 1e6))
calibrations = hnp.arrays(np.float64, st.integers(1, 60), elements=scores).map(np.sort)
rates = st.one_of(st.floats(1e-3, 0.999), st.fractions(0, 1, max_denominator=60).map(float).filter(lambda r: 0 < r < 1))


@given(calibrations, hnp.arrays(np.float64, 20, elements=scores))
def test_p_values_count_calibration_scores_at_least_as_high(calibration, new):
    wanted = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in new]
    assert Calibrator({"elbo": calibration}).p_values("elbo", new).tolist() == wanted


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
