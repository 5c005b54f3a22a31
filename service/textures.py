"""What energy a residual is expected to have where a row has a certain texture, as inliers show it.

A busy cloth is badly reconstructed all over, and none the worse for it: without this its image would be as anomalous as
a plain one with a stain. The texture of a place is described by TEXTURES numbers of its surroundings, the expected
energy and its spread are quadratic in each of them, by least squares over inliers' places.
"""

from __future__ import annotations

import numpy as np

from service.averages import smoothed
from service.detector_arrays import Arrays, Spec, Specs

WIDE, NARROW = 5 / 3, 2 / 3
TEXTURES = 4
LEAST_SLOPE, LEAST_DETAIL = 0.1, 0.01  # in units and squared units of the residual: below them a place is plain
LEAST_SPREAD = 0.2  # of the mean spread
COEFFICIENTS = 1 + 2 * TEXTURES
MOST_PLACES = 2**16


def textures(x: np.ndarray, mean: np.ndarray, unit: float, sigma: float) -> np.ndarray:
    """Of rows x and their E[x|loc], both [N,C,H,W], in units of ``unit``: float64 [N,TEXTURES,H,W].

    log of the mean slope of x around the place, log of the mean square of what a narrow average takes from x there, the
    mean of E[x|loc] there, and log of the mean slope of the whole row. Around: a Gaussian of WIDE·sigma places.
    """
    u = x.astype(np.float64) / unit
    slope = _slope(u).mean(axis=1)
    detail = ((u - smoothed(u, NARROW * sigma)) ** 2).mean(axis=1)
    brightness = mean.mean(axis=1, dtype=np.float64) / unit
    found = smoothed(np.stack([slope, detail, brightness, slope], axis=1), WIDE * sigma)
    found[:, 0] = np.log(found[:, 0] + LEAST_SLOPE)
    found[:, 1] = np.log(found[:, 1] + LEAST_DETAIL)
    found[:, 3] = np.log(slope.reshape(len(x), -1).mean(axis=1) + LEAST_SLOPE)[:, None, None]
    return found


class Expected:
    """Expected energy and spread by texture; ``arrays`` are kept with the bundle."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays

    @staticmethod
    def specs() -> Specs:
        """Of ``arrays``."""
        line = Spec((COEFFICIENTS,))
        return {
            "low": Spec((TEXTURES,)),
            "high": Spec((TEXTURES,)),
            "energy": line,
            "spread": line,
            "least": Spec((), positive=True),
        }

    @classmethod
    def fit(cls, energies: np.ndarray, found: np.ndarray) -> Expected:
        """From energies [n,H,W] of inliers' places and their textures [n,TEXTURES,H,W]."""
        y = energies.reshape(-1)
        t = _by_place(found).reshape(-1, TEXTURES)
        step = -(-len(y) // MOST_PLACES)
        y, t = y[::step], t[::step]
        arrays: Arrays = {"low": t.min(axis=0), "high": t.max(axis=0)}
        columns = _columns(t, arrays["low"], arrays["high"])
        arrays["energy"] = np.linalg.lstsq(columns, y, rcond=1e-9)[0]
        away = np.abs(y - columns @ arrays["energy"])
        arrays["spread"] = np.linalg.lstsq(columns, away, rcond=1e-9)[0]
        arrays["least"] = np.array(max(LEAST_SPREAD * float(away.mean()), 1e-6))
        return cls(arrays)

    def excess(self, energies: np.ndarray, found: np.ndarray) -> np.ndarray:
        """How far energies [N,H,W] lie beyond what textures [N,TEXTURES,H,W] let expect, in spreads: [N,H,W]."""
        columns = _columns(_by_place(found), self.arrays["low"], self.arrays["high"])
        expected, spread = columns @ self.arrays["energy"], columns @ self.arrays["spread"]
        away = (energies.reshape(expected.shape) - expected) / np.maximum(spread, self.arrays["least"])
        return away.reshape(energies.shape)


def _by_place(found: np.ndarray) -> np.ndarray:
    """[N,TEXTURES,H,W] -> [N,H·W,TEXTURES]."""
    return found.reshape(len(found), TEXTURES, -1).transpose(0, 2, 1)


def _columns(t: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """1, t and t² of textures […,TEXTURES], each as a share of the inliers' range and no further: […,COEFFICIENTS]."""
    columns = np.empty((*t.shape[:-1], COEFFICIENTS))
    share = columns[..., 1 : 1 + TEXTURES]
    columns[..., 0] = 1.0
    np.clip((t - low) / np.maximum(high - low, 1e-9), 0.0, 1.0, out=share)
    np.square(share, out=columns[..., 1 + TEXTURES :])
    return columns


def _slope(u: np.ndarray) -> np.ndarray:
    """Mean absolute difference to the next place down and the next across, [N,C,H,W]; 0 beyond the edge."""
    total = np.zeros_like(u)
    total[:, :, :-1] += np.abs(np.diff(u, axis=2))
    total[..., :-1] += np.abs(np.diff(u, axis=3))
    return total / 2
