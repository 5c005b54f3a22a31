"""Piecewise linear functions, evaluated on many numbers at once."""

from __future__ import annotations

import numpy as np

CELLS = 2**12
"""Cells of the even grid between the first and the last knot."""


class PiecewiseLinear:
    """Function that is linear between knots, constant before the first, and goes on with a slope beyond the last.

    Between the knots it agrees with ``np.interp``, which spends most of its time on searching hundreds of knots for
    each number: here a number's cell on an even grid leaves only the knots of that cell to search. A number's result
    depends on no other one, bitwise.
    """

    def __init__(self, knots: np.ndarray, values: np.ndarray, slope: float) -> None:
        """``knots`` and ``values``: float64 [K], K ≥ 1, the knots not falling; at equal knots the function jumps.

        The distance from the first to the last knot must be finite.
        """
        rises = np.diff(knots) > 0
        first, last = np.insert(rises, 0, True), np.append(rises, True)
        ends, before, after = knots[last], values[first], values[last]
        with np.errstate(over="ignore"):  # hardly a number lies between knots so close (1e-300)
            slopes = np.minimum((before[1:] - after[:-1]) / np.diff(ends), np.finfo(float).max)
        # Piece i begins at knot i − 1, the first one before all knots.
        self._origins, self._levels = np.insert(ends, 0, ends[0]), np.insert(after, 0, values[0])
        self._slopes = np.array([0.0, *slopes, slope])
        self._low = float(np.nextafter(ends[0], -np.inf))
        self._cells_a_unit = CELLS / max(float(ends[-1]) - self._low, float(np.finfo(float).tiny))
        knots_by_cell = np.bincount(self._cell(ends), minlength=CELLS + 1)
        self._pieces_before = np.cumsum(knots_by_cell) - knots_by_cell
        # Steps of a binary search among the knots of a cell: how many knots each may pass.
        steps = [2**power for power in reversed(range(int(knots_by_cell.max()).bit_length()))]
        padded = np.append(ends, np.full(max(steps), np.nan))
        self._steps = [(step, padded[step - 1 :]) for step in steps]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Evaluate at x, float64 of any shape: an array of the same shape, NaN for NaN."""
        x = np.maximum(x, self._low)
        with np.errstate(invalid="ignore"):  # NaN has no cell: any cell will do
            piece = self._pieces_before.take(self._cell(x), mode="clip")
        for step, knots in self._steps:
            piece += step * (x >= knots.take(piece))
        x -= self._origins.take(piece)
        x *= self._slopes.take(piece)
        x += self._levels.take(piece)
        return x

    def _cell(self, x: np.ndarray) -> np.ndarray:
        """Cell of each number. It rises with x: knots in other cells lie on the side on which these cells lie."""
        share: np.ndarray = (x - self._low) * self._cells_a_unit
        return np.minimum(share, CELLS, out=share).astype(np.intp)
