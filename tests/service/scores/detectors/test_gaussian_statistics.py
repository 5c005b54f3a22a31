"""The path and the statistics, judged by a Gaussian or by COPOD: against SciPy and scikit-learn."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis
from scipy.stats import skew
from sklearn.covariance import ledoit_wolf

from service.bundle.manifest import Manifest
from service.errors import BundleFormatError
from service.scores.detectors import LikelihoodPath, PassStatistics
from service.scores.forward_pass import ForwardPass, path_statistics, statistics
from service.scores.forward_pass import table as table_of
from service.scores.gaussian import normalised, quantiles
from tests.ppca_bundle import images
from tests.service.scores.detectors.simulated import definition, in_parts, simulated
from tests.service.scores.test_forward_pass import BIJECTION, NO_LIKELIHOOD, of_kind


def paths(measured: ForwardPass, manifest: Manifest) -> np.ndarray:
    return table_of(path_statistics, measured, manifest)


def test_the_path_by_mahalanobis(manifest, inliers):
    detector = LikelihoodPath.fit(in_parts(inliers), definition("path", "mahalanobis"), manifest)
    rows = paths(inliers, manifest)
    grid = quantiles(rows)
    z = np.array([normalised(row, grid) for row in rows])
    scale = z.std(axis=0)
    covariance = ledoit_wolf(z / scale)[0] + 1e-6 * np.eye(15)
    fresh = simulated(images(6, seed=3), seed=4)
    for row, score in zip(paths(fresh, manifest), detector.score(fresh), strict=True):
        distance = mahalanobis(normalised(row, grid) / scale, z.mean(axis=0) / scale, np.linalg.inv(covariance))
        assert score == pytest.approx(math.log(distance**2 / 15), rel=1e-6)


def copod(rows: np.ndarray, new: np.ndarray) -> list[float]:
    """Li et al. 2020, algorithm 1, with the empirical distributions of ``rows`` and the new row."""
    scores = []
    for row in new:
        every = np.vstack([rows, row])
        left = -np.log((every <= row).mean(axis=0))
        right = -np.log((every >= row).mean(axis=0))
        corrected = np.where(skew(rows) < 0, left, right)
        scores.append(max(left.sum(), right.sum(), corrected.sum()))
    return scores


def test_the_path_by_copod(manifest, inliers):
    detector = LikelihoodPath.fit(in_parts(inliers), definition("path", "copod"), manifest)
    fresh = simulated(images(40, seed=3) * np.linspace(0.9, 1, 40, dtype=np.float32)[:, None, None, None], seed=4)
    wanted = copod(paths(inliers, manifest), paths(fresh, manifest))
    assert detector.score(fresh) == pytest.approx(wanted, rel=0.1)
    assert np.corrcoef(detector.score(fresh), wanted)[0, 1] > 0.99


@pytest.mark.parametrize("method", ["mahalanobis", "copod"])
def test_a_path_outside_the_inliers_scores_higher_than_all_of_them(manifest, inliers, method):
    detector = LikelihoodPath.fit(in_parts(inliers), definition("path", method), manifest)
    far = replace(inliers, mean=inliers.mean + 1, loc=inliers.loc * 9, scale=inliers.scale * 9)
    assert detector.score(far).min() > detector.score(inliers).max()


def test_statistics_are_judged_by_mahalanobis(manifest, inliers):
    detector = PassStatistics.fit(in_parts(inliers), definition("statistics"), manifest)
    rows = table_of(statistics, inliers, manifest)
    scale = rows.std(axis=0)
    covariance = np.linalg.inv(ledoit_wolf(rows / scale)[0] + 1e-6 * np.eye(rows.shape[1]))
    fresh = simulated(images(5, seed=6), seed=7)
    for row, score in zip(table_of(statistics, fresh, manifest), detector.score(fresh), strict=True):
        distance = mahalanobis(row / scale, rows.mean(axis=0) / scale, covariance)
        assert score == pytest.approx(math.log(distance**2 / rows.shape[1]), rel=1e-6)


def test_a_path_of_another_family_is_refused(manifest, inliers):
    """As many norms as the model has: a bijection has μ alone."""
    definition_ = definition("path", "mahalanobis")
    arrays = LikelihoodPath.fit(in_parts(inliers), definition_, manifest).arrays
    for changes in (BIJECTION, NO_LIKELIHOOD):
        with pytest.raises(BundleFormatError, match="has shape"):
            LikelihoodPath.from_arrays(arrays, definition_, of_kind(manifest, **changes))
