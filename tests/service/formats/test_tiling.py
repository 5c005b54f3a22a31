"""Tiles: they cover every image, and their maps come together without seams or arithmetic of their own."""

import numpy as np
import pytest

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput
from service.formats.tiling import Stitcher, TilePlan


def rule(tile=(4, 4), stride=(2, 2)):
    return Preprocessing(mode="L", height=tile[0], width=tile[1], tiling={"stride": stride})


def stitched(plan, maps):
    stitcher = Stitcher(plan)
    for part in np.array_split(maps, 3):
        stitcher.add(part)
    return stitcher.stitched()


SIZES = [(4, 4), (4, 5), (5, 4), (7, 9), (8, 8), (13, 31), (4, 40)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tile", "stride"), [((4, 4), (2, 2)), ((4, 4), (4, 4)), ((4, 4), (1, 3)), ((3, 4), (2, 1))])
def test_tiles_cover_the_image_and_none_leaves_it(size, tile, stride):
    plan = TilePlan.of(rule(tile, stride), *size)
    seen = np.zeros(size, int)
    corners = [plan.corner(index) for index in range(len(plan))]
    for y, x in corners:
        assert 0 <= y <= size[0] - tile[0]
        assert 0 <= x <= size[1] - tile[1]
        seen[y : y + tile[0], x : x + tile[1]] += 1
    assert seen.min() >= 1
    assert len(set(corners)) == len(corners)
    assert np.diff(plan.rows).max(initial=0) <= stride[0]
    assert np.diff(plan.columns).max(initial=0) <= stride[1]


def test_the_last_tile_ends_with_the_image():
    plan = TilePlan.of(rule(), 9, 4)
    assert plan.rows == (0, 2, 4, 5)
    assert plan.columns == (0,)
    assert plan.area_in_tiles == 9 / 4


@pytest.mark.parametrize("size", [(3, 100), (100, 3), (1, 1)])
def test_an_image_smaller_than_a_tile_is_refused_and_both_sizes_are_said(size):
    with pytest.raises(InvalidInput, match=rf"{size[1]}×{size[0]}.*4×4"):
        TilePlan.of(rule(), *size)


@pytest.mark.parametrize("stride", [(0, 1), (5, 1), (1, 5)])
def test_a_stride_that_leaves_gaps_is_no_contract(stride):
    with pytest.raises(ValueError, match="stride"):
        rule(stride=stride)


def test_cut_gives_the_pixels_at_the_corners():
    image = np.arange(2 * 9 * 7).reshape(2, 9, 7)
    plan = TilePlan.of(rule(), 9, 7)
    for index, tile in enumerate(plan.cut(image, 3, 100), 3):
        y, x = plan.corner(index)
        assert np.array_equal(tile, image[:, y : y + 4, x : x + 4])
    assert len(plan.cut(image, 3, 2)) == 2


def test_without_overlap_the_map_is_the_tiles_own_bitwise():
    plan = TilePlan.of(rule(stride=(4, 4)), 12, 8)
    maps = np.random.RandomState(0).standard_normal((6, 4, 4)).astype(np.float32)
    stitched_map = stitched(plan, maps)
    assert stitched_map.dtype == np.float32
    for index in range(6):
        y, x = plan.corner(index)
        assert np.array_equal(stitched_map[y : y + 4, x : x + 4], maps[index])


@pytest.mark.parametrize("size", SIZES)
def test_maps_that_agree_are_stitched_without_a_seam(size):
    field = np.random.RandomState(1).standard_normal(size).astype(np.float32)
    plan = TilePlan.of(rule(stride=(1, 3)), *size)
    tiles = plan.cut(field[None], 0, len(plan))[:, 0]
    np.testing.assert_array_equal(stitched(plan, tiles), field)


def test_where_tiles_overlap_a_pixel_is_their_mean_weighted_by_the_tent():
    plan = TilePlan.of(rule(tile=(4, 4), stride=(4, 2)), 4, 6)
    stitched_map = stitched(plan, np.stack([np.zeros((4, 4)), np.ones((4, 4))]).astype(np.float32))
    np.testing.assert_allclose(stitched_map[1], [0, 0, 1 / 3, 2 / 3, 1, 1], rtol=1e-6)


@pytest.mark.parametrize(("tile", "cells"), [((4, 4), (2, 2)), ((6, 9), (3, 2)), ((4, 4), (1, 1)), ((5, 4), (8, 3))])
def test_the_cells_of_a_feature_map_are_interpolated_between_their_centres(tile, cells):
    plan = TilePlan.of(rule(tile, tile), *tile)
    features = np.random.RandomState(2).standard_normal((1, *cells)).astype(np.float32)
    pixels = [(np.arange(side) + 0.5) / side for side in tile]
    centres = [(np.arange(n) + 0.5) / n for n in cells]
    rows = np.stack([np.interp(pixels[1], centres[1], row) for row in features[0]])
    expected = np.stack([np.interp(pixels[0], centres[0], column) for column in rows.T]).T
    np.testing.assert_allclose(stitched(plan, features), expected, atol=1e-6)


def test_a_map_is_not_given_before_its_last_tile():
    stitcher = Stitcher(TilePlan.of(rule(), 8, 8))
    stitcher.add(np.zeros((3, 4, 4), np.float32))
    with pytest.raises(AssertionError, match="3 of 9"):
        stitcher.stitched()
