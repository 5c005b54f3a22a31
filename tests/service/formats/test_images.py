"""Hostile, odd and damaged pictures: pixels or our own error, in bounded memory. (The rule itself: test_image_rule.)"""

from __future__ import annotations

import re
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service import pixels
from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput, PayloadTooLarge
from service.formats.images import BAND, ImageLimits, _planes, apply, decode_image, resize_array
from service.pixels import unit_levels
from tests import hostile
from tests.hostile import chunk, header, png, saved

LIMITS = ImageLimits(max_bytes=2**24, max_pixels=2**20)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
FITS = ["cover", "contain", "stretch"]
FILTERS = ["bilinear", "bicubic", "lanczos", "box"]


def rule(mode: Any = "L", height: int = 16, width: int = 16, **options: Any) -> Preprocessing:
    return Preprocessing(mode=mode, height=height, width=width, **options)


def decoded(image: Image.Image, preprocessing: Preprocessing, form: str = "PNG", **options: Any) -> np.ndarray:
    return decode_image(saved(image, form, **options), preprocessing, LIMITS)


def test_16_bit_grey_in_wider_modes_is_rounded_alike():
    levels = np.array([[0, 128, 129, 65407, 65535]], np.int32)
    for image in (Image.fromarray(levels), Image.fromarray(levels.astype(np.float32))):
        assert apply(image, rule(height=1, width=5))[0].tolist() == [[0, 0, 1, 255, 255]]
    assert apply(Image.fromarray(np.array([[-5, 70_000]], np.int32)), rule(height=1, width=2))[0].tolist() == [[0, 255]]


def test_half_transparent_pixels_are_mixed():
    image = Image.new("RGBA", (1, 1), (200, 100, 50, 128))
    mixed = np.array([200, 100, 50]) * 128 / 255 + 60 * 127 / 255
    assert np.abs(decoded(image, rule("RGB", 1, 1, background=60))[:, 0, 0] - mixed).max() <= 1


def test_each_filter_is_the_one_asked_for():
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40), dtype=np.uint8))
    assert len({decoded(noise, rule(resample=name)).tobytes() for name in FILTERS}) == 4
    means = np.asarray(noise, float).reshape(20, 2, 20, 2).mean((1, 3))
    assert np.abs(decoded(noise, rule(height=20, width=20, resample="box"))[0] - means).max() <= 1


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 77), (4096, 16)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_any_size_becomes_the_target(fit, size, mode):
    """Thin pictures too: contain must not shrink a side to nothing."""
    preprocessing = rule(mode, 28, 20, fit=fit, background=50)
    pixels = decoded(Image.new("L", size, 50), preprocessing)
    assert pixels.shape == preprocessing.shape
    assert (pixels == 50).all()
    fractions = np.full((2, preprocessing.channels, size[1], size[0]), 0.3, np.float32)
    assert resize_array(fractions, preprocessing).shape == (2, *preprocessing.shape)


def test_lanczos_overshoots_but_stays_in_range():
    x = np.full((1, 1, 32, 32), 0.001, np.float32)
    x[..., 16:] = 0.999
    y = resize_array(x, rule(height=11, width=11, resample="lanczos"))
    assert y.min() == 0
    assert y.max() == 1


