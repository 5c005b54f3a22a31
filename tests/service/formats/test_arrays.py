"""npy bytes and JSON lists from outside: numpy's own files are read as numpy reads them, everything else is refused."""

from __future__ import annotations

import gc
import json
import re
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from service.errors import InvalidInput, LimitExceeded
from service.formats.arrays import (
    MAX_LISTS,
    MAX_NAMES,
    as_images,
    as_latents,
    from_json,
    may_hold_booleans,
    npy_shape,
    parse_json,
    read_npy,
    to_unit,
)
from tests import hostile
from tests.hostile import npy, npy_of, npy_raw

DTYPES = st.sampled_from(["|u1", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]).map(np.dtype)
SHAPES = hn.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)


@settings(max_examples=200, deadline=None)
@given(hn.arrays(DTYPES, SHAPES), st.booleans())
def test_what_numpy_writes_is_read_as_numpy_reads_it(array, fortran):
    data = npy(np.asfortranarray(array) if fortran else array)
    decoded = read_npy(data)
    assert np.array_equal(decoded, array, equal_nan=array.dtype.kind == "f")
    assert decoded.dtype == array.dtype.newbyteorder("=")
    assert decoded.flags.c_contiguous


def test_headers_of_other_writers():
    """Keys in another order, other blanks and quotes, no trailing comma, no padding, a bare or an absent byte order."""
    for text in (
        "{'shape': (2, 3), 'fortran_order': False, 'descr': '|u1'}",
        '{"descr":"u1","fortran_order":False,"shape":(2,3,)}',
        "  {'descr': '<u1', 'fortran_order': False, 'shape': (2, 3), }      ",
        "{'descr': '=u1', 'fortran_order': False,\n 'shape': (2, 3)}",
    ):
        assert read_npy(npy_raw(text, bytes(range(6)))).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert read_npy(npy_raw(text, bytes(range(6)), (2, 0))).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_array_is_not_copied():
    data = npy(np.zeros(2**20, np.uint8))
    tracemalloc.start()
    array = read_npy(data)
    assert tracemalloc.get_traced_memory()[1] < 2**14
    tracemalloc.stop()
    assert not array.flags.writeable


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 12)])
def test_hostile_headers_are_refused_at_once_in_no_memory(shape):
    for name, _, body in hostile.npy_headers(shape):
        tracemalloc.start()
        start = time.process_time()
        with pytest.raises(InvalidInput, match=r"npy|no dimension may be 0"):
            as_images(read_npy(body), shape)
        assert time.process_time() - start < 0.3, name
        assert tracemalloc.get_traced_memory()[1] < 2**21, name
        tracemalloc.stop()


def test_an_error_says_what_was_found():
    for body, text in [
        (npy(np.zeros(3, np.int64)), "dtype <i8: uint8 or float16, float32, float64 expected"),
        (npy(np.zeros(3, bool)), r"; of an image, send \(x \* 255\)"),
        (npy(np.zeros(3, np.uint16)), r"; of an image, send levels from 0 to 255 by .*, or x / 65535 of 16 bits"),
        (npy(np.array([None])), r"dtype \|O: uint8 or float16, float32, float64 expected$"),
        (npy_of("|u1", "(2, 3)", b"abc"), "promises 6 bytes of data: the body holds 3"),
        (npy_of("<f8", "(1000000, 1000000)"), "promises 8000000000000 bytes"),
        (npy_of("<f8", f"({10**30},)"), "promises over 10\\^18 bytes"),
        (npy_of("|u1", "(-1, -6)", bytes(6)), "negative"),
        (npy(np.zeros((1,) * 5)), "5 dimensions: at most 4"),
        (npy_raw("{}", b"", (3, 0)), "version 3.0: 1.0 or 2.0 expected"),
    ]:
        with pytest.raises(InvalidInput, match=text):
            read_npy(body)


@settings(max_examples=150, deadline=None)
@given(
    st.text(st.characters(max_codepoint=255), max_size=60) | st.text("({[-+*'\"\\1e9,:", max_size=900),
    st.binary(max_size=9),
)
def test_any_header_gives_an_array_or_our_error(text, data):
    with pytest.raises(InvalidInput):
        read_npy(npy_raw(text, data))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=6))
