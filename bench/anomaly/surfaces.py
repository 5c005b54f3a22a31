"""Synthetic surfaces in grey, float64 [H,W] in [0, 1], and flaws in them, with masks: a stand-in for photographs.

Each surface has its own gain, level, light from one side, and phase; the numbers were chosen by looking at pictures of
them, before any detector was run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import gaussian_filter

Random = np.random.RandomState
Surface = Callable[[int, Random], np.ndarray]


def plaster(size: int, random: Random) -> np.ndarray:
    """Isotropic grain of two sizes."""
    return 0.12 * _grain(size, (2, 2), random) + 0.04 * _grain(size, (8, 8), random)


def brushed(size: int, random: Random) -> np.ndarray:
    """Fine strokes along the rows, and noise."""
    return 0.08 * _grain(size, (0.6, 12), random) + 0.015 * random.standard_normal((size, size))


def woven(size: int, random: Random) -> np.ndarray:
    """Threads that cross every eight pixels or so, a little uneven, and noise."""
    row, column = np.indices((size, size))
    wave = 2 * np.pi / random.uniform(7.6, 8.4)
    phases = random.uniform(0, 2 * np.pi, 2)
    uneven = 0.6 * _grain(size, (12, 12), random)
    threads = np.sin(wave * row + phases[0] + uneven) * np.sin(wave * column + phases[1] + uneven)
    return 0.14 * threads + 0.03 * random.standard_normal((size, size))


SURFACES: dict[str, Surface] = {"plaster": plaster, "brushed": brushed, "woven": woven}
FLAWS = ("scratch", "stain", "worn")


def surfaces(kind: str, count: int, size: int, random: Random) -> np.ndarray:
    """So many surfaces, float64 [count,size,size] in [0, 1]."""
    return np.stack([_lit(SURFACES[kind](size, random), random) for _ in range(count)])


def flawed(x: np.ndarray, flaw: str, random: Random) -> tuple[np.ndarray, np.ndarray]:
    """Surfaces [N,H,W] with one flaw each, and where it is, bool [N,H,W].

    ``scratch``: a straight line, 20–36 long and 2.4 wide, lighter or darker by 0.3. ``stain``: a disc 8–14 across,
    lighter or darker by 0.2. ``worn``: a square of 16 pixels whose contrast is 30% of what it was, its mean kept.
    """
    pairs = [_FLAWS[flaw](image, random) for image in x]
    images, masks = (np.stack(part) for part in zip(*pairs, strict=True))
    return images, masks


def _lit(relief: np.ndarray, random: Random) -> np.ndarray:
    light = np.linspace(-1, 1, relief.shape[1]) * random.uniform(-0.04, 0.04)
    return np.clip(random.uniform(0.45, 0.55) + random.uniform(0.85, 1.15) * relief + light, 0, 1)


def _grain(size: int, sigma: tuple[float, float], random: Random) -> np.ndarray:
    smooth = gaussian_filter(random.standard_normal((size, size)), sigma, mode="wrap")
    return smooth / smooth.std()


def _centre(x: np.ndarray, random: Random) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns from a point in the middle half."""
    row, column = np.indices(x.shape)
    at = [random.randint(side // 4, side - side // 4) for side in x.shape]
    return row - at[0], column - at[1]


def _scratch(x: np.ndarray, random: Random) -> tuple[np.ndarray, np.ndarray]:
    row, column = _centre(x, random)
    angle, reach = random.uniform(0, np.pi), random.uniform(10, 18)
    across = np.abs(row * np.cos(angle) - column * np.sin(angle))
    along = np.abs(row * np.sin(angle) + column * np.cos(angle))
    return _shifted(x, (across < 1.2) & (along < reach), random.choice([-0.3, 0.3]))


def _stain(x: np.ndarray, random: Random) -> tuple[np.ndarray, np.ndarray]:
    row, column = _centre(x, random)
    return _shifted(x, np.hypot(row, column) < random.uniform(4, 7), random.choice([-0.2, 0.2]))


def _worn(x: np.ndarray, random: Random) -> tuple[np.ndarray, np.ndarray]:
    row, column = _centre(x, random)
    mask = (np.abs(row) < 8) & (np.abs(column) < 8)
    mean = x[mask].mean()
    return np.where(mask, mean + 0.3 * (x - mean), x), mask


def _shifted(x: np.ndarray, mask: np.ndarray, by: float) -> tuple[np.ndarray, np.ndarray]:
    return np.clip(np.where(mask, x + by, x), 0, 1), mask


_FLAWS = {"scratch": _scratch, "stain": _stain, "worn": _worn}
