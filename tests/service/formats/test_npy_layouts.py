"""Arrays as people save them: one image is one row whatever its layout, and what is no image is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from service.bundle.input_rules import Preprocessing
from service.errors import InvalidInput
from service.formats.codecs import Limits, Reader
from service.formats.images import ImageLimits
from service.formats.whole_images import WholeImageReader
from tests.hostile import JSON, NPY, document, npy

CASES = Path(__file__).parent / "cases"
LIMITS = Limits(1024, ImageLimits(2**24, 2**24), 2**27, 2**26)
GREY, COLOUR = Preprocessing(mode="L", height=28, width=28), Preprocessing(mode="RGB", height=28, width=28)


def read(rule: Preprocessing, array: np.ndarray) -> np.ndarray:
    return Reader(rule, LIMITS).read(NPY, npy(array), dict)


def as_json(rule: Preprocessing, array: np.ndarray) -> np.ndarray:
    content = {"images": array.tolist(), "dtype": "uint8"}
    return Reader(rule, LIMITS).read(JSON, document(content), lambda: content)


def test_an_array_that_gave_28_verdicts_is_one_image():
    pixels = Reader(GREY, LIMITS).read_levels(NPY, (CASES / "hw1_28x28x1.npy").read_bytes(), dict)
    assert pixels.shape == (1, 1, 28, 28)
    assert pixels.tobytes() == (CASES / "hw1_expected.bin").read_bytes()


@pytest.mark.parametrize("size", [(28, 28), (64, 48), (5, 3)])
@pytest.mark.parametrize("rule", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_every_layout_of_an_image_gives_its_pixels(rule, size, dtype):
    image = np.random.RandomState(0).randint(0, 256, (1, rule.channels, *size))
    image = image.astype(np.uint8) if dtype == np.uint8 else (image / 256).astype(dtype)
    expected = read(rule, image)
    assert expected.shape == (1, *rule.shape)
    channels_last = image.transpose(0, 2, 3, 1)
    layouts = [image[0], channels_last, channels_last[0]]
    layouts += [image[0, 0]] if rule.channels == 1 else []
    for array in layouts:
        assert np.array_equal(read(rule, array), expected), array.shape
        assert np.array_equal(read(rule, np.asfortranarray(array)), expected), array.shape
    if dtype == np.uint8:
        for array in layouts:
            assert np.array_equal(as_json(rule, array), expected), array.shape


@pytest.mark.parametrize("count", [2, 3, 4, 28])
def test_a_batch_of_grey_images_keeps_its_count(count):
    images = np.random.RandomState(0).randint(0, 256, (count, 28, 28), np.uint8)
    for array in (images, images[:, None], images[..., None]):
        assert np.array_equal(read(GREY, array)[:, 0], images / np.float32(255)), array.shape


@pytest.mark.parametrize("shape", [(64, 64, 3), (3, 64, 64), (28, 28, 3), (10, 784), (784,), (28, 784), (10, 784, 1)])
def test_what_is_no_grey_image_is_refused(shape):
    for reader in (read, as_json) if shape[0] != 3 else (read,):
        with pytest.raises(InvalidInput, match=r"images have shape .*\(N, 1, H, W\).* expected; "):
            reader(GREY, np.zeros(shape, np.uint8))


def test_a_json_list_of_three_is_three_images():
    """An npy file may hold one image in colour, but "images" is a list of images."""
    images = np.random.RandomState(0).randint(0, 256, (3, 64, 48), np.uint8)
    assert np.array_equal(as_json(GREY, images), read(GREY, images[:, None]))


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 1), (64, 64, 4), (4, 64, 64), (2352,), (10, 2352)])
def test_what_is_no_colour_image_is_refused(shape):
    with pytest.raises(InvalidInput, match=r"images have shape .*\(N, 3, H, W\).* expected; "):
        read(COLOUR, np.zeros(shape, np.uint8))


def test_a_model_of_tiles_takes_the_same_layouts():
    rule = Preprocessing(mode="L", height=8, width=8, tiling={"stride": (8, 8)})
    reader = WholeImageReader(rule, LIMITS)
    image = np.random.RandomState(0).randint(0, 256, (20, 30, 1), np.uint8)
    for array in (image, image[..., 0], image.transpose(2, 0, 1)):
        images = reader.read(NPY, npy(array), dict)
        assert len(images) == 1
        assert np.array_equal(images[0], image.transpose(2, 0, 1))
    for shape in [(20, 30, 3), (3, 20, 30), (5, 64)]:
        with pytest.raises(InvalidInput, match=r"images have shape .* expected; "):
            reader.read(NPY, npy(np.zeros(shape, np.uint8)), dict)
