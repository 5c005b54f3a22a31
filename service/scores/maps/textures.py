"""Expected energy of a residual given the texture of its surroundings, fitted to inliers.

A busy cloth is badly reconstructed all over and still normal: without this its image would be as anomalous as a plain
one with a stain. TEXTURES numbers describe the surroundings of a place; the expected energy and its spread are
quadratic in each of them, by least squares over inliers' places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.scores.detector_arrays import ArraySpec, ArraySpecs
from service.scores.maps.averages import channel_mean, smoothed

WIDE, NARROW = 5 / 3, 2 / 3
TEXTURES = 4
MIN_SLOPE, MIN_DETAIL = 0.1, 0.01
"""Slope and detail, in units and squared units of the residual, below which all places count as equally plain."""
MIN_SPREAD = 0.2
"""Least spread, relative to the mean spread."""
COEFFICIENTS = 1 + 2 * TEXTURES
"""Coefficients of a quadratic: of 1, of each texture, and of its square."""
MAX_PLACES = 2**16
"""Most places that the quadratics are fitted to."""


def textures(x: np.ndarray, mean: np.ndarray, unit: float, sigma: float) -> np.ndarray:
    """Textures, float64 [N,TEXTURES,H,W], of rows x and ``mean`` E[x|loc], both [N,C,H,W] and divided by ``unit``.

    They are the log of the mean slope of x around the place, the log of the mean square of x minus a narrow average of
    it, the mean of E[x|loc], and the log of the mean slope of the whole row. Means around a place are Gaussian averages
    of WIDE·sigma places.
    """
    u = np.divide(x, unit, dtype=np.float64)
    slope = channel_mean(_slope(u))
    detail = channel_mean((u - smoothed(u, NARROW * sigma)) ** 2)
    brightness = channel_mean(np.divide(mean, unit, dtype=np.float64))
    values = np.empty((len(x), TEXTURES, *x.shape[2:]))
    np.log(smoothed(slope, WIDE * sigma) + MIN_SLOPE, out=values[:, 0])
    np.log(smoothed(detail, WIDE * sigma) + MIN_DETAIL, out=values[:, 1])
    values[:, 2] = smoothed(brightness, WIDE * sigma)
    values[:, 3] = np.log(slope.reshape(len(x), -1).mean(axis=1) + MIN_SLOPE)[:, None, None]
    return values


@dataclass(frozen=True, eq=False)
class ExpectedEnergy:
    """Expected energy and its spread by texture, float64.

    ``low``, ``high``: range of the inliers' textures, [TEXTURES]. ``energy``, ``spread``: coefficients of the
    quadratics, [COEFFICIENTS]. ``least``: least spread, [].
    """

    low: np.ndarray
    high: np.ndarray
    energy: np.ndarray
    spread: np.ndarray
    least: np.ndarray

    @staticmethod
    def specs() -> ArraySpecs:
        """Requirements on the arrays, by the names of their fields."""
        line = ArraySpec((COEFFICIENTS,))
        return {
            "low": ArraySpec((TEXTURES,)),
            "high": ArraySpec((TEXTURES,)),
            "energy": line,
            "spread": line,
            "least": ArraySpec((), positive=True),
        }

    @classmethod
    def fit(cls, energies: np.ndarray, textures: np.ndarray) -> ExpectedEnergy:
        """Fit to energies [n,H,W] of inliers' places and their textures [n,TEXTURES,H,W]."""
        y = energies.reshape(-1)
        t = textures.reshape(len(textures), TEXTURES, -1).transpose(0, 2, 1).reshape(-1, TEXTURES)
        step = -(-len(y) // MAX_PLACES)
        y, t = y[::step], t[::step]
        low, high = t.min(axis=0), t.max(axis=0)
        shares = np.stack([_share(t[:, i], low[i], high[i]) for i in range(TEXTURES)], axis=1)
        columns = np.concatenate([np.ones((len(y), 1)), shares, shares**2], axis=1)
        energy = np.linalg.lstsq(columns, y, rcond=1e-9)[0]
        away = np.abs(y - columns @ energy)
        spread = np.linalg.lstsq(columns, away, rcond=1e-9)[0]
        return cls(low, high, energy, spread, np.array(max(MIN_SPREAD * float(away.mean()), 1e-6)))

    def excess(self, energies: np.ndarray, textures: np.ndarray) -> np.ndarray:
        """Energies [N,H,W] minus those that textures [N,TEXTURES,H,W] let expect, in spreads: float64 [N,H,W]."""
        n = len(textures)
        shares = [_share(textures[:, i].reshape(n, -1), self.low[i], self.high[i]) for i in range(TEXTURES)]
        expected, spread = (_quadratic(coefficients, shares) for coefficients in (self.energy, self.spread))
        away = energies.reshape(n, -1) - expected
        away /= np.maximum(spread, self.least, out=spread)
        return away.reshape(energies.shape)


def _share(texture: np.ndarray, low: float, high: float) -> np.ndarray:
    """A texture as a share of the inliers' range, clipped to [0, 1]."""
    share: np.ndarray = texture - low
    share /= max(high - low, 1e-9)
    return np.clip(share, 0.0, 1.0, out=share)


def _quadratic(coefficients: np.ndarray, shares: Sequence[np.ndarray]) -> np.ndarray:
    """Quadratic c₀ + Σ (c t + c' t²) over the textures' shares t, arrays of one shape."""
    total = np.full(shares[0].shape, coefficients[0])
    for share, linear, square in zip(shares, *np.split(coefficients[1:], 2), strict=True):
        part = share * square
        part += linear
        part *= share
        total += part
    return total


def _slope(u: np.ndarray) -> np.ndarray:
    """Mean absolute difference to the next place down and the next across, [N,C,H,W]; 0 beyond the edge."""
    total = np.zeros_like(u)
    _add_steps(total[:, :, :-1], u[:, :, 1:], u[:, :, :-1])
    _add_steps(total[..., :-1], u[..., 1:], u[..., :-1])
    total /= 2
    return total


def _add_steps(total: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Add |a − b| to the array ``total`` itself."""
    steps = a - b
    total += np.abs(steps, out=steps)
