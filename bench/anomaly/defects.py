"""Synthetic defects on grey images of an object before black: patches, scratches, blobs, missing parts.

Every defect is a coverage α in [0, 1] and what shows through it, both [H,W]; the image becomes (1 − α) x + α paint.
Sizes are in pixels of a 28×28 image. Changes below VISIBLE levels are taken back, so that the mask is exactly where the
image differs. A defect of fewer than MIN_SHARE of the pixels, or one that changes them by less than MIN_CHANGE
levels on average, is drawn again: each can be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter

from bench.anomaly.transforms import as_levels

VISIBLE = 16  # levels of 255
MIN_CHANGE = 40
MIN_SHARE = 0.01
TRIES = 200
OBJECT = 24  # levels above which a pixel is taken for the object's
ZOOM = 8  # shapes are drawn so much larger and reduced: their edges are anti-aliased

Painted = tuple[np.ndarray, np.ndarray]
Draw = Callable[[np.ndarray, np.ndarray, np.random.RandomState], Painted]


class NoRoomForDefect(ValueError):
    """No visible defect fits on the image: it is (nearly) black."""


def patch(x: np.ndarray, other: np.ndarray, random: np.random.RandomState) -> Painted:
    """A turned rectangle of 4–10 by 4–10 pixels on the object, plain or cut from the middle of another image."""
    centre = _place(x, random)
    half = random.uniform(2, 5, 2)
    angle = random.uniform(0, math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half @ turn.T + centre
    alpha = random.uniform(0.75, 1) * _drawn(x.shape, lambda canvas: canvas.polygon(_points(corners), fill=255))
    if random.random_sample() < 0.5:
        return alpha, np.full(x.shape, _contrasting(x, alpha, random))
    shift = np.rint(np.array(x.shape) / 2 - centre[::-1]).astype(int)
    return alpha, np.roll(other, tuple(-shift), axis=(0, 1)).astype(np.float64)


def scratch(x: np.ndarray, other: np.ndarray, random: np.random.RandomState) -> Painted:
    """A bent line, 9–22 pixels long and 0.8–2 wide, through the object; lighter or darker than what it crosses."""
    centre, angle = _place(x, random), random.uniform(0, math.pi)
    direction = np.array([math.cos(angle), math.sin(angle)])
    normal = np.array([-direction[1], direction[0]])
    reach, bend = random.uniform(4.5, 11), random.uniform(-3, 3)
    t = np.linspace(-1, 1, 17)[:, None]
    path = centre + reach * t * direction + bend * (1 - t**2) * normal + random.normal(0, 0.15, (17, 2))
    width = max(1, round(ZOOM * random.uniform(0.8, 2)))
    alpha = _drawn(x.shape, lambda canvas: canvas.line(_points(path), fill=255, width=width, joint="curve"))
    return alpha, np.full(x.shape, _contrasting(x, alpha, random))


def blob(x: np.ndarray, other: np.ndarray, random: np.random.RandomState) -> Painted:
    """A stain with a soft, irregular rim, 4–11 pixels across, that lightens or darkens what lies below."""
    centre, radius = _place(x, random), random.uniform(2, 5.5)
    row, column = np.indices(x.shape)
    distance = np.hypot(column + 0.5 - centre[0], row + 0.5 - centre[1])
    ripples = gaussian_filter(random.standard_normal(x.shape), 1.5)
    ripples *= 0.25 * radius / ripples.std()
    alpha = random.uniform(0.5, 0.95) / (1 + np.exp(2 * (distance + ripples - radius)))
    return alpha, np.full(x.shape, _contrasting(x, alpha, random))


def missing_part(x: np.ndarray, other: np.ndarray, random: np.random.RandomState) -> Painted:
    """A bite from the outline, or all beyond a cut: 4–25% of the object turns to black background.

    Cuts are 20° and more askew: a straight one makes a shorter garment, which is none the worse for it.
    """
    inside = x > OBJECT
    if random.random_sample() < 0.5:
        rows, columns = np.nonzero(inside & ~_eroded(inside))
        at = random.randint(len(rows))
        row, column = np.indices(x.shape)
        depth = np.hypot(column - columns[at], row - rows[at])
    else:
        angle = math.radians(90 * random.randint(4) + random.uniform(20, 70))
        row, column = np.indices(x.shape)
        depth = math.cos(angle) * column + math.sin(angle) * row
    limit = np.quantile(depth[inside], random.uniform(0.04, 0.25))
    return np.clip(limit + 0.5 - depth, 0, 1), np.zeros(x.shape)


DEFECTS: dict[str, Draw] = {"patch": patch, "scratch": scratch, "blob": blob, "missing-part": missing_part}


def with_defects(x: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x uint8 [N,1,H,W] -> the same with one defect of ``kind`` each, and where they differ, bool [N,H,W].

    An image's defect depends on the seed, its place in x and, for a patch's texture, on the image before it.
    Raises NoRoomForDefect.
    """
    pairs = [_defective(image[0], x[i - 1, 0], kind, seed, i) for i, image in enumerate(x)]
    images, masks = (np.stack(part) for part in zip(*pairs, strict=True))
    return images[:, None], masks


def _defective(x: np.ndarray, other: np.ndarray, kind: str, seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState([seed, list(DEFECTS).index(kind), index])
    if (x > OBJECT).sum() < MIN_SHARE * x.size:
        raise NoRoomForDefect(f"image {index}: hardly a pixel is above {OBJECT} levels, where a defect would lie")
    for _ in range(TRIES):
        alpha, paint = DEFECTS[kind](x, other, random)
        painted = as_levels((1 - alpha) * x + alpha * paint)
        change = np.abs(painted.astype(int) - x)
        mask = change >= VISIBLE
        if mask.sum() >= MIN_SHARE * x.size and change[mask].mean() >= MIN_CHANGE:
            return np.where(mask, painted, x), mask
    raise NoRoomForDefect(f"image {index}: none of {TRIES} drawn defects of kind {kind} can be seen on it")


def _place(x: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """A point (column, row) on the object, float64 [2]."""
    rows, columns = np.nonzero(x > OBJECT)
    at = random.randint(len(rows))
    return np.array([columns[at], rows[at]]) + random.random_sample(2)


def _contrasting(x: np.ndarray, alpha: np.ndarray, random: np.random.RandomState) -> float:
    """A level 50–170 away from the mean below the defect, on a side where the range has room for it."""
    mean = float((alpha * x).sum() / max(alpha.sum(), 1e-9))
    contrast = random.uniform(50, 170)
    sides = [level for level in _order((mean + contrast, mean - contrast), random) if 0 <= level <= 255]
    return sides[0] if sides else (0.0 if mean > 127 else 255.0)


def _order(pair: tuple[float, float], random: np.random.RandomState) -> tuple[float, float]:
    return pair if random.random_sample() < 0.5 else pair[::-1]


def _drawn(shape: tuple[int, ...], draw: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    """Coverage in [0, 1], [H,W], of what ``draw`` paints white on a canvas ZOOM times as large."""
    canvas = Image.new("L", (shape[1] * ZOOM, shape[0] * ZOOM))
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas.reduce(ZOOM)) / 255


def _points(path: np.ndarray) -> list[tuple[float, float]]:
    return [(float(column), float(row)) for column, row in ZOOM * path]


def _eroded(inside: np.ndarray) -> np.ndarray:
    """Without the pixels that have a neighbour outside; beyond the image is outside."""
    padded = np.pad(inside, 1)
    return inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
