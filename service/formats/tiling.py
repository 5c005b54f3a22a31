"""Where the tiles of an image lie, and how their maps become one: geometry alone, no model.

Tiles that overlap are blended by a tent of whole numbers, highest in the tile's middle. A place's value is a weighted
mean of what its tiles say; where there is one tile it is that tile's own number, bitwise: the product of a float32 and
a whole number below 2^23 is exact in float64, and so is its quotient by that number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput


@dataclass(frozen=True)
class Plan:
    """Upper left corners of an image's tiles: every pair of ``rows`` and ``columns``, ascending pixels, row by row."""

    size: tuple[int, int]
    tile: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, rule: Preprocessing, height: int, width: int) -> Plan:
        """The plan for an image of that size. Raises InvalidInput for one that is smaller than a tile."""
        assert rule.tiling is not None
        check_size(rule, height, width)
        down, across = rule.tiling.stride
        rows, columns = _starts(height, rule.height, down), _starts(width, rule.width, across)
        return cls((height, width), (rule.height, rule.width), rows, columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def places(self) -> float:
        """How many tiles fit into the image's area, side by side: at least 1."""
        return self.size[0] * self.size[1] / (self.tile[0] * self.tile[1])

    def corner(self, index: int) -> tuple[int, int]:
        """(y, x) of tile ``index``."""
        return self.rows[index // len(self.columns)], self.columns[index % len(self.columns)]

    def cut(self, image: np.ndarray, first: int, count: int) -> np.ndarray:
        """Up to ``count`` tiles [n,C,H,W] of an image [C,h,w], from tile ``first`` on."""
        corners = map(self.corner, range(first, min(first + count, len(self))))
        height, width = self.tile
        return np.stack([image[:, y : y + height, x : x + width] for y, x in corners])


class Stitcher:
    """Maps of a plan's tiles, float32 [H,W] each, in the plan's order -> one of the image, float32 [h,w].

    Maps of a backbone's places, which are fewer than the tile's pixels, are interpolated linearly between the places'
    middles.

    Beside that it holds one band of H rows of the image, in float64.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._next = plan, 0
        self._down, self._across = (_tent(side) for side in plan.tile)
        self._weights = tuple(
            _summed(starts, tent, length)
            for starts, tent, length in zip(
                (plan.rows, plan.columns), (self._down, self._across), plan.size, strict=True
            )
        )
        self._band = np.zeros((plan.tile[0], plan.size[1]))
        self._top = 0
        self._map = np.empty(plan.size, np.float32)

    def add(self, tiles: np.ndarray) -> None:
        """The maps [n,H,W] of the next tiles, or coarser ones."""
        for tile in _enlarged(tiles, self._plan.tile):
            y, x = self._plan.corner(self._next)
            self._finish(y)
            self._band[:, x : x + self._plan.tile[1]] += tile * (self._down[:, None] * self._across)
            self._next += 1

    def whole(self) -> np.ndarray:
        """The stitched map, once every tile was added."""
        assert self._next == len(self._plan), f"{self._next} of {len(self._plan)} tiles were added"
        self._finish(self._plan.size[0])
        return self._map

    def _finish(self, y: int) -> None:
        """Rows above ``y`` get no more tiles: weigh them, and move the band down."""
        done = y - self._top
        if done == 0:
            return
        down, across = self._weights
        self._map[self._top : y] = self._band[:done] / (down[self._top : y, None] * across)
        self._band[:-done] = self._band[done:]
        self._band[-done:] = 0
        self._top = y


def check_size(rule: Preprocessing, height: int, width: int) -> None:
    """Raise InvalidInput for an image that is smaller than a tile: it is not padded nor enlarged, in no direction."""
    if height < rule.height or width < rule.width:
        raise InvalidInput(
            f"the image is {width}×{height}: at least {rule.width}×{rule.height} expected, the size of one tile; "
            "this model scores images at their own resolution"
        )


def _starts(length: int, tile: int, stride: int) -> tuple[int, ...]:
    """0, stride, 2 stride, …, and length − tile, where the last tile ends with the image."""
    return (*range(0, length - tile, stride), length - tile)


def _enlarged(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps [n,h,w] brought to [n,*size]; untouched where they are that large."""
    if maps.shape[1:] == size:
        return maps
    down, across = (_between(places, side) for places, side in zip(maps.shape[1:], size, strict=True))
    enlarged: np.ndarray = down @ maps.astype(np.float64) @ across.T
    return enlarged


def _between(places: int, side: int) -> np.ndarray:
    """Weights [side,places] of places spread evenly over ``side`` pixels, at each pixel's middle; rows sum to 1."""
    at = np.clip((np.arange(side) + 0.5) * places / side - 0.5, 0, places - 1)
    pixels, low = np.arange(side), np.floor(at).astype(int)
    weights = np.zeros((side, places))
    weights[pixels, low] = 1 - (at - low)
    weights[pixels, np.minimum(low + 1, places - 1)] += at - low
    return weights


def _tent(side: int) -> np.ndarray:
    """1, 2, …, 2, 1: whole numbers in float64 [side]."""
    return np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)).astype(np.float64)


def _summed(offsets: tuple[int, ...], tent: np.ndarray, length: int) -> np.ndarray:
    """Sum of the tents that begin at ``offsets``, float64 [length]."""
    total = np.zeros(length)
    for start in offsets:
        total[start : start + len(tent)] += tent
    return total
