"""Piecewise linear functions of many numbers at once."""

from __future__ import annotations

import numpy as np

CELLS = 2**12


class PiecewiseLinear:
    """Linear between knots, constant before the first, and beyond the last straight on with a slope.

    Between the knots it is what ``np.interp`` gives, whose search for each number's place among them takes most of its
    time where there are hundreds: here a number's cell on an even grid tells the place, but for the knots in that cell.
    A number's answer depends on no other one, bitwise.
    """

    def __init__(self, knots: np.ndarray, values: np.ndarray, slope: float) -> None:
        """``knots`` and ``values``: float64 [K], K ≥ 1, the knots not falling; at equal ones it jumps.

        The first and the last knot are apart by a finite number.
        """
        rises = np.diff(knots) > 0
        first, last = np.insert(rises, 0, True), np.append(rises, True)
        ends, before, after = knots[last], values[first], values[last]
        with np.errstate(over="ignore"):  # between knots so close (1e-300) hardly a number lies
            slopes = np.minimum((before[1:] - after[:-1]) / np.diff(ends), np.finfo(float).max)
        # Piece i begins at knot i − 1, the first one before all knots.
        self._origins, self._levels = np.insert(ends, 0, ends[0]), np.insert(after, 0, values[0])
        self._slopes = np.array([0.0, *slopes, slope])
        self._low = float(np.nextafter(ends[0], -np.inf))
        self._cells_a_unit = CELLS / max(float(ends[-1]) - self._low, float(np.finfo(float).tiny))
        held = np.bincount(self._cell(ends), minlength=CELLS + 1)
        self._begun = np.cumsum(held) - held  # pieces that begin in the cells before
        # Steps of a binary search among the knots of a cell: those of the knots that each may pass.
        steps = [2**power for power in reversed(range(int(held.max()).bit_length()))]
        padded = np.append(ends, np.full(max(steps), np.nan))
        self._steps = [(step, padded[step - 1 :]) for step in steps]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """float64 of any shape -> of the same shape; NaN for NaN."""
        x = np.maximum(x, self._low)
        with np.errstate(invalid="ignore"):  # NaN has no cell: any will do
            piece = self._begun.take(self._cell(x), mode="clip")
        for step, knots in self._steps:
            piece += step * (x >= knots.take(piece))
        x -= self._origins.take(piece)
        x *= self._slopes.take(piece)
        x += self._levels.take(piece)
        return x

    def _cell(self, x: np.ndarray) -> np.ndarray:
        """Rises with x, so that knots in other cells lie on the side on which their cells do."""
        share: np.ndarray = (x - self._low) * self._cells_a_unit
        return np.minimum(share, CELLS, out=share).astype(np.intp)