def test_a_damaged_npy_gives_an_array_or_our_error(position, damage):
    data = bytearray(npy(np.zeros((2, 3), np.float32)))
    data[position : position + len(damage)] = damage
    try:
        assert read_npy(bytes(data)).size == 6
    except InvalidInput:
        return


# JSON


def test_json_numbers():
    assert from_json([[0, 1], [2, 3]]).tolist() == [[0, 1], [2, 3]]
    assert from_json([[0.5, 1]]).tolist() == [[0.5, 1.0]]
    assert from_json(0.5).shape == ()
    assert from_json([]).shape == (0,)
    assert from_json([[[[1]]]]).shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
    "value",
    [True, [True, 0.5], [0.5, True], None, [None, 0.5], "1", ["1", 0.5], [[1], 1], [[1], [1, 2]], {}, [{}], [[], 1]],
)
def test_json_of_anything_else_is_refused(value):
    with pytest.raises(InvalidInput, match="row: "):
        from_json(value, "row: ")


NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 255), st.floats(allow_nan=False))
VALUES = st.one_of(NUMBERS, st.none(), st.text(max_size=3), st.lists(NUMBERS, max_size=2))


@settings(max_examples=300, deadline=None)
@given(st.one_of(NUMBERS, st.lists(NUMBERS), st.lists(st.lists(NUMBERS, min_size=3, max_size=3)), st.lists(VALUES)))
def test_where_no_boolean_is_to_be_looked_for_the_same_is_read_and_refused(value):
    assert read_or_refused(value, booleans=False) == read_or_refused(value, booleans=True)


def read_or_refused(value, booleans):
    try:
        array = from_json(value, "row: ", booleans)
    except InvalidInput as error:
        return str(error)
    return array.dtype, array.shape, array.tobytes()


@pytest.mark.parametrize("text", ["true", "false", '{"a": [true]}', "[0.5,false]", '"a false friend"'])
def test_booleans_are_seen_in_a_body(text):
    assert may_hold_booleans(text.encode())
    assert not may_hold_booleans(b'{"images": [[0.5, 1e-05]], "dtype": "float32", "rows": 3}')


@pytest.mark.parametrize("depth", [5, 6, 60, 70, 500])
def test_json_lists_are_at_most_4_deep(depth):
    with pytest.raises(InvalidInput, match="nested too deep: at most 4"):
        from_json(json.loads("[" * depth + "1" + "]" * depth))


@pytest.mark.parametrize("value", [10**19, 2**64, -(2**63) - 1, 10**400])
def test_integers_beyond_64_bits(value):
    with pytest.raises(InvalidInput):
        to_unit(from_json([[value, 0]]), "uint8")


def test_a_long_text_among_numbers_does_not_give_its_room_to_all():
    """numpy would ask for 2^20 · 4 · 1000 bytes."""
    value = [["a" * 2**20] + [0.0] * 1000]
    tracemalloc.start()
    with pytest.raises(InvalidInput, match="numbers in nested lists expected"):
        from_json(value)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_parse_json():
    assert parse_json(b'{"images": [[0.5]]}') == {"images": [[0.5]]}
    for body in (b'{"a": NaN}', b"[Infinity]", b"[" * 5000 + b"]" * 5000, b"\xff", b"", b"[1,]"):
        with pytest.raises(InvalidInput):
            parse_json(body)


def test_json_of_millions_of_lists_is_refused_unparsed():
    for item in (b"[],", b"{},", b"[{},"):
        with pytest.raises(LimitExceeded, match=f"at most {MAX_LISTS}"):
            parse_json(b"[" + item * MAX_LISTS + b"0]")


def test_json_of_millions_of_names_is_refused_unparsed():
    names = b",".join(b'"%x":1' % number for number in range(MAX_NAMES + 1))
    with pytest.raises(LimitExceeded, match=f"65537 names in 1 objects: at most {MAX_NAMES} each"):
        parse_json(b"{" + names + b"}")
    assert len(parse_json(b"{" + names.rpartition(b",")[0] + b"}")) == MAX_NAMES


