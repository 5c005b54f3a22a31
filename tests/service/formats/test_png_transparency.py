"""Chunk tRNS of every colour type and bit depth: the pixels are those that the PNG specification describes."""

from __future__ import annotations

import contextlib
import itertools
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput
from service.formats.images import ImageLimits, decode_image, decode_whole_image
from tests.hostile import END, chunk, png

CASES = Path(__file__).parent / "cases"
LIMITS = ImageLimits(2**20, 2**20)
BACKGROUND = 99
H, W = 9, 14
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
KINDS = [
    *itertools.product([1, 2, 4, 8, 16], [GREY]),
    *itertools.product([8, 16], [RGB]),
    *itertools.product([1, 2, 4, 8], [PALETTE]),
]


def rule(mode: str = "RGB", **options) -> Preprocessing:
    return Preprocessing(mode=mode, height=H, width=W, background=BACKGROUND, **options)


def file_of(levels: np.ndarray, depth: int, colour: int, *chunks: bytes) -> bytes:
    """A PNG of whole numbers [H,W,C], without filters."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, 0))
    bits = (levels.reshape(H, -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(H, -1).astype(np.uint8), axis=1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    return png(header, *chunks, chunk(b"IDAT", zlib.compress(data)), END)


def noise(depth: int, colour: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 2**depth, (H, W, CHANNELS[colour]))


def to_8_bits(levels: np.ndarray, depth: int, colour: int) -> np.ndarray:
    """As this project reads levels: 16-bit grey is rounded, of 16-bit colour the upper byte is kept."""
    if depth == 16:
        return np.rint(levels / 257).astype(np.uint8) if colour == GREY else (levels >> 8).astype(np.uint8)
    return (levels * (255 // (2**depth - 1))).astype(np.uint8)


def planes(pixels: np.ndarray) -> np.ndarray:
    return np.broadcast_to(pixels, (H, W, 3)).transpose(2, 0, 1)


def transparent(levels: Iterable[int]) -> bytes:
    return chunk(b"tRNS", b"".join(struct.pack(">H", int(level)) for level in levels))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("depth", "colour"), [kind for kind in KINDS if kind[1] != PALETTE])
def test_a_transparent_colour_is_compared_in_the_files_own_depth(depth, colour, seed):
    levels = noise(depth, colour, seed)
    chosen = levels[4, 5]
    got = decode_image(file_of(levels, depth, colour, transparent(chosen)), rule(), LIMITS)
    expected = np.where((levels == chosen).all(2, keepdims=True), BACKGROUND, to_8_bits(levels, depth, colour))
    np.testing.assert_array_equal(got, planes(expected))
    assert (got[:, 4, 5] == BACKGROUND).all()


@pytest.mark.parametrize(("depth", "colour"), [(16, GREY), (16, RGB), (8, RGB), (4, GREY), (2, GREY)])
def test_a_colour_that_occurs_nowhere_makes_nothing_transparent(depth, colour):
    """Not even a pixel that agrees with it in the upper bytes, the lower bytes, or once it is scaled."""
    levels = np.minimum(noise(depth, colour), 2**depth - 2)
    if depth == 16:
        levels[0], levels[1], levels[2] = 0xC8FF, 0x00C7, 0xC8C8
    chosen = [0xC8] * CHANNELS[colour] if depth == 16 else [2**depth - 1] * CHANNELS[colour]
    got = decode_image(file_of(levels, depth, colour, transparent(chosen)), rule(), LIMITS)
    np.testing.assert_array_equal(got, planes(to_8_bits(levels, depth, colour)))


def test_one_channel_of_16_bits_that_differs_is_enough():
    levels = np.full((H, W, 3), 0x1234)
    for channel in range(3):
        levels[channel, :, channel] += 1
        levels[channel + 3, :, channel] += 256
    got = decode_image(file_of(levels, 16, RGB, transparent([0x1234] * 3)), rule(), LIMITS)
    assert (got[:, 6:] == BACKGROUND).all()
    np.testing.assert_array_equal(got[:, :6], planes(levels >> 8)[:, :6])


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_bits_above_the_depth_do_not_count(depth):
    levels = noise(depth, GREY)
    spoiled = [int(levels[4, 5, 0]) | (0xFF00 if depth == 8 else 0xFF << depth)]
    got = decode_image(file_of(levels, depth, GREY, transparent(spoiled)), rule(), LIMITS)
    expected = np.where(levels == levels[4, 5], BACKGROUND, to_8_bits(levels, depth, GREY))
    np.testing.assert_array_equal(got, planes(expected))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alpha", [b"", b"\0", b"\xff", b"\xff\0", b"\x80\x40", b"\xff\0\n", b"\0\xff\0\x80", b"\n"])
def test_each_entry_of_a_palette_has_its_own_alpha(depth, alpha):
    """Entries without an alpha are opaque. (10, a line break's code, is an alpha like any other.)"""
    size = min(2**depth, 9)
    levels = np.random.RandomState(depth).randint(0, size, (H, W, 1))
    colours = np.random.RandomState(1).randint(0, 256, (size, 3), np.uint8)
    alphas = np.frombuffer((alpha + b"\xff" * size)[:size], np.uint8)[:, None] / 255
    chunks = chunk(b"PLTE", colours.tobytes()), chunk(b"tRNS", alpha[:size])
    got = decode_image(file_of(levels, depth, PALETTE, *chunks), rule(), LIMITS)
    mixed = alphas * colours + (1 - alphas) * BACKGROUND
    np.testing.assert_allclose(got, planes(mixed[levels[..., 0]]), atol=1)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colour", [GREY_ALPHA, RGB_ALPHA])
def test_alpha_channels_are_mixed_in_every_depth(depth, colour, mode):
    levels = noise(depth, colour)
    levels[0, :, -1], levels[1, :, -1] = 0, 2**depth - 1
    got = decode_image(file_of(levels, depth, colour), rule(mode), LIMITS).astype(float)
    unit = levels / (2**depth - 1)
    mixed = unit[..., -1:] * unit[..., :-1] * 255 + (1 - unit[..., -1:]) * BACKGROUND
    if mode == "L":
        mixed = mixed @ [0.299, 0.587, 0.114] if colour == RGB_ALPHA else mixed[..., 0]
        np.testing.assert_allclose(got[0], mixed, atol=2)
    else:
        np.testing.assert_allclose(got, planes(mixed), atol=2)
    assert (got[:, 0] == BACKGROUND).all()


@pytest.mark.parametrize("interlaced", [False, True])
def test_it_is_the_same_in_a_turned_or_interlaced_file_and_in_its_own_size(interlaced):
    levels = noise(16, RGB)
    chosen = levels[4, 5]
    orientation = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0")  # 3: upside down
    data = file_of(levels, 16, RGB, transparent(chosen), orientation)
    if interlaced:
        data = interlace(data, levels)
    expected = planes(np.where((levels == chosen).all(2, keepdims=True), BACKGROUND, levels >> 8))[:, ::-1, ::-1]
    np.testing.assert_array_equal(decode_image(data, rule(), LIMITS), expected)
    np.testing.assert_array_equal(decode_whole_image(data, rule(), LIMITS), expected)


def interlace(data: bytes, levels: np.ndarray) -> bytes:
    """The same 16-bit RGB picture, Adam7."""
    steps = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = [levels[y::dy, x::dx].astype(">u2") for x, y, dx, dy in steps]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 16, RGB, 0, 0, 1))
    return data[:8] + header + data[33 : data.index(b"IDAT") - 4] + chunk(b"IDAT", zlib.compress(rows)) + END


