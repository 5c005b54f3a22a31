"""Residuals in deviations of inliers' residuals, whatever the units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from service.bundle.files import open_bundle
from service.bundle.manifest import Manifest
from service.scores.detectors import (
    Residual,
)
from service.scores.forward_pass import ForwardPass
from tests.ppca_bundle import images
from tests.service.fitted_bundles import FAMILIES
from tests.service.scores.detectors.simulated import definition, in_parts, simulated


def test_residuals_are_in_deviations_at_each_place(manifest, inliers):
    detector = Residual.fit(in_parts(inliers), definition("residual"), manifest)
    residual = inliers.x.astype(np.float64) - inliers.mean
    scale = np.sqrt(residual.var(axis=0) + residual.var(axis=0).mean())
    fresh = simulated(images(5, seed=6), seed=7)
    standardised = (fresh.x.astype(np.float64) - fresh.mean - residual.mean(axis=0)) / scale
    wanted = np.log((standardised**2).mean(axis=(1, 2, 3)))
    assert detector.score(fresh) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert np.exp(detector.score(fresh)).mean() == pytest.approx(0.5, abs=0.1)


def tabled(x: np.ndarray, seed: int) -> ForwardPass:
    """A pass of vectors whose reconstruction errs by a tenth of their deviation."""
    measured = simulated(x.astype(np.float32))
    error = 0.1 * np.random.RandomState(seed).standard_normal(x.shape) * x.std(axis=0)
    return replace(measured, mean=(x - error).astype(np.float32))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Manifest:
    return open_bundle(FAMILIES["table"].write(tmp_path_factory.mktemp("table"))).manifest


@pytest.mark.parametrize("units", [[1, 300, 0.02, 25], [1e-6, 1e6, 1, 1]])
def test_the_units_of_a_table_do_not_matter(table, units):
    random = np.random.RandomState(0)
    rows, new = random.standard_normal((60, 1, 1, 4)) + 1, random.standard_normal((9, 1, 1, 4)) + 1
    scale = np.array(units)
    plain = Residual.fit([tabled(rows, 1)], definition("residual"), table).score(tabled(new, 2))
    other = Residual.fit([tabled(rows * scale, 1)], definition("residual"), table).score(tabled(new * scale, 2))
    assert other == pytest.approx(plain, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("constant", [0.0, 7.0])
def test_a_number_of_a_table_that_never_changed_is_in_thousandths_of_its_size(table, constant):
    rows = np.random.RandomState(0).standard_normal((60, 1, 1, 4))
    rows[..., 2] = constant
    measured = tabled(rows, 1)
    scale = Residual.fit([measured], definition("residual"), table).scale
    assert scale[0, 0, 2] == pytest.approx(1e-3 * (constant or 1), rel=1e-5)
    assert scale[0, 0, 0] == pytest.approx(np.sqrt(2) * 0.1 * rows[..., 0].std(), rel=0.3)


def test_the_channels_of_a_signal_have_units_of_their_own(tmp_path):
    signals = open_bundle(FAMILIES["signals"].write(tmp_path)).manifest
    rows = np.random.RandomState(0).standard_normal((60, 2, 1, 6)) * np.array([1.0, 1e3])[:, None, None]
    rows[:, :, 0, 3] = 0  # a step that never changes takes its channel's deviation
    scale = Residual.fit([tabled(rows, 1)], definition("residual"), signals).scale
    assert np.allclose(scale[1] / scale[0], 1e3, rtol=0.5)
    assert (scale[:, 0, 3] > 0.05 * np.array([1.0, 1e3])).all()