def test_json_of_many_objects_may_have_many_names():
    """A table of 1024 rows by the names of 784 features."""
    row = b"{" + b",".join(b'"x%d":1' % number for number in range(784)) + b"}"
    assert len(parse_json(b"[" + b",".join([row] * 1024) + b"]")) == 1024


# Shapes


SIZE = (28, 20)
"""Height and width of the model's images."""


@pytest.mark.parametrize(
    ("channels", "shape", "expected", "axes"),
    [
        (1, (5, 6), (1, 1, 5, 6), "HW"),
        (1, (28, 20), (1, 1, 28, 20), "HW"),
        (1, (28, 20, 1), (1, 1, 28, 20), "HWC"),
        (1, (5, 6, 1), (1, 1, 5, 6), "HWC"),
        (1, (4, 5, 6), (4, 1, 5, 6), "NHW"),
        (1, (3, 28, 20), (3, 1, 28, 20), "NHW"),
        (1, (1, 5, 6), (1, 1, 5, 6), "NHW"),
        (1, (1, 1, 1), (1, 1, 1, 1), "NHW"),
        (1, (2, 4, 4), (2, 1, 4, 4), "NHW"),
        (1, (4, 1, 5, 6), (4, 1, 5, 6), "NCHW"),
        (1, (4, 5, 6, 1), (4, 1, 5, 6), "NHWC"),
        (1, (4, 1, 6, 1), (4, 1, 6, 1), "NCHW"),
        (3, (3, 5, 6), (1, 3, 5, 6), "CHW"),
        (3, (5, 6, 3), (1, 3, 5, 6), "HWC"),
        (3, (28, 20, 3), (1, 3, 28, 20), "HWC"),
        (3, (3, 20, 3), (1, 3, 20, 3), "CHW"),
        (3, (4, 3, 5, 6), (4, 3, 5, 6), "NCHW"),
        (3, (4, 5, 6, 3), (4, 3, 5, 6), "NHWC"),
        (3, (3, 3, 3, 3), (3, 3, 3, 3), "NCHW"),
    ],
)
def test_layouts(channels, shape, expected, axes):
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    for ordered in (array, np.asfortranarray(array)):
        images = as_images(ordered, (channels, *SIZE))
        assert images.shape == expected
        assert images.flags.c_contiguous
        known = dict(zip(axes, shape, strict=True))
        full = array.reshape([known.get(name, 1) for name in "NCHW" if name not in axes] + list(shape))
        names = [name for name in "NCHW" if name not in axes] + list(axes)
        assert np.array_equal(images, full.transpose([names.index(name) for name in "NCHW"]))


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        ((1, 28, 1), (5, 28, 1), (5, 1, 28, 1)),
        ((1, 28, 3), (5, 28, 3), (5, 1, 28, 3)),
        ((1, 1, 784), (5, 784), None),
        ((1, 1, 784), (1, 784), (1, 1, 1, 784)),
        ((1, 1, 784), (5, 1, 784), (5, 1, 1, 784)),
        ((1, 1, 6), (5, 1, 6, 1), (5, 1, 1, 6)),
        ((3, 3, 7), (3, 7, 3), (1, 3, 3, 7)),
        ((3, 3, 3), (3, 3, 3), (1, 3, 3, 3)),
    ],
)
def test_the_models_own_size_decides_between_layouts(model, shape, expected):
    array = np.arange(np.prod(shape)).reshape(shape)
    if expected is None:
        with pytest.raises(InvalidInput, match=r"reshape flattened images to \(-1, 1, 1, 784\)"):
            as_images(array, model)
    else:
        assert as_images(array, model).shape == expected