@pytest.mark.parametrize("text", [b"transparency\0abc", b"transparency\0"])
@pytest.mark.parametrize(("depth", "colour"), [*KINDS, (8, GREY_ALPHA), (16, RGB_ALPHA)])
def test_a_text_called_transparency_makes_nothing_transparent(depth, colour, text):
    levels = noise(depth, colour)
    palette = [chunk(b"PLTE", bytes(range(3 * min(2**depth, 85))) * 2)] if colour == PALETTE else []
    if colour == PALETTE:
        levels = np.minimum(levels, 84)
    plain = file_of(levels, depth, colour, *palette)
    spoiled = file_of(levels, depth, colour, *palette, chunk(b"tEXt", text))
    np.testing.assert_array_equal(decode_image(spoiled, rule(), LIMITS), decode_image(plain, rule(), LIMITS))
    short = spoiled[: -len(END)] + chunk(b"tRNS", b"\1") + END  # behind the pixels, where none may stand
    with contextlib.suppress(InvalidInput):
        decode_image(short, rule(), LIMITS)


@pytest.mark.parametrize("name", ["grey2bit_trns", "rgb16_trns_absent_colour"])
def test_files_that_were_read_wrongly(name):
    shape = Preprocessing(mode="L", height=28, width=28, background=0)
    got = decode_image((CASES / f"{name}.png").read_bytes(), shape, LIMITS)
    assert got.tobytes() == (CASES / f"{name}_expected.bin").read_bytes()
