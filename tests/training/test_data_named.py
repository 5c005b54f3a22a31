"""Named data sets: the digits, local IDX sets; IDX files make exact round trips, and any bytes at all end in an array
or in a DataFormatError."""

import gzip
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import DataConfig
from training.data import load_dataset
from training.data.named import parse_idx, read_idx
from training.errors import DataFormatError, DataNotFound


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("shape", [(5,), (3, 4, 2), (1, 28, 28), (0,)])
@pytest.mark.parametrize("compress", [lambda data: data, gzip.compress], ids=["raw", "gz"])
def test_round_trip(shape, compress):
    array = np.random.RandomState(0).randint(0, 256, size=shape)
    np.testing.assert_array_equal(parse_idx(compress(idx_bytes(array)), ndim=len(shape)), array)


IMAGES = idx_bytes(np.arange(24).reshape(2, 3, 4))
GZIPPED = gzip.compress(IMAGES, mtime=0)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "begins with nothing"),
        (IMAGES[:10], "ends within the header"),
        (IMAGES[:-1], r"\(2, 3, 4\), 24 bytes, but only 23 follow"),
        (IMAGES + b"\0", "but more follow"),
        (b"\0\0\x09\x03" + IMAGES[4:], "00 00 08 03"),
        (b"\0\0\x08\x01" + IMAGES[4:], "00 00 08 03"),
        (b"\x89PNG\r\n\x1a\n", "00 00 08 03"),
        (GZIPPED[:-6], "damaged gzip"),
        (GZIPPED[:-8] + bytes(8), "damaged gzip"),
        (b"\x1f\x8b\xff\xff", "damaged gzip"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3), "at most"),
    ],
)
def test_damage_is_named(data, says):
    with pytest.raises(DataFormatError, match=says):
        parse_idx(data, ndim=3)


@given(
    prefix=st.sampled_from([b"", b"\0\0\x08\x03", b"\0\0\x08\x03\0\0\0\x01\0\0\0\x02\0\0\0\x02", b"\x1f\x8b\x08\0"]),
    tail=st.binary(max_size=64),
    compress=st.booleans(),
)
def test_any_bytes_are_an_array_or_a_data_error(prefix, tail, compress):
    data = gzip.compress(prefix + tail) if compress else prefix + tail
    try:
        array = parse_idx(data, ndim=3)
    except DataFormatError:
        return
    assert array.dtype == np.uint8
    assert array.ndim == 3
    assert len(prefix + tail) == 16 + math.prod(array.shape)


@given(position=st.integers(0, len(GZIPPED) - 1), value=st.integers(0, 255))
def test_a_flipped_byte_of_gzip_is_found(position, value):
    data = bytearray(GZIPPED)
    data[position] = value
    try:
        array = parse_idx(bytes(data), ndim=3)
    except DataFormatError:
        return
    np.testing.assert_array_equal(array, np.arange(24).reshape(2, 3, 4))


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(b"nonsense")
    with pytest.raises(DataFormatError, match="train-images-idx3-ubyte: begins with"):
        read_idx(path, ndim=3)
    with pytest.raises(DataNotFound, match="gone: cannot be read"):
        read_idx(tmp_path / "gone", ndim=3)


RANDOM = np.random.RandomState(0)


def test_digits():
    dataset = load_dataset(DataConfig(source="digits"))
    assert (len(dataset), dataset.preprocessing.shape) == (1797, (1, 8, 8))
    pixels = dataset.pixels(range(1797))
    assert set(np.unique(pixels)) == {int(255 * c / 16 + 0.5) for c in range(17)}
    assert np.bincount(dataset.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert {name: len(indices) for name, indices in dataset.splits.items()} == {
        "train": 1437,
        "validation": 90,
        "calibration": 90,
        "test": 180,
    }


def write_idx_set(folder: Path, train: int, test: int, compress=gzip.compress, suffix=".gz") -> None:
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        images = RANDOM.randint(0, 256, size=(count, 28, 28))
        (folder / f"{part}-images-idx3-ubyte{suffix}").write_bytes(compress(idx_bytes(images)))
        (folder / f"{part}-labels-idx1-ubyte{suffix}").write_bytes(compress(idx_bytes(np.arange(count) % 10)))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, ".gz"), (bytes, "")], ids=["gz", "raw"])
def test_local_idx_files_are_taken_as_they_are(tmp_path, name, compress, suffix):
    write_idx_set(tmp_path / name, 200, 30, compress, suffix)
    dataset = load_dataset(DataConfig(source=name, directory=tmp_path))
    assert {split: len(indices) for split, indices in dataset.splits.items()} == {
        "train": 180,
        "validation": 10,
        "calibration": 10,
        "test": 30,
    }
    assert sorted(dataset.splits["test"]) == list(range(200, 230))
    np.testing.assert_array_equal(dataset.labels, np.concatenate([np.arange(200) % 10, np.arange(30) % 10]))
    assert len(dataset.label_names) == 10
    assert set(dataset.describe()["files"]) == {path.name for path in (tmp_path / name).iterdir()}


def test_training_images_equal_to_test_images_are_left_out_and_counted(tmp_path):
    write_idx_set(tmp_path / "mnist", 200, 30)
    images = RANDOM.randint(0, 256, size=(200, 28, 28))
    images[:10] = read_idx(tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz", ndim=3)[5:15]
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(idx_bytes(images))
    dataset = load_dataset(DataConfig(source="mnist", directory=tmp_path))
    assert {name: len(indices) for name, indices in dataset.splits.items()} == {
        "train": 170,
        "validation": 10,
        "calibration": 10,
        "test": 30,
    }
    assert min(indices.min() for indices in dataset.splits.values()) == 10
    assert dataset.describe()["copies_of_test_left_out"] == 10


def test_labels_are_optional(tmp_path):
    write_idx_set(tmp_path / "mnist", 200, 30)
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").unlink()
    dataset = load_dataset(DataConfig(source="mnist", directory=tmp_path))
    assert (dataset.labels, dataset.label_names) == (None, None)


def test_labels_that_do_not_fit_are_refused(tmp_path):
    write_idx_set(tmp_path / "mnist", 200, 30)
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes(np.zeros(199)))
    with pytest.raises(DataFormatError, match="199 labels for 200 images"):
        load_dataset(DataConfig(source="mnist", directory=tmp_path))


def real_or_made(tmp_path: Path) -> tuple[Path, int, int]:
    """The directory of the real MNIST with its sizes, or of one made here in the same format."""
    beside = Path(__file__).parents[2].parent / "shared" / "data"
    directory = Path(os.environ.get("VAETRAIN_DATA_DIR", beside))
    if (directory / "mnist" / "train-images-idx3-ubyte.gz").is_file():
        return directory, 60_000, 10_000
    write_idx_set(tmp_path / "mnist", 6_000, 1_000)
    return tmp_path, 6_000, 1_000


def test_mnist(tmp_path):
    directory, train, test = real_or_made(tmp_path)
    dataset = load_dataset(DataConfig(source="mnist", directory=directory))
    assert {name: len(indices) for name, indices in dataset.splits.items()} == {
        "train": train * 9 // 10,
        "validation": train // 20,
        "calibration": train // 20,
        "test": test,
    }
    assert dataset.preprocessing.shape == (1, 28, 28)
    everywhere = np.concatenate(list(dataset.splits.values()))
    np.testing.assert_array_equal(np.sort(everywhere), np.arange(train + test))
    assert set(np.unique(dataset.labels)) == set(range(10))