@pytest.mark.parametrize(
    "exif", [b"", b"nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_broken_exif_leaves_the_picture_as_it_is(exif, form):
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(decoded(Image.fromarray(RAMP), rule(), form, exif=exif, **options)[0], RAMP)


@pytest.mark.parametrize("size", [(5000, 5000), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_pixels_are_counted_before_they_are_decoded(size):
    """Also beyond Pillow's own bomb limits, whatever the filters of warnings are."""
    data = png(header(*size, depth=1), chunk(b"IDAT", zlib.compress(bytes(1000))), hostile.END)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracemalloc.start()
        with pytest.raises(PayloadTooLarge):
            decode_image(data, rule(), LIMITS)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20


HOSTILE = [
    *hostile.png_headers(),
    *hostile.png_bombs(),
    *hostile.png_damage((1, 8, 8)),
    *hostile.other_pictures((3, 8, 8)),
]


@pytest.mark.parametrize(("name", "kind", "body"), HOSTILE, ids=[name for name, _, _ in HOSTILE])
def test_hostile_pictures_are_refused_in_little_memory(name, kind, body):
    tracemalloc.start()
    with pytest.raises(InvalidInput):
        decode_image(body, rule(), LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20 + 4 * len(body)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12)])
@pytest.mark.parametrize("fit", FITS)
def test_odd_pictures_are_read(shape, fit):
    preprocessing = rule("L" if shape[0] == 1 else "RGB", *shape[1:], fit=fit)
    for name, _, body in hostile.odd_pictures(shape):
        pixels = decode_image(body, preprocessing, LIMITS)
        assert pixels.shape == shape, name
        assert pixels.dtype == np.uint8, name


SEEDS = [body for _, _, body in hostile.odd_pictures((3, 8, 8)) if len(body) < 20_000]
ANY_RULE = st.builds(
    rule,
    st.sampled_from(["L", "RGB"]),
    st.integers(1, 40),
    st.integers(1, 40),
    fit=st.sampled_from(FITS),
    resample=st.sampled_from(FILTERS),
)


def mended(data: bytes) -> bytes:
    """A damaged PNG with right checksums, so that the damage reaches the decoder."""
    if not data.startswith(hostile.SIGNATURE):
        return data
    repaired, position = data[:8], 8
    while position + 12 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        repaired += chunk(data[position + 4 : position + 8], data[position + 8 : position + 8 + size])
        position += 12 + size
    return repaired


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 6))):
        position = draw(st.integers(0, len(data)))
        data[position : position + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return mended(bytes(data)) if draw(st.booleans()) else bytes(data)


@settings(max_examples=500, deadline=None)
@given(damaged(), ANY_RULE)
def test_damaged_pictures_give_pixels_or_our_error(data, preprocessing):
    try:
        pixels = decode_image(data, preprocessing, LIMITS)
    except InvalidInput:
        return
    assert pixels.shape == preprocessing.shape
    assert pixels.dtype == np.uint8


HEADS = [b"", hostile.SIGNATURE, b"\xff\xd8", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"RIFF\0\0\0\0WEBP"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(HEADS), st.binary())
def test_any_bytes_are_refused(head, tail):
    with pytest.raises(InvalidInput):
        decode_image(head + tail, rule(), LIMITS)


def test_levels_become_the_nearest_float32_of_k_255_in_every_dtype():
    every = np.arange(256)
    expected = (every / 255).astype(np.float32)  # float64's quotient, rounded once more
    for dtype in (np.uint8, np.int64, np.float64):
        unit = unit_levels(every.astype(dtype))
        assert unit.dtype == np.float32
        assert np.array_equal(unit, expected)


def test_only_one_place_of_the_service_divides_by_255():
    module = Path(pixels.__file__)
    divided = re.compile(r"/=? (np\.float32\()?255|/= LEVELS")
    dividing = [path.name for path in module.parent.rglob("*.py") if divided.search(path.read_text())]
    assert dividing == ["pixels.py"]
    assert len(re.findall(r"/= LEVELS", module.read_text())) == 1


@pytest.mark.parametrize("shape", [(700, 901), (2, BAND), (3, BAND + 1), (1000, 777, 3), (1, 1), (5, 3, 3)])
def test_pixels_are_the_same_in_bands(shape):
    pixels = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    planes = _planes(Image.fromarray(pixels))
    assert np.array_equal(planes, np.atleast_3d(pixels).transpose(2, 0, 1))
    assert planes.flags.c_contiguous
    assert planes.flags.writeable


@pytest.mark.parametrize("shape", [(4000, 1500), (2000, 1000, 3)])
def test_a_large_image_is_copied_once(shape):
    """Beside the array that it becomes no more than a few bands are held."""
    image = Image.fromarray(np.zeros(shape, np.uint8))
    tracemalloc.start()
    planes = _planes(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < planes.nbytes + 10 * BAND
