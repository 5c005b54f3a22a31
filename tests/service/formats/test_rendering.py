"""Pictures out: the pixels come back as they went in, the layout is the documented one, the bytes never change."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from service.formats.rendering import (
    FRAME_MILLISECONDS,
    GRID_GAP,
    INFERNO,
    OPACITY,
    encode_gif,
    encode_heat_maps,
    encode_overlays,
    encode_png,
    encode_webp,
    grid,
    to_levels,
)

RNG = np.random.RandomState(3)


def levels(n: int, channels: int = 1, height: int = 5, width: int = 7) -> np.ndarray:
    return RNG.randint(0, 256, (n, channels, height, width), dtype=np.uint8)


def unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def frames_of(data: bytes, mode: str) -> list[np.ndarray]:
    picture, frames = opened(data), []
    for index in range(picture.n_frames):
        picture.seek(index)
        frames.append(np.asarray(picture.convert(mode)))
    return frames


def test_levels_are_the_inverse_of_what_goes_in():
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(to_levels(unit(every)), every.transpose(0, 2, 3, 1))


def test_levels_round_to_the_nearest_and_stay_within_8_bits():
    x = np.float32([-3, -0.001, 0.49 / 255, 0.51 / 255, 254.51 / 255, 1.001, 9]).reshape(1, 1, 1, 7)
    np.testing.assert_array_equal(to_levels(x).ravel(), [0, 0, 0, 1, 255, 255, 255])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_one_image_is_a_png_of_its_own_size_and_pixels(channels, mode):
    pixels = levels(1, channels)
    picture = opened(encode_png(unit(pixels)))
    assert (picture.format, picture.mode, picture.size) == ("PNG", mode, (7, 5))
    np.testing.assert_array_equal(np.asarray(picture).reshape(5, 7, channels), pixels[0].transpose(1, 2, 0))


@pytest.mark.parametrize(("n", "rows", "columns"), [(2, 1, 2), (3, 2, 2), (4, 2, 2), (5, 2, 3), (7, 3, 3), (10, 3, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_is_filled_row_by_row(n, rows, columns, channels):
    pixels = levels(n, channels)
    sheet = np.asarray(opened(encode_png(unit(pixels))))
    sheet = sheet.reshape(*sheet.shape[:2], channels)
    assert sheet.shape == (rows * 5 + (rows - 1) * GRID_GAP, columns * 7 + (columns - 1) * GRID_GAP, channels)
    rest = sheet.copy()
    for index in range(n):
        y, x = index // columns * (5 + GRID_GAP), index % columns * (7 + GRID_GAP)
        np.testing.assert_array_equal(sheet[y : y + 5, x : x + 7], pixels[index].transpose(1, 2, 0))
        rest[y : y + 5, x : x + 7] = 0
    assert not rest.any(), "gaps and empty cells are black"


def test_a_grid_of_one_has_no_gap():
    pixels = levels(1)[:, 0, :, :, None]
    assert grid(pixels).shape == (5, 7, 1)


def test_a_grey_gif_keeps_every_level_and_every_frame():
    pixels = np.concatenate([np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), levels(5, 1, 16, 16)])
    data = encode_gif(unit(pixels))
    frames = frames_of(data, "L")
    assert len(frames) == 6
    np.testing.assert_array_equal(np.stack(frames), pixels[:, 0])
    assert opened(data).info["duration"] == FRAME_MILLISECONDS
    assert opened(data).info["loop"] == 0


def test_equal_neighbours_are_one_frame_shown_longer():
    first, last = unit(levels(1)), unit(levels(1))
    data = encode_gif(np.concatenate([first, first, last]))
    assert [opened(data).info["duration"], opened(data).n_frames] == [2 * FRAME_MILLISECONDS, 2]


def test_a_colour_gif_is_near_in_256_colours():
    ramp = np.linspace(0, 1, 16, dtype=np.float32)
    image = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.float32(0.5)))
    frames = frames_of(encode_gif(np.stack([image, 1 - image])), "RGB")
    assert len(frames) == 2
    np.testing.assert_allclose(frames[0], image.transpose(1, 2, 0) * 255, atol=32)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_an_animated_webp_is_lossless(channels, mode):
    pixels = levels(4, channels)
    data = encode_webp(unit(pixels))
    frames = np.stack(frames_of(data, mode)).reshape(4, 5, 7, channels)
    np.testing.assert_array_equal(frames, pixels.transpose(0, 2, 3, 1))
    assert opened(data).info["loop"] == 0


@pytest.mark.parametrize("encode", [encode_png, encode_gif, encode_webp])
@pytest.mark.parametrize("n", [1, 3])
def test_the_same_images_give_the_same_bytes(encode, n):
    x = unit(levels(n, 3))
    assert encode(x) == encode(x.copy())
    assert encode(x) == encode(np.asfortranarray(x)), "whatever their layout in memory"


def lightness(colours: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB levels [...,3]; IEC 61966-2-1 and CIE 15."""
    s = colours / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > (6 / 29) ** 3, 116 * np.cbrt(y) - 16, y * (29 / 3) ** 3)


