"""Codes far from the codes of inliers, against scikit-learn's neighbours."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from service.scores import nearest_neighbours as neighbours
from service.scores.detectors import (
    Latent,
)
from service.scores.forward_pass import ForwardPass
from service.scores.nearest_neighbours import NearestNeighbours
from tests.ppca_bundle import images
from tests.service.scores.detectors.simulated import definition, simulated


def coded(codes: np.ndarray) -> ForwardPass:
    return replace(simulated(images(len(codes))), loc=codes.astype(np.float32))


@pytest.mark.parametrize("n", [1, 3, 5, 200, 6 * 64, 2000])
def test_the_latent_density_is_by_the_nearest_neighbours(manifest, n):
    random = np.random.RandomState(0)
    reference, codes = (random.standard_normal((m, 5)).astype(np.float32) for m in (n, 30))
    detector = Latent.of(reference, definition("latent"), manifest)
    distances, _ = NearestNeighbors(n_neighbors=min(5, n)).fit(reference).kneighbors(codes)
    assert detector.score(coded(codes)) == pytest.approx(5 * np.log(distances.mean(axis=1)), rel=1e-4, abs=1e-4)


def test_the_nearest_of_many_are_found_wherever_they_lie_and_whatever_rows_are_beside(manifest):
    """Codes in order, so that all near ones are in one block; and each row as it is alone, bitwise."""
    random = np.random.RandomState(1)
    reference = np.sort(random.standard_normal((3000, 1)), axis=0) * np.ones(5)
    codes = (random.standard_normal((40, 1)) * np.ones(5)).astype(np.float32)
    detector = Latent.of(reference, definition("latent"), manifest)
    distances, _ = NearestNeighbors(n_neighbors=5).fit(reference.astype(np.float32)).kneighbors(codes)
    scores = detector.score(coded(codes))
    assert scores == pytest.approx(5 * np.log(distances.mean(axis=1)), rel=1e-4, abs=1e-4)
    assert np.array_equal(scores, np.concatenate([detector.score(coded(codes[i : i + 1])) for i in range(40)]))


@pytest.mark.parametrize("codes", [5, 70, 1000])
def test_what_lies_at_infinity_is_infinitely_far_and_of_nan_nothing_is_known(manifest, codes):
    random = np.random.RandomState(2)
    detector = Latent.of(random.standard_normal((codes, 5)), definition("latent"), manifest)
    rows = np.concatenate(
        [random.standard_normal((2, 5)), [[np.inf, 0, 0, 0, 0], [0, 0, -np.inf, 0, 0]], [[np.nan] * 5]]
    )
    scores = detector.score(coded(rows))
    assert np.array_equal(np.isfinite(scores), [True, True, False, False, False])
    assert list(scores[2:4]) == [np.inf, np.inf]
    assert np.isnan(scores[4])
    assert np.array_equal(scores[:2], detector.score(coded(rows[:2])))


def test_many_rows_are_held_against_many_codes_a_few_at_a_time(manifest, monkeypatch):
    random = np.random.RandomState(3)
    detector = Latent.of(random.standard_normal((200, 5)), definition("latent"), manifest)
    rows = coded(random.standard_normal((40, 5)))
    whole, held, kept = detector.score(rows), [], NearestNeighbours._are_candidates
    monkeypatch.setattr(neighbours, "MAX_DISTANCES", 3 * 320)
    monkeypatch.setattr(
        NearestNeighbours, "_are_candidates", lambda self, apart: held.append(len(apart)) or kept(self, apart)
    )
    assert np.array_equal(detector.score(rows), whole)
    assert max(held) == 3


def test_the_latent_density_is_one_of_the_latent_space(manifest):
    """Codes c times as far apart are c^L times as thin."""
    random = np.random.RandomState(0)
    reference, codes = random.standard_normal((100, 5)), random.standard_normal((10, 5))
    near = Latent.of(reference, definition("latent"), manifest).score(coded(codes))
    far = Latent.of(8 * reference, definition("latent"), manifest).score(coded(8 * codes))
    assert far - near == pytest.approx(np.full(10, 5 * math.log(8)), rel=1e-4)


def test_codes_that_coincide_or_lie_at_the_end_of_float32_score_finitely(manifest):
    reference = np.zeros((6, 5))
    detector = Latent.of(reference, definition("latent"), manifest)
    scores = detector.score(coded(np.array([np.zeros(5), np.full(5, 1e-3), np.full(5, 3e38)])))
    assert np.isfinite(scores).all()
    assert (np.diff(scores) > 0).all()
