"""What energy a residual is expected to have where a row has a certain texture, as inliers show it.

A busy cloth is badly reconstructed all over, and none the worse for it: without this its image would be as anomalous as
a plain one with a stain. The texture of a place is described by TEXTURES numbers of its surroundings, the expected
energy and its spread are quadratic in each of them, by least squares over inliers' places.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.scores.detector_arrays import Arrays, ArraySpec, ArraySpecs
from service.scores.maps.averages import channel_mean, smoothed

WIDE, NARROW = 5 / 3, 2 / 3
TEXTURES = 4
LEAST_SLOPE, LEAST_DETAIL = 0.1, 0.01  # in units and squared units of the residual: below them a place is plain
LEAST_SPREAD = 0.2  # of the mean spread
COEFFICIENTS = 1 + 2 * TEXTURES  # of 1, of each texture and of its square
MOST_PLACES = 2**16


def textures(x: np.ndarray, mean: np.ndarray, unit: float, sigma: float) -> np.ndarray:
    """Of rows x and their E[x|loc], both [N,C,H,W], in units of ``unit``: float64 [N,TEXTURES,H,W].

    log of the mean slope of x around the place, log of the mean square of what a narrow average takes from x there, the
    mean of E[x|loc] there, and log of the mean slope of the whole row. Around: a Gaussian of WIDE·sigma places.
    """
    u = np.divide(x, unit, dtype=np.float64)
    slope = channel_mean(_slope(u))
    detail = channel_mean((u - smoothed(u, NARROW * sigma)) ** 2)
    brightness = channel_mean(np.divide(mean, unit, dtype=np.float64))
    found = np.empty((len(x), TEXTURES, *x.shape[2:]))
    np.log(smoothed(slope, WIDE * sigma) + LEAST_SLOPE, out=found[:, 0])
    np.log(smoothed(detail, WIDE * sigma) + LEAST_DETAIL, out=found[:, 1])
    found[:, 2] = smoothed(brightness, WIDE * sigma)
    found[:, 3] = np.log(slope.reshape(len(x), -1).mean(axis=1) + LEAST_SLOPE)[:, None, None]
    return found


class ExpectedEnergy:
    """Expected energy and spread by texture; ``arrays`` are kept with the bundle."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    @staticmethod
    def specs() -> ArraySpecs:
        """Of ``arrays``."""
        line = ArraySpec((COEFFICIENTS,))
        return {
            "low": ArraySpec((TEXTURES,)),
            "high": ArraySpec((TEXTURES,)),
            "energy": line,
            "spread": line,
            "least": ArraySpec((), positive=True),
        }

    @classmethod
    def fit(cls, energies: np.ndarray, found: np.ndarray) -> ExpectedEnergy:
        """From energies [n,H,W] of inliers' places and their textures [n,TEXTURES,H,W]."""
        y = energies.reshape(-1)
        t = found.reshape(len(found), TEXTURES, -1).transpose(0, 2, 1).reshape(-1, TEXTURES)
        step = -(-len(y) // MOST_PLACES)
        y, t = y[::step], t[::step]
        arrays: Arrays = {"low": t.min(axis=0), "high": t.max(axis=0)}
        shares = np.stack([_share(t[:, i], arrays["low"][i], arrays["high"][i]) for i in range(TEXTURES)], axis=1)
        columns = np.concatenate([np.ones((len(y), 1)), shares, shares**2], axis=1)
        arrays["energy"] = np.linalg.lstsq(columns, y, rcond=1e-9)[0]
        away = np.abs(y - columns @ arrays["energy"])
        arrays["spread"] = np.linalg.lstsq(columns, away, rcond=1e-9)[0]
        arrays["least"] = np.array(max(LEAST_SPREAD * float(away.mean()), 1e-6))
        return cls(arrays)

    def excess(self, energies: np.ndarray, found: np.ndarray) -> np.ndarray:
        """How far energies [N,H,W] lie beyond what textures [N,TEXTURES,H,W] let expect, in spreads: [N,H,W]."""
        n = len(found)
        shares = [
            _share(found[:, i].reshape(n, -1), self.arrays["low"][i], self.arrays["high"][i]) for i in range(TEXTURES)
        ]
        expected, spread = (_quadratic(self.arrays[name], shares) for name in ("energy", "spread"))
        away = energies.reshape(n, -1) - expected
        away /= np.maximum(spread, self.arrays["least"], out=spread)
        return away.reshape(energies.shape)


def _share(texture: np.ndarray, low: float, high: float) -> np.ndarray:
    """A texture as a share of the inliers' range, and no further."""
    share: np.ndarray = texture - low
    share /= max(high - low, 1e-9)
    return np.clip(share, 0.0, 1.0, out=share)


def _quadratic(coefficients: np.ndarray, shares: Sequence[np.ndarray]) -> np.ndarray:
    """c₀ + Σ c t + c' t² over the textures' shares t."""
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
    steps = a - b
    total += np.abs(steps, out=steps)
