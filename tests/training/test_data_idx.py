"""IDX files: exact round trips, and any bytes at all end in an array or in a DataFormatError."""

import gzip
import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.idx import parse_idx, read_idx
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