@pytest.mark.parametrize(
    ("channels", "shape", "advice"),
    [
        (1, (), "expected"),
        (1, (560,), "reshape flattened images to (-1, 1, 28, 20)"),
        (1, (7, 560), "reshape flattened images to (-1, 1, 28, 20)"),
        (1, (1, 560), "reshape flattened images"),
        (1, (7, 1, 560), "reshape flattened images"),
        (1, (7, 560, 1), "reshape flattened images"),
        (1, (7, 1, 1, 560), "reshape flattened images"),
        (3, (7, 1680), "reshape flattened images to (-1, 3, 28, 20)"),
        (3, (1680,), "reshape flattened images"),
        (3, (7, 3, 1, 1680), "reshape flattened images"),
        (1, (64, 64, 3), "convert colours to grey"),
        (1, (64, 64, 4), "convert colours to grey"),
        (1, (64, 64, 2), "convert colours to grey"),
        (1, (3, 64, 64), "send three images as (3, 1, H, W)"),
        (1, (4, 3, 64, 64), "convert colours to grey"),
        (1, (4, 64, 64, 3), "convert colours to grey"),
        (1, (4, 2, 5, 6), "(N, 1, H, W), (N, H, W, 1), (N, H, W), (H, W, 1) or (H, W) expected"),
        (3, (5, 6), "repeat grey in three channels"),
        (3, (4, 5, 6), "(N, 3, H, W), (N, H, W, 3), (3, H, W) or (H, W, 3) expected"),
        (3, (28, 20, 4), "leave out an alpha channel"),
        (3, (5, 28, 20), "repeat grey in three channels"),
        (3, (4, 1, 5, 6), "repeat grey in three channels"),
        (3, (4, 28, 20, 4), "leave out an alpha channel"),
        (1, (0, 5), "no dimension may be 0"),
        (1, (1,) * 5, "expected"),
    ],
)
def test_what_fits_no_layout_is_refused_and_says_what_to_do(channels, shape, advice):
    with pytest.raises(InvalidInput, match=r"images have shape \(.*" + re.escape(advice)):
        as_images(np.zeros(shape, np.uint8), (channels, *SIZE))


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (4,), (1, 2, 5), (0, 5), ()])
def test_latents_of_other_shapes_are_refused(shape):
    with pytest.raises(InvalidInput, match=r"\(M, 5\) expected"):
        as_latents(np.zeros(shape), 5, 10)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39, -3.5e38])
def test_latents_that_float32_cannot_hold(value):
    z = np.zeros((3, 5))
    z[1, 4] = value
    with pytest.raises(InvalidInput, match="latent 1: finite float32"):
        as_latents(z, 5, 10)


# Ranges


def test_uint8_becomes_k_over_255_in_float32():
    every = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    expected = (np.arange(256) / 255).astype(np.float32).reshape(every.shape)
    assert np.array_equal(to_unit(every), expected)
    assert np.array_equal(to_unit(every.astype(np.int64), "uint8"), expected)


@pytest.mark.parametrize("value", [-1e-45, np.nextafter(1, 2), np.nan, np.inf, -np.inf, -1, 2])
def test_floats_out_of_range_are_named(value):
    x = np.zeros((3, 1, 2, 2))
    x[1, 0, 1, 1] = value
    with pytest.raises(InvalidInput, match="image 1: pixels as float32 from 0 to 1 expected, finite"):
        to_unit(x)
    with pytest.raises(InvalidInput, match=r"image 8: .*; levels .* are sent as uint8 .*, or divided by 255"):
        to_unit(x, first_row=7)


@pytest.mark.parametrize("value", [-1, 256, 2**40])
def test_whole_numbers_out_of_range(value):
    with pytest.raises(InvalidInput, match="image 0: pixels as uint8 from 0 to 255"):
        to_unit(np.full((1, 1, 2, 2), value), "uint8")


def test_fractions_are_no_uint8():
    with pytest.raises(InvalidInput, match="fractions"):
        to_unit(np.full((1, 1, 2, 2), 0.5), "uint8")


@pytest.fixture
def _threads_change_places_in_collections():
    """Collections come often, and let another thread go on, as Python code in a destructor may."""
    thresholds = gc.get_threshold()

    def yield_to_others(phase, info):
        time.sleep(1e-5)

    gc.callbacks.append(yield_to_others)
    gc.set_threshold(7)
    yield
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(yield_to_others)


@pytest.mark.usefixtures("_threads_change_places_in_collections")
def test_headers_are_parsed_on_several_threads_at_once():
    def shapes(sides):
        return [npy_shape(npy_raw(text_of(side), b"")) for side in sides]

    def text_of(side):
        return f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({side}, 0), }}"

    for first in range(0, 2000, 200):  # threads that have just begun are at other depths
        parts = [range(first + part, first + part + 50) for part in range(0, 200, 50)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(shapes, parts)) == [[(side, 0) for side in part] for part in parts]
