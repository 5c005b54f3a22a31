"""The nearest of many points, held against all distances in float64."""

import numpy as np
import pytest

from service.scores import nearest_neighbours as neighbours
from service.scores.nearest_neighbours import NearestNeighbours

COUNT = 5


def by_all(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    squares = ((points.astype(np.float64) - rows[:, None].astype(np.float64)) ** 2).sum(axis=2)
    return np.sqrt(np.sort(squares, axis=1)[:, :COUNT])


@pytest.fixture
def candidates(monkeypatch):
    """Numbers of candidates, [N] for each product that was made."""
    counts, kept = [], NearestNeighbours._are_candidates

    def counted(self, apart):
        counts.append(kept(self, apart).sum(axis=1))
        return kept(self, apart)

    monkeypatch.setattr(NearestNeighbours, "_are_candidates", counted)
    return counts


@pytest.mark.parametrize("exponent", [-21, -15, -3, 0, 4, 12, 17, 19])
@pytest.mark.parametrize("seed", range(6))
def test_they_are_the_nearest_of_all_exactly(exponent, seed):
    """Of any scale, in clusters, far from the origin, and some a thousand times as far as others."""
    random = np.random.default_rng(seed)
    width = int(random.integers(1, 40))
    points = random.standard_normal((int(random.integers(1, 2000)), width))
    if seed % 3 == 1:
        points = points[:1] + 1e-5 * points
    if seed % 3 == 2:
        points[::2] *= 1e3
    near = points[random.integers(0, len(points), 6)] * (1 + 1e-3 * random.standard_normal((6, 1)))
    rows = np.concatenate([near, random.standard_normal((6, width))])
    points, rows = ((each * 10.0**exponent).astype(np.float32) for each in (points, rows))
    assert np.array_equal(NearestNeighbours(points, COUNT).distances(rows), by_all(points, rows))


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_candidates_are_few_where_points_lie_as_codes_do(candidates, shift):
    """In a cloud, wherever that lies; also rows outside."""
    random = np.random.default_rng(0)
    points = (random.standard_normal((8000, 32)) + shift).astype(np.float32)
    rows = (random.standard_normal((50, 32)) * np.linspace(0.1, 20, 50)[:, None] + shift).astype(np.float32)
    assert np.array_equal(NearestNeighbours(points, COUNT).distances(rows), by_all(points, rows))
    assert candidates[0].max() <= 4 * COUNT


def test_what_float32_cannot_tell_apart_are_all_candidates(candidates):
    """The points lie closer together than float32 resolves from so far away."""
    random = np.random.default_rng(0)
    points = (1e-4 * random.standard_normal((500, 8))).astype(np.float32)
    row = np.full((1, 8), 1e3, np.float32)
    assert np.array_equal(NearestNeighbours(points, COUNT).distances(row), by_all(points, row))
    assert candidates == [500]


def test_near_points_in_clusters_far_apart_are_told_apart_by_float64():
    """In float32 those of one cluster lie in a random order."""
    random = np.random.default_rng(0)
    centres = 1e3 * random.standard_normal((2, 8)).repeat(300, axis=0)
    points = (centres + 0.1 * random.standard_normal((600, 8))).astype(np.float32)
    rows = (centres[::60] + 0.1 * random.standard_normal((10, 8))).astype(np.float32)
    assert np.array_equal(NearestNeighbours(points, COUNT).distances(rows), by_all(points, rows))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("far", [0, 300, 394, 396, 400])
def test_points_beyond_the_squares_of_float32_count_too(far, apart):
    """On one side, or on both, so that their mean is among those that are near."""
    random = np.random.default_rng(0)
    points = random.standard_normal((400, 4)).astype(np.float32)
    points[:far] *= np.float32(1e30)
    if apart:
        points[1:far:2] = -points[:far:2]
    rows = np.concatenate([points[:3], points[-3:], np.full((1, 4), 3e38, np.float32)])
    assert np.array_equal(NearestNeighbours(points, COUNT).distances(rows), by_all(points, rows))


def test_a_rows_answer_does_not_depend_on_the_rows_beside_it(monkeypatch):
    random = np.random.default_rng(0)
    points, rows = (random.standard_normal((m, 6)).astype(np.float32) for m in (1000, 40))
    found = NearestNeighbours(points, COUNT)
    whole = found.distances(rows)
    assert np.array_equal(whole, np.concatenate([found.distances(rows[i : i + 1]) for i in range(len(rows))]))
    monkeypatch.setattr(neighbours, "MAX_DISTANCES", 3 * 1024)
    assert np.array_equal(whole, found.distances(rows))
