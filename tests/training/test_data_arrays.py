""".npy and .npz: the pixels that went in come out; the doubtful is refused in words."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.config import DataConfig
from training.data import load_dataset
from training.errors import BadImages, DataError, DataFormatError, DataNotFound, SplitError

RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(0, 256, size=(40, 6, 5), dtype=np.uint8)
COLOUR = RANDOM.randint(0, 256, size=(40, 3, 6, 5), dtype=np.uint8)


def load(path: Path, **options):
    return load_dataset(DataConfig(source=str(path), **options))


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (GREY, GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (COLOUR, COLOUR),
        (np.moveaxis(COLOUR, 1, 3), COLOUR),
        (np.asfortranarray(GREY), GREY[:, None]),
    ],
    ids=["NHW", "N1HW", "NHW1", "N3HW", "NHW3", "fortran"],
)
@pytest.mark.parametrize("memory_limit_mb", [0, 2048], ids=["streamed", "in memory"])
def test_layouts(tmp_path, array, expected, memory_limit_mb):
    dataset = load(saved(tmp_path / "Widgets of May.npy", array), memory_limit_mb=memory_limit_mb)
    assert dataset.streamed == (memory_limit_mb == 0)
    assert dataset.name == "widgets-of-may"
    assert dataset.preprocessing.shape == expected.shape[1:]
    assert dataset.pixels(range(40)).dtype == np.uint8
    np.testing.assert_array_equal(dataset.pixels(range(40)), expected)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_floats_stay_floats(tmp_path, dtype):
    array = (GREY / 255).astype(dtype)
    dataset = load(saved(tmp_path / "a.npy", array))
    assert dataset.dtype == np.float32
    np.testing.assert_array_equal(dataset.pixels([3, 1]), array[[3, 1], None].astype(np.float32))
    assert dataset.pixels([0]).dtype == np.float32


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (GREY.astype(np.int64), "pixels are int64; uint8, or floats"),
        (GREY > 3, "pixels are bool; .* masks are given as floats"),
        ((GREY > 99).astype(np.uint8), "no 8-bit level is above 1, .* multiply them by 255, or give them as floats"),
        (np.zeros_like(GREY), "no 8-bit level is above 1"),
        (GREY[0], "6×5 is none of"),
        (GREY[:0], "empty"),
        (RANDOM.randint(0, 256, size=(30, 2, 6, 6), dtype=np.uint8), "30×2×6×6 is none of"),
        (np.zeros((30, 3, 6, 3), np.uint8), "may be N×C×H×W or N×H×W×C"),
        (np.zeros((60, 50, 3), np.uint8), "60×50×3 is none of"),
        (np.zeros((2, 1, 5000, 2), np.uint8), "give data.size, at most 4096"),
        (np.array(["a", "b"]), "pixels are <U1"),
    ],
)
def test_doubtful_arrays_are_refused(tmp_path, array, says):
    with pytest.raises(DataFormatError, match=says):
        load(saved(tmp_path / "a.npy", array))


def test_masks_are_black_and_white_as_floats_and_as_0_and_255(tmp_path):
    masks = (GREY > 99)[:, None]
    for array in (masks * 255).astype(np.uint8), masks.astype(np.float32):
        np.testing.assert_array_equal(load(saved(tmp_path / "a.npy", array)).pixels(range(40)) > 0, masks)


def test_a_single_level_above_1_is_enough(tmp_path):
    """A dark camera is no mask."""
    array = (GREY > 99).astype(np.uint8)
    array[3, 2, 1] = 2
    assert len(load(saved(tmp_path / "a.npy", array))) == 40


def test_pickles_are_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataFormatError, match=r"not an \.npy file of plain numbers"):
        load(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataFormatError, match=r"not an \.npz file of plain numbers"):
        load(tmp_path / "a.npz")


def test_a_zip_of_other_things_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataFormatError, match=r"readme\.txt is no array"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("cut", [0, 5, 60, 120, 700])
def test_truncated_files_are_refused(tmp_path, suffix, cut):
    whole = tmp_path / f"whole{suffix}"
    np.save(whole, GREY) if suffix == ".npy" else np.savez(whole, GREY)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(whole.read_bytes()[:cut])
    with pytest.raises(DataFormatError, match=r"a\.np[yz]: "):
        load(path)


def test_swapped_suffixes_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", GREY)
    np.save(tmp_path / "b.npy", GREY)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(DataFormatError, match=r"not an \.npy file"):
        load(tmp_path / "a.npy")
    with pytest.raises(DataFormatError, match=r"is an \.npy file"):
        load(tmp_path / "b.npz")


def test_bad_rows_are_skipped_or_refused_by_name(tmp_path):
    array = (GREY / 255).astype(np.float32)
    array[7, 0, 0] = np.nan
    array[9, 5, 4] = 1.5
    path = saved(tmp_path / "a.npy", array)
    dataset = load(path)
    assert [name for name, _ in dataset.skipped] == ["a.npy[7]", "a.npy[9]"]
    assert "NaN" in dataset.skipped[0][1]
    assert "to 1.5" in dataset.skipped[1][1]
    np.testing.assert_array_equal(dataset.pixels(range(38))[:, 0], np.delete(array, [7, 9], axis=0))
    with pytest.raises(BadImages, match=r"(?s)2 images cannot be used:.*a\.npy\[7\]: holds NaN.*a\.npy\[9\]: values"):
        load(path, on_bad="refuse")


def test_floats_of_another_range_are_no_images(tmp_path):
    with pytest.raises(SplitError, match=r"(?s)no usable image.*values from .* to .*floats in \[0, 1\]"):
        load(saved(tmp_path / "a.npy", GREY.astype(np.float32) + 2))


@pytest.mark.parametrize(
    ("arrays", "options"),
    [
        ({"images": GREY, "labels": np.arange(40)}, {}),
        ({"x": GREY, "y": np.arange(40)}, {}),
        ({"faces": GREY, "y": np.arange(40)}, {}),
        ({"x_train": GREY, "y_train": np.arange(40), "x_test": GREY}, {"images": "x_train", "labels": "y_train"}),
    ],
)
def test_npz_keys(tmp_path, arrays, options):
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    dataset = load(tmp_path / "a.npz", **options)
    np.testing.assert_array_equal(dataset.pixels(range(40))[:, 0], GREY)
    np.testing.assert_array_equal(dataset.labels, np.arange(40))


@pytest.mark.parametrize(
    ("arrays", "options", "says"),
    [
        ({"a": GREY, "b": GREY}, {}, "holds a, b; say which are the rows"),
        ({}, {}, "holds no array"),
        ({"x": GREY}, {"images": "z"}, "data.images = 'z' is not among its arrays: x"),
        ({"x": GREY}, {"labels": "z"}, "data.labels = 'z' is not among"),
        ({"x": GREY, "y": np.arange(39)}, {}, "40 integers, one an image"),
        ({"x": GREY, "y": np.zeros(40)}, {}, "labels are float64"),
    ],
)
def test_npz_that_cannot_be_read_says_why(tmp_path, arrays, options, says):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataFormatError, match=says):
        load(tmp_path / "a.npz", **options)


def test_size_and_mode_are_the_bundle_rule(tmp_path):
    dataset = load(saved(tmp_path / "a.npy", GREY), size=(9, 7), mode="RGB", fit="stretch", resample="box")
    assert dataset.preprocessing.model_dump() == {
        "kind": "image",
        "mode": "RGB",
        "height": 9,
        "width": 7,
        "fit": "stretch",
        "resample": "box",
        "background": 0,
        "tiling": None,
    }
    pixels = dataset.pixels([0, 1])
    assert pixels.shape == (2, 3, 9, 7)
    np.testing.assert_array_equal(pixels[:, 0], pixels[:, 2])


def test_modes_of_arrays_are_converted_as_images_are(tmp_path):
    dataset = load(saved(tmp_path / "a.npy", COLOUR), mode="L")
    pictures = [Image.fromarray(np.moveaxis(row, 0, 2)).convert("L") for row in COLOUR]
    np.testing.assert_array_equal(dataset.pixels(range(40))[:, 0], np.stack([np.asarray(p) for p in pictures]))
    with pytest.raises(DataFormatError, match="only uint8 arrays change their mode"):
        load(saved(tmp_path / "b.npy", COLOUR / 255), mode="L")


def test_floats_are_resized_as_floats(tmp_path):
    dataset = load(saved(tmp_path / "a.npy", (GREY // 16 / 16).astype(np.float32)), size=3)
    pixels = dataset.pixels(range(40))
    assert (pixels.shape, pixels.dtype) == ((40, 1, 3, 3), np.float32)
    assert len(np.unique(pixels)) > 256, "resizing must not pass through 8 bits"
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_limit_draws_by_the_seed(tmp_path):
    array = np.repeat(np.arange(200, dtype=np.uint8), 4).reshape(200, 2, 2)
    path = saved(tmp_path / "a.npy", array)
    first = load(path, limit=50).pixels(range(50))[:, 0, 0, 0]
    assert len(set(first.tolist())) == 50
    assert first.max() > 150, "the limit must not take the first images only"
    np.testing.assert_array_equal(first, load(path, limit=50).pixels(range(50))[:, 0, 0, 0])
    assert first.tolist() != load(path, limit=50, split_seed=1).pixels(range(50))[:, 0, 0, 0].tolist()
    assert len(load(path, limit=500)) == 200


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("mnits", DataNotFound, "no data set .* has that name; did you mean mnist?"),
        ("nowhere/at/all", DataNotFound, "no such file or folder"),
        ("notes.txt", DataFormatError, r"a folder of images, or an \.npy, \.npz, \.csv or \.parquet file was expected"),
        ("folder.npy", DataNotFound, "no file in this folder"),
    ],
)
def test_sources_that_are_none(tmp_path, monkeypatch, source, error, says):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("hello")
    Path("folder.npy").mkdir()
    with pytest.raises(error, match=says):
        load_dataset(DataConfig(source=source))
    assert issubclass(error, DataError)
