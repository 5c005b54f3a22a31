"""Distances to the nearest of many points: candidates by a product in float32, their distances in float64."""

from __future__ import annotations

import numpy as np

from service.scores.chunks import NUMBERS

BLOCK = 64
MAX_DISTANCES = 2**21
"""Most distances between rows and points that are in memory at once."""
FAR = 1e36
"""Squared norm from which on float32 decides nothing: its range ends a little further."""
MAX_ERROR = 1 / 40
"""Relative error c from which on float32 decides nothing: below it 16c is enough."""


class NearestNeighbours:
    """The nearest of ``points``, float32 [m,L], to any row, by Euclidean distance.

    Let points r and rows x be relative to the points' mean, e the squared distance, n = L + 6, u = 2⁻²⁴ and c = n u.
    The float32 result t for |r|² − 2 r·x, which is e − |x|², is off by c/(1 − c) (|x|² + 2|r|²) at most: each of its
    L + 1 terms is rounded at most n times (Higham 2002, sec. 3.1), and 2 Σ|r x| ≤ |x|² + |r|². As |r|² ≤ 2|x|² + 2e,
    that is off by c/(1 − c) (5|x|² + 4e) at most. So where k points have results of at most T, no point as near as the
    farthest of these has a result beyond

        T + 16c (2|x|² + |T|),

    with room for the rounding of this bound and of e. All points up to there are candidates. T is the k-th least of the
    blocks' least results, which lets in few others.
    """

    def __init__(self, points: np.ndarray, count: int) -> None:
        self._points, self._count = points, min(count, len(points))
        self._centre = points.mean(axis=0, dtype=np.float64)
        apart = points - self._centre
        norms = (apart**2).sum(axis=1)
        self._error = (points.shape[1] + 6) * 2.0**-24
        self._decides = bool(norms.max() < FAR) and self._error < MAX_ERROR
        # −2 r and |r|² of each point r, a column each. Every width-th column is of the same block, and each block of
        # the first ``count`` holds a point; the columns that are left over lie at infinity.
        width = max(self._count, -(-len(points) // BLOCK))
        self._columns = np.zeros((points.shape[1] + 1, BLOCK * width), np.float32)
        self._columns[-1] = np.inf
        with np.errstate(over="ignore"):
            self._columns[:, : len(points)] = np.vstack([-2 * apart.T, norms])

    def distances(self, rows: np.ndarray) -> np.ndarray:
        """Distances to the nearest ``count`` points, or to all if there are fewer, ascending: float64 [N,·].

        ``rows``: finite float32 [N,L]. A row's answer does not depend on the other rows, bitwise.
        """
        step = max(1, MAX_DISTANCES // self._columns.shape[1])
        return np.sqrt(np.concatenate([self._squares(rows[i : i + step]) for i in range(0, len(rows), step)]))

    def _squares(self, rows: np.ndarray) -> np.ndarray:
        """Squared distances of rows [N,L] to the nearest points, ascending: float64 [N,·]."""
        row, point = np.divmod(np.flatnonzero(self._are_candidates(rows - self._centre)), len(self._points))
        squares, step = np.empty(len(row)), max(1, NUMBERS // rows.shape[1])
        for at in (slice(i, i + step) for i in range(0, len(row), step)):
            squares[at] = ((self._points[point[at]].astype(np.float64) - rows[row[at]]) ** 2).sum(axis=1)
        first = np.searchsorted(row, np.arange(len(rows)))
        return squares[np.lexsort((squares, row))][first[:, None] + np.arange(self._count)]

    def _are_candidates(self, apart: np.ndarray) -> np.ndarray:
        """True where a point may be among the nearest of a row, bool [N,m]; ``apart``: the rows, float64 [N,L]."""
        norms = (apart**2).sum(axis=1)
        with np.errstate(over="ignore", invalid="ignore"):  # where float32 does not decide, all points are candidates
            results = np.column_stack([apart, np.ones(len(apart))]).astype(np.float32) @ self._columns
            least = results.reshape(len(apart), BLOCK, -1).min(axis=1)
            t = np.partition(least, self._count - 1, axis=1)[:, self._count - 1].astype(np.float64)
            bound = t + 16 * self._error * (2 * norms + np.abs(t)) + 1e-30  # below that float32 loses denormal numbers
            bound = np.where(self._decides & (norms < FAR), bound, np.inf).astype(np.float32)
        return ~(results[:, : len(self._points)] > bound[:, None])
