"""Divide an image into tiles, and stitch the tiles' maps into one map of the image.

The value at a pixel is the weighted mean of the maps of the tiles that cover it. The weights are the whole numbers of a
tent that is highest in the tile's middle. Where one tile covers a pixel, its own number is kept bitwise: the product of
a float32 and a whole number below 2^23 is exact in float64, and so is its quotient by that number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one image, given by their upper left corners: every pair of ``rows`` and ``columns``, row by row.

    Args:
        size: height and width of the image, in pixels.
        tile: height and width of a tile, in pixels.
        rows: first pixel rows of the tiles, ascending.
        columns: first pixel columns of the tiles, ascending.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, rule: Preprocessing, height: int, width: int) -> TilePlan:
        """Plan the tiles of an image by the rule's stride. Raises InvalidInput for one that is smaller than a tile."""
        assert rule.tiling is not None
        check_size(rule, height, width)
        down, across = rule.tiling.stride
        rows, columns = _starts(height, rule.height, down), _starts(width, rule.width, across)
        return cls((height, width), (rule.height, rule.width), rows, columns)

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    @property
    def area_in_tiles(self) -> float:
        """Area of the image over that of a tile, at least 1: the count of tiles if they did not overlap."""
        return self.size[0] * self.size[1] / (self.tile[0] * self.tile[1])

    def corner(self, index: int) -> tuple[int, int]:
        """Return the upper left pixel (y, x) of tile ``index``."""
        return self.rows[index // len(self.columns)], self.columns[index % len(self.columns)]

    def cut(self, image: np.ndarray, first: int, count: int) -> np.ndarray:
        """Cut the tiles ``first`` to ``first + count - 1``, as far as there are, from an image [C,h,w]: [n,C,H,W]."""
        corners = map(self.corner, range(first, min(first + count, len(self))))
        height, width = self.tile
        return np.stack([image[:, y : y + height, x : x + width] for y, x in corners])


class Stitcher:
    """Stitches the maps of a plan's tiles, float32 [H,W] each, into one map of the image, float32 [h,w].

    A map of a backbone's features has fewer cells than the tile has pixels; it is interpolated linearly between the
    centres of its cells. Beside the result, one band of H rows of the image is held, in float64.
    """

    def __init__(self, plan: TilePlan) -> None:
        self._plan, self._n_added = plan, 0
        self._down, self._across = (_tent(side) for side in plan.tile)
        self._weights = tuple(
            _sum_of_tents(starts, tent, length)
            for starts, tent, length in zip(
                (plan.rows, plan.columns), (self._down, self._across), plan.size, strict=True
            )
        )
        self._band = np.zeros((plan.tile[0], plan.size[1]))
        self._top = 0
        self._map = np.empty(plan.size, np.float32)

    def add(self, tiles: np.ndarray) -> None:
        """Add the maps of the next tiles in the plan's order, [n,H,W] or coarser."""
        for tile in _enlarge(tiles, self._plan.tile):
            y, x = self._plan.corner(self._n_added)
            self._finish_rows(y)
            self._band[:, x : x + self._plan.tile[1]] += tile * (self._down[:, None] * self._across)
            self._n_added += 1

    def stitched(self) -> np.ndarray:
        """Return the map of the image, float32 [h,w], after every tile was added."""
        assert self._n_added == len(self._plan), f"{self._n_added} of {len(self._plan)} tiles were added"
        self._finish_rows(self._plan.size[0])
        return self._map

    def _finish_rows(self, y: int) -> None:
        """Write the rows above ``y``, to which no more tiles are added, into the map, and move the band down."""
        finished = y - self._top
        if finished == 0:
            return
        down, across = self._weights
        self._map[self._top : y] = self._band[:finished] / (down[self._top : y, None] * across)
        self._band[:-finished] = self._band[finished:]
        self._band[-finished:] = 0
        self._top = y


def check_size(rule: Preprocessing, height: int, width: int) -> None:
    """Raise InvalidInput for an image with a side shorter than a tile's: images are neither padded nor enlarged."""
    if height < rule.height or width < rule.width:
        raise InvalidInput(
            f"the image is {width}×{height}: at least {rule.width}×{rule.height} expected, the size of one tile; "
            "this model scores images at their own resolution"
        )


def _starts(length: int, tile: int, stride: int) -> tuple[int, ...]:
    """Return the first pixels of the tiles along one axis: 0, stride, 2 stride, …, and at last length − tile."""
    return (*range(0, length - tile, stride), length - tile)


def _enlarge(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Interpolate maps [n,h,w] linearly to [n,*size], float64; maps of that size are returned as they are."""
    if maps.shape[1:] == size:
        return maps
    down, across = (_linear_weights(cells, side) for cells, side in zip(maps.shape[1:], size, strict=True))
    enlarged: np.ndarray = down @ maps.astype(np.float64) @ across.T
    return enlarged


def _linear_weights(cells: int, side: int) -> np.ndarray:
    """Return the weights of linear interpolation from cell centres to pixel centres, [side,cells]; rows sum to 1.

    The cells are spread evenly over ``side`` pixels; beyond the first and the last centre the value is constant.
    """
    positions = np.clip((np.arange(side) + 0.5) * cells / side - 0.5, 0, cells - 1)
    pixels, low = np.arange(side), np.floor(positions).astype(int)
    weights = np.zeros((side, cells))
    weights[pixels, low] = 1 - (positions - low)
    weights[pixels, np.minimum(low + 1, cells - 1)] += positions - low
    return weights


def _tent(side: int) -> np.ndarray:
    """Return the weights 1, 2, …, 2, 1 of a tile's pixels along one axis: whole numbers in float64 [side]."""
    return np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)).astype(np.float64)


def _sum_of_tents(starts: tuple[int, ...], tent: np.ndarray, length: int) -> np.ndarray:
    """Sum tents that begin at the pixels ``starts``, float64 [length]."""
    total = np.zeros(length)
    for start in starts:
        total[start : start + len(tent)] += tent
    return total
