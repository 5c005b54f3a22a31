"""Distances to the nearest of many points: searched for in float32, proved, and computed in float64."""

from __future__ import annotations

import numpy as np

BLOCK = 64
SPARE = 5
"""Candidates beyond the nearest ones, which float32 may not be able to tell from them."""
MAX_DISTANCES = 2**21
"""Most distances between rows and points that are in memory at once."""
AT_ONCE = 2**17
"""Numbers of the points that a row is compared with at once where float32 does not decide."""
FAR = 1e36
"""Squared norm beyond which a point is left to float64: float32's range ends a little further."""


class NearestNeighbours:
    """The nearest of ``points``, float32 [m,L], to any row, by Euclidean distance.

    The nearest points by float32 need not be the nearest ones. Let points r and rows x be relative to the points' mean,
    e the true squared distance, n = L + 6, u = 2⁻²⁴ and c = n u / (1 − n u). The float32 result for |r|² − 2 r·x, which
    is e − |x|², is off by c (|x|² + 2|r|²) at most: each of its L + 1 terms is rounded at most n times (Higham 2002,
    sec. 3.1), and 2 Σ|r x| ≤ |x|² + |r|². As |r|² ≤ 2|x|² + 2e, points whose float32 result is t or more have

        e ≥ (t + (1 − 5c) |x|²) / (1 + 4c).

    A row for which this bound does not rule out all points but the candidates is compared with all points in float64.
    """

    def __init__(self, points: np.ndarray, count: int) -> None:
        self._points, self._count = points, min(count, len(points))
        self._width = -(-len(points) // BLOCK)
        self._centre = points.mean(axis=0, dtype=np.float64)
        apart = points - self._centre
        norms = (apart**2).sum(axis=1)  # beyond float32's range for a far one
        near = norms < FAR
        # −2 r and |r|² of each point r, a column each; every width-th column is of the same block. Points that are far,
        # and columns that are left over, lie at infinity.
        self._columns = np.zeros((points.shape[1] + 1, BLOCK * self._width), np.float32)
        self._columns[-1] = np.inf
        self._columns[:, : len(points)][:, near] = np.vstack([-2 * apart[near].T, norms[near]])

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """Distances to the nearest ``count`` points, or to all if there are fewer, ascending: float64 [N,·].

        ``rows``: finite float32 [N,L]. A row's answer does not depend on the other rows, bitwise.
        """
        step = max(1, MAX_DISTANCES // self._columns.shape[1])
        parts = [self._distances(rows[i : i + step]) for i in range(0, len(rows), step)]
        return np.sqrt(np.concatenate(parts))

    def _distances(self, rows: np.ndarray) -> np.ndarray:
        """Squared distances of rows [N,L] to the nearest points, ascending: float64 [N,·]."""
        if len(self._points) <= self._count + SPARE:
            return np.array([self._by_all(row) for row in rows])
        apart = rows - self._centre
        candidates, beyond = self._candidates(apart)
        differences = self._points[candidates].astype(np.float64) - rows[:, None]
        squares: np.ndarray = np.sort((differences**2).sum(axis=2), axis=1)[:, : self._count]
        for row in np.flatnonzero(~self._are_nearest(apart, squares[:, -1], beyond)):
            squares[row] = self._by_all(rows[row])
        return squares

    def _candidates(self, apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the points nearest by float32, int64 [N,·], and the least float32 result of all other points, [N].

        The candidates lie in as many blocks as there are candidates, those with the least minima: few results are then
        looked at twice.
        """
        n, near = len(apart), self._count + SPARE
        with np.errstate(over="ignore", invalid="ignore"):  # rows so far away are compared with all points
            squares = (
                np.concatenate([apart, np.ones((n, 1))], axis=1, dtype=np.float32, casting="same_kind") @ self._columns
            )
        blocks = squares.reshape(n, BLOCK, self._width)
        chosen = _least(blocks.min(axis=1), min(near, self._width))[:, None]
        among = np.take_along_axis(blocks, chosen, axis=2).reshape(n, -1)
        indices = (np.arange(BLOCK)[:, None] * self._width + chosen).reshape(n, -1)
        least = _least(among, near)
        beyond = np.take_along_axis(among, least[:, -1:], axis=1)[:, 0]
        return np.minimum(np.take_along_axis(indices, least, axis=1), len(self._points) - 1), beyond

    def _are_nearest(self, apart: np.ndarray, farthest: np.ndarray, beyond: np.ndarray) -> np.ndarray:
        """True for each row whose candidates are proved to hold its nearest points: bool [N].

        ``farthest``: the largest squared distance that would be answered; ``beyond``: the least float32 result of the
        points that are no candidates.
        """
        norms = (apart**2).sum(axis=1)
        c = (apart.shape[1] + 6) * 2.0**-24
        c /= 1 - c
        least = (beyond + (1 - 5 * c) * norms) / (1 + 4 * c)
        # Below the first bound float32 may have lost denormal numbers, beyond the second far points may be near.
        return (farthest + 1e-30 <= least) & (np.maximum(norms, farthest) <= FAR / 1e4) & np.isfinite(beyond)

    def _by_all(self, row: np.ndarray) -> np.ndarray:
        """Squared distances of one row [L] to the nearest of all points, ascending: float64 [count]."""
        step = max(1, AT_ONCE // len(row))
        parts = [self._points[i : i + step].astype(np.float64) - row for i in range(0, len(self._points), step)]
        squares = np.concatenate([(part**2).sum(axis=1) for part in parts])
        return np.sort(np.partition(squares, self._count - 1)[: self._count])


def _least(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` least of each row of values [N,M], the largest of them last: int64 [N,count]."""
    return np.argpartition(values, count - 1, axis=1)[:, :count]