def test_heat_grows_lighter_with_every_step():
    ramp = np.arange(256, dtype=np.float32).reshape(1, 1, 256)
    colours = np.asarray(opened(encode_heat_maps(ramp, None)))[0]
    light = lightness(colours.astype(np.float64))
    assert (np.diff(light) > 0).mean() > 0.95
    assert np.diff(light).min() > -0.25, "rounding to 8 bits only"
    assert np.diff(light).max() < 2, "no step stands out"
    np.testing.assert_array_equal(colours[[0, -1]], INFERNO[[0, -1]])


def test_heat_maps_share_one_scale_and_carry_it():
    maps = np.zeros((2, 3, 4), np.float32)
    maps[0, 1, 2], maps[1, 0, 0] = 12.5, -2.5
    picture = opened(encode_heat_maps(maps, None))
    assert (float(picture.text["minimum"]), float(picture.text["maximum"])) == (-2.5, 12.5)
    sheet = np.asarray(picture)
    assert sheet.shape == (3, 4 + GRID_GAP + 4, 3)
    np.testing.assert_array_equal(sheet[1, 2], INFERNO[-1])
    np.testing.assert_array_equal(sheet[0, 4 + GRID_GAP], INFERNO[0])
    assert (sheet[0, 0] == sheet[2, 4 + GRID_GAP + 3]).all(), "equal values, equal colours, in every map"


def test_a_flat_heat_map_is_one_colour():
    sheet = np.asarray(opened(encode_heat_maps(np.full((1, 3, 4), 7.0, np.float32), None)))
    np.testing.assert_array_equal(sheet, np.broadcast_to(INFERNO[0], (3, 4, 3)))


def test_a_given_range_fixes_the_colours_whatever_else_is_shown():
    maps = np.float32([[[-9, 1, 3, 5, 900]]])
    value_range = (1.0, 5.0)
    sheet = np.asarray(opened(encode_heat_maps(maps, value_range)))[0]
    np.testing.assert_array_equal(sheet[[0, 1]], INFERNO[[0, 0]], "what lies below has the first colour")
    np.testing.assert_array_equal(sheet[[3, 4]], INFERNO[[-1, -1]], "what lies above has the last")
    np.testing.assert_allclose(sheet[2], INFERNO[16], atol=2)
    for x in range(5):
        alone = opened(encode_heat_maps(maps[:, :, x : x + 1], value_range, {"kind": "anomaly"}))
        np.testing.assert_array_equal(np.asarray(alone)[0, 0], sheet[x])
        assert alone.text == {"minimum": "1.0", "maximum": "5.0", "kind": "anomaly"}


def test_infinite_places_have_the_last_colour_and_leave_the_scale_to_the_others():
    picture = opened(encode_heat_maps(np.float32([[[0, 2, np.inf]]]), None))
    assert picture.text == {"minimum": "0.0", "maximum": "2.0"}
    np.testing.assert_array_equal(np.asarray(picture)[0, 2], INFERNO[-1])
    assert opened(encode_heat_maps(np.full((1, 2, 2), np.inf, np.float32), None)).size == (2, 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("as_levels", [True, False])
def test_an_overlay_is_the_image_where_quiet_and_heat_where_loud(channels, as_levels):
    pixels = levels(2, channels)
    maps = np.zeros((2, 5, 7), np.float32)
    maps[0, 1, 2], maps[1, 3, 4] = 8, 4
    sheet = np.asarray(opened(encode_overlays(pixels if as_levels else unit(pixels), maps, (0.0, 8.0)))).astype(float)
    shown = [sheet[:5, :7], sheet[:5, 7 + GRID_GAP :]]
    for image, values, heat in zip(pixels, maps, shown, strict=True):
        rgb = np.broadcast_to(image.transpose(1, 2, 0), (5, 7, 3)).astype(float)
        np.testing.assert_array_equal(heat[values == 0], rgb[values == 0])
    loud = (1 - OPACITY) * pixels[0][:, 1, 2] + OPACITY * INFERNO[-1]
    np.testing.assert_allclose(shown[0][1, 2], loud, atol=0.51)
    middle = (1 - OPACITY / 2) * pixels[1][:, 3, 4] + OPACITY / 2 * INFERNO[16]
    np.testing.assert_allclose(shown[1][3, 4], middle, atol=2)


def test_a_map_of_features_is_enlarged_to_its_image():
    image, features = np.zeros((1, 1, 8, 12), np.float32), np.float32([[0, 0, 9], [0, 0, 0]])
    sheet = np.asarray(opened(encode_overlays(image, features[None], (0.0, 9.0))))
    assert sheet.shape == (8, 12, 3)
    light = sheet.sum(axis=-1)
    assert np.unravel_index(light.argmax(), light.shape)[0] < 4
    assert np.unravel_index(light.argmax(), light.shape)[1] >= 8


def test_the_colours_are_those_of_matplotlib():
    """Values of matplotlib.colormaps["inferno"](level), in 8 bits: none of them is an anchor but the ends."""
    expected = {
        0: (0, 0, 4),
        1: (1, 0, 5),
        5: (2, 2, 12),
        26: (24, 12, 60),
        51: (66, 10, 104),
        102: (147, 38, 103),
        153: (221, 81, 58),
        204: (252, 165, 10),
        250: (245, 249, 146),
        255: (252, 255, 164),
    }
    ramp = np.arange(256, dtype=np.float32).reshape(1, 1, 256)
    colours = np.asarray(opened(encode_heat_maps(ramp, None)))[0].astype(int)
    assert max(np.abs(colours[level] - colour).max() for level, colour in expected.items()) <= 2
