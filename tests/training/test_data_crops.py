"""Crops of a folder's images: at their own resolution, split by image, the same everywhere, in bounded memory."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from service.bundle.input_rules import Tiling
from training.config import DataConfig, load_config
from training.data import load_dataset
from training.data.crops import corners
from training.errors import BadImages, ConfigError, DataFormatError, SplitError

TILE = 8
SPLITS = {"validation": 0.15, "calibration": 0.2, "test": 0.2}


def image(number, height=24, width=30):
    """Every 8×8 crop of it tells its image and its place: uint8 [h,w,3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([np.full_like(y, number), y, x], axis=2).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """20 images of three sizes."""
    for number in range(20):
        height, width = ((24, 30), (40, 16), (8, 9))[number % 3]
        Image.fromarray(image(number, height, width)).save(tmp_path / f"{number:02}.png")
    return tmp_path


def load(folder, **options):
    return load_dataset(DataConfig(**{"source": str(folder), "tile": TILE, "crops": 12, **SPLITS, **options}))


def where(crop):
    """Image, y, x of a crop [3,8,8]."""
    return tuple(crop[:, 0, 0].tolist())


def test_rows_are_crops_of_the_images_as_they_are(folder):
    dataset = load(folder)
    assert dataset.preprocessing.shape == (3, TILE, TILE)
    assert dataset.preprocessing.tiling == Tiling(stride=(4, 4))
    for crop in dataset.pixels(range(len(dataset))):
        number, y, x = where(crop)
        size = ((24, 30), (40, 16), (8, 9))[number % 3]
        np.testing.assert_array_equal(crop, image(number, *size)[y : y + TILE, x : x + TILE].transpose(2, 0, 1))


def test_no_image_has_crops_in_two_splits_and_every_crop_is_in_one(folder):
    dataset = load(folder)
    of = {name: {where(crop)[0] for crop in dataset.pixels(rows)} for name, rows in dataset.splits.items()}
    assert sorted(np.concatenate(list(dataset.splits.values()))) == list(range(len(dataset)))
    assert sum(map(len, of.values())) == len(set().union(*of.values())) == 20
    assert {name: len(found) for name, found in of.items()} == {
        "train": 9,
        "validation": 3,
        "calibration": 4,
        "test": 4,
    }
    for name, numbers in of.items():
        assert {int(dataset.whole_images.read(i)[0, 0, 0]) for i in dataset.whole_images.splits[name]} == numbers
    assert dataset.details["whole_splits"] == {name: len(numbers) for name, numbers in of.items()}


def test_equal_images_stay_together(folder):
    for number in range(20, 30):
        (folder / f"{number}.png").write_bytes((folder / "00.png").read_bytes())
    dataset = load(folder)
    found = {where(crop)[0]: name for name, rows in dataset.splits.items() for crop in dataset.pixels(rows)}
    copies = [name for name, rows in dataset.splits.items() for crop in dataset.pixels(rows) if where(crop)[0] == 0]
    assert set(copies) == {found[0]}
    assert dataset.details["duplicates"] == 10


def test_wholes_are_read_in_their_own_size(folder):
    dataset = load(folder)
    sizes = {dataset.whole_images.read(index).shape for index in range(20)}
    assert sizes == {(3, 24, 30), (3, 40, 16), (3, 8, 9)}


def test_crops_of_one_image_differ_and_small_images_have_fewer(folder):
    dataset = load(folder, crops=50)
    places = [where(crop) for crop in dataset.pixels(range(len(dataset)))]
    assert len(set(places)) == len(places)
    counts = np.bincount([place[0] for place in places])
    assert counts[2] == 2  # an image of 8×9 holds no more
    assert 30 <= counts[0] <= 50


def test_the_same_seed_gives_the_same_crops_and_another_does_not(folder):
    first, again, other = load(folder), load(folder), load(folder, split_seed=1)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    np.testing.assert_array_equal(first.pixels(range(len(first))), again.pixels(range(len(again))))


def test_where_an_images_crops_lie_does_not_depend_on_the_other_images(folder):
    dataset = load(folder)
    before = {where(crop) for crop in dataset.pixels(range(len(dataset))) if where(crop)[0] < 18}
    for number in (18, 19):
        (folder / f"{number}.png").unlink()
    fewer = load(folder)
    assert {where(crop) for crop in fewer.pixels(range(len(fewer)))} == before


def test_crops_are_drawn_from_every_place():
    """All 9·5 corners of an image come up, about equally often."""
    counts = np.zeros((9, 5))
    for seed in range(2000):
        for y, x in corners((1, 16, 12), (8, 8), 3, seed, hashlib.sha256(b"image").digest()):
            counts[y, x] += 1
    assert counts.min() > 0.6 * counts.mean()
    assert counts.max() < 1.5 * counts.mean()


def test_beyond_the_memory_limit_crops_lie_in_a_file_and_are_the_same(folder):
    here, there = load(folder), load(folder, memory_limit_mb=0)
    assert isinstance(there.store, np.memmap)
    assert not isinstance(here.store, np.memmap)
    assert here.fingerprint == there.fingerprint
    np.testing.assert_array_equal(here.pixels([5, 0]), there.pixels([5, 0]))


def test_images_smaller_than_a_tile_are_named(folder):
    Image.fromarray(image(99, 7, 50)).save(folder / "small.png")
    dataset = load(folder)
    (name, reason) = dataset.skipped[0]
    assert name == "small.png"
    assert "50×7" in reason
    with pytest.raises(BadImages, match=r"small\.png"):
        load(folder, on_bad="refuse")


def test_labels_are_those_of_the_image(tmp_path):
    for number in range(20):
        place = tmp_path / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(image(number)).save(place)
    dataset = load(tmp_path)
    for crop, label in zip(dataset.pixels(range(len(dataset))), dataset.labels, strict=True):
        assert label == where(crop)[0] % 2


def test_too_few_images_are_counted_as_images_not_as_crops(tmp_path):
    for number in range(3):
        Image.fromarray(image(number)).save(tmp_path / f"{number}.png")
    with pytest.raises(SplitError, match="3 usable images"):
        load(tmp_path)


def test_tiles_want_a_folder_and_no_size(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((20, 9, 9), np.uint8))
    for source in (tmp_path / "a.npy", "digits"):
        with pytest.raises(DataFormatError, match=r"data\.tile"):
            load(source)
    with pytest.raises(ConfigError, match="exclude"):
        load_config(None, ["data.tile=8", "data.size=8"])


@pytest.mark.parametrize(("overlap", "stride"), [(0.0, (8, 12)), (0.5, (4, 6)), (0.99, (1, 1))])
def test_overlap_becomes_the_bundles_stride(folder, overlap, stride):
    dataset = load(folder, tile=(8, 12), overlap=overlap, aggregate="top", top_share=0.2)
    assert dataset.preprocessing.tiling == Tiling(stride=stride, aggregate="top", share=0.2)
