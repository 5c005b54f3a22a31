"""Vectors and signals: every format gives the same data set; what is no row of numbers is named by its line."""

import csv
import decimal
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from training.cli import _configure
from training.config import DataConfig
from training.data import load_dataset
from training.data.load import kind_of
from training.data.tables import number_labels
from training.errors import BadImages, DataFormatError, DataNotFound, SplitError

RANDOM = np.random.RandomState(0)
NAMES = ["height", "width, outer", 'depth "net"']
NUMBERS = (RANDOM.randn(60, 3) * [1e-30, 1, 1e30]).astype(np.float32)
SPECIES = [["setosa", "iris, blue", "virginica"][i % 3] for i in range(60)]


def load(path: Path, **options):
    return load_dataset(DataConfig(source=str(path), **options))


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def lines(rows, header=None) -> str:
    """CSV of rows of anything, quoted where need be."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([*([header] if header else []), *rows])
    return stream.getvalue()


def table(path: Path, **columns) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def store(folder: Path, form: str, numbers: np.ndarray, names: list[str]) -> Path:
    path = folder / f"a.{form}"
    if form == "csv":
        return written(path, lines(([repr(float(x)) for x in row] for row in numbers), names))
    if form == "parquet":
        parquet.write_table(pa.table(list(numbers.T), names=names), path)
        return path
    np.savez(path, x=numbers) if form == "npz" else np.save(path, numbers)
    return path


FORMS = ["npy", "npz", "csv", "parquet"]


@pytest.mark.parametrize("memory_limit_mb", [0, 2048], ids=["streamed", "in memory"])
def test_every_format_gives_the_same_data_set(tmp_path, memory_limit_mb):
    found = [load(store(tmp_path, form, NUMBERS, NAMES), memory_limit_mb=memory_limit_mb) for form in FORMS]
    for form, dataset in zip(FORMS, found, strict=True):
        assert dataset.streamed == (memory_limit_mb == 0)
        assert (dataset.dtype, dataset.preprocessing.kind) == (np.float32, "vector")
        assert (dataset.preprocessing.natural, dataset.preprocessing.shape) == ((3,), (1, 1, 3))
        assert dataset.preprocessing.features == (NAMES if form in ("csv", "parquet") else None)
        np.testing.assert_array_equal(dataset.pixels(range(60))[:, 0, 0], NUMBERS)
        assert dataset.fingerprint == found[0].fingerprint
        assert dataset.describe()["vectors"] == 60
        assert dataset.describe()["shape"] == [3]
        assert list(dataset.describe()["files"]) == [f"a.{form}"]
    assert {name: len(part) for name, part in found[0].splits.items()} == {
        "train": 48, "validation": 3, "calibration": 3, "test": 6,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", ["<f2", ">f4", "<f8", "<i4", ">u2", "u1"])
def test_any_number_type_becomes_float32(tmp_path, dtype):
    numbers = RANDOM.randint(0, 100, (40, 4)).astype(dtype)
    dataset = load(saved(tmp_path / "a.npy", numbers), kind="vector")
    assert dataset.pixels([0]).dtype == np.float32
    np.testing.assert_array_equal(dataset.pixels(range(40))[:, 0, 0], numbers)


@pytest.mark.parametrize("shape", [(40, 2, 7), (40, 7), (40, 1, 7)])
def test_signals(tmp_path, shape):
    numbers = 50 * RANDOM.randn(*shape)
    dataset = load(saved(tmp_path / "a.npy", numbers), kind="signal")
    channels = shape[1] if len(shape) == 3 else 1
    assert (dataset.preprocessing.natural, dataset.preprocessing.shape) == ((channels, 7), (channels, 1, 7))
    expected = numbers.astype(np.float32).reshape(40, channels, 1, 7)
    np.testing.assert_array_equal(dataset.pixels(range(40)), expected)
    assert dataset.describe()["signals"] == 40


def test_a_line_of_a_table_may_be_a_signal(tmp_path):
    dataset = load(store(tmp_path, "csv", NUMBERS, NAMES), kind="signal")
    assert (dataset.preprocessing.natural, dataset.preprocessing.features) == ((1, 3), None)
    assert dataset.fingerprint == load(saved(tmp_path / "a.npy", NUMBERS), kind="signal").fingerprint


def test_equal_rows_are_kept_in_one_split(tmp_path):
    rows = np.repeat(RANDOM.randn(40, 3).astype(np.float32), 3, axis=0)
    dataset = load(saved(tmp_path / "a.npy", rows))
    assert dataset.describe()["duplicates"] == 80
    for indices in dataset.splits.values():
        assert set(indices // 3 * 3) <= set(indices)
        assert len(set(indices // 3)) * 3 == len(indices)


def test_kinds_and_presets_are_told_by_the_file(tmp_path):
    vectors, pictures = saved(tmp_path / "v.npy", NUMBERS), saved(tmp_path / "i.npy", np.zeros((40, 6, 5), np.uint8))
    sources = {
        (str(tmp_path / "t.csv"), ()): "vectors",
        (str(tmp_path / "t.parquet"), ()): "vectors",
        (str(vectors), ()): "vectors",
        (str(vectors), ("data.kind=signal",)): "signals",
        (str(tmp_path / "t.csv"), ("data.kind=signal", "data.drop=id")): "signals",
        (str(pictures), ()): "images",
        (str(tmp_path), ()): "images",
        ("digits", ()): "digits",
    }
    written(tmp_path / "t.csv", "a\n1\n")
    table(tmp_path / "t.parquet", a=[1.0])
    for (source, overrides), preset in sources.items():
        launch, config = _configure(source, None, None, list(overrides), None)
        assert launch.preset == preset
        assert preset == "digits" or kind_of(config.data) == preset.removesuffix("s")


@pytest.mark.parametrize("form", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"label": "species", "drop": "id"}, ["a", "b"]),
        ({"label": "species", "drop": ["id", "a"]}, ["b"]),
        ({"label": "species", "keep": ["b", "a"]}, ["a", "b"]),
        ({"keep": ["a", "id"], "drop": ["id"]}, ["a"]),
    ],
)
def test_columns_are_chosen_by_name(tmp_path, form, options, kept):
    columns = {"id": [f"#{i}" for i in range(60)], "a": NUMBERS[:, 0], "species": SPECIES, "b": NUMBERS[:, 1]}
    path = table(tmp_path / "a.parquet", **columns)
    if form == "csv":
        path = written(tmp_path / "a.csv", lines(zip(*columns.values(), strict=True), list(columns)))
    dataset = load(path, **options)
    assert dataset.preprocessing.features == kept
    np.testing.assert_array_equal(dataset.pixels(range(60))[:, 0, 0], np.stack([columns[k] for k in kept], axis=1))
    if "label" in options:
        assert dataset.label_names == sorted(set(SPECIES))
        assert [dataset.label_names[label] for label in dataset.labels] == SPECIES


def test_columns_without_a_header_are_numbered_from_0(tmp_path):
    rows = [[i % 3, *row] for i, row in enumerate(NUMBERS.tolist())]
    dataset = load(written(tmp_path / "a.csv", lines(rows)), label=0, drop=3)
    assert dataset.preprocessing.natural == (2,)
    assert dataset.preprocessing.features is None
    assert dataset.labels.tolist() == [i % 3 for i in range(60)]
    np.testing.assert_array_equal(dataset.pixels(range(60))[:, 0, 0], NUMBERS[:, :2])


@pytest.mark.parametrize(
    ("texts", "numbers", "names"),
    [
        (["3", "0", None], [3, 0, -1], None),
        (["1", "-1"], [1, 0], ["-1", "1"]),
        (["1", "01"], [1, 0], ["01", "1"]),
        (["b", None, "a"], [1, -1, 0], ["a", "b"]),
        (["9" * 5000, "1"], [1, 0], ["1", "9" * 5000]),
    ],
)
def test_labels_are_numbers_or_names(texts, numbers, names):
    found, found_names = number_labels(texts)
    assert (found.tolist(), found_names) == (numbers, names)


def test_rows_without_a_label_leave_none(tmp_path):
    rows = [[x, "" if i == 7 else "a"] for i, x in enumerate(NUMBERS[:, 0])]
    dataset = load(written(tmp_path / "a.csv", lines(rows, ["x", "y"])), label="y")
    assert (dataset.labels, len(dataset)) == (None, 60)


ROWS = "".join(f"{i},{i}.5\n" for i in range(40))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1", "1 values; 2 were expected"),
        ("1,2,3", "3 values; 2 were expected"),
        (",2", "'a' is missing"),
        ("1, ", "'b' is missing"),
        ("1,n/a", "'b' is 'n/a'; a number was expected"),
        ('"1,5",2', "'a' is '1,5'; a number was expected"),
        ("1_000,2", "'a' is '1_000'; a number was expected"),
        ("0x1F,2", "'a' is '0x1F'; a number was expected"),
        ("NaN,2", "'a' is nan; a finite float32 number was expected"),
        ("1,-inf", "'b' is -inf; a finite"),
        ("1,1e39", "'b' is 1e+39; a finite float32"),
        (f"{'9' * 400},2", "'a' is inf; a finite"),
        (f"x{'9' * 400},2", "'a' is 'x999"),
        ('"1\n",', "'b' is missing"),
    ],
)
def test_bad_lines_are_skipped_or_refused_by_number(tmp_path, line, reason):
    path = written(tmp_path / "a.csv", f'a,b\n"1","2\n"\n\n{line}\n{ROWS}3,\n')
    dataset = load(path)
    last = 46 + line.count("\n")
    assert len(dataset) == 41
    assert [name for name, _ in dataset.skipped] == ["a.csv line 5", f"a.csv line {last}"]
    assert dataset.skipped[0][1].startswith(reason)
    assert len(dataset.skipped[0][1]) < 100
    with pytest.raises(BadImages, match=r"(?s)2 vectors cannot be used:.*a\.csv line 5: "):
        load(path, on_bad="refuse")


def test_bad_rows_of_arrays_and_parquet_are_named(tmp_path):
    numbers = NUMBERS.astype(np.float64)
    numbers[3, 1], numbers[5, 2] = np.nan, 1e300
    assert load(saved(tmp_path / "a.npy", numbers)).skipped == [
        ("a.npy[3]", "number 1 is nan; a finite float32 number was expected"),
        ("a.npy[5]", "number 2 is 1e+300; a finite float32 number was expected"),
    ]
    assert load(saved(tmp_path / "s.npy", numbers[:, None]), kind="signal").skipped[0] == (
        "s.npy[3]", "channel 0, step 1 is nan; a finite float32 number was expected",
    )  # fmt: skip
    path = table(tmp_path / "a.parquet", x=[None, float("nan"), *range(2, 60)], y=[None, *range(59)])
    assert load(path).skipped == [
        ("a.parquet[0]", "'x' is missing"),
        ("a.parquet[1]", "'x' is nan; a finite float32 number was expected"),
    ]


@pytest.mark.parametrize(
    "text", ["\ufeffa,b\n" + ROWS, "a,b\r\n" + ROWS.replace("\n", "\r\n"), " a , b\n" + ROWS + "\n\n"]
)
def test_marks_and_line_ends_do_not_matter(tmp_path, text):
    dataset = load(written(tmp_path / "a.csv", text))
    assert dataset.preprocessing.features == ["a", "b"]
    assert dataset.skipped == []
    np.testing.assert_array_equal(dataset.pixels(range(40))[:, 0, 0, 1], np.arange(40) + 0.5)


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("", {}, "the file is empty"),
        ("\ufeff\n\n", {}, "the file is empty"),
        ("a,b\n", {}, "0 rows, and none of numbers"),
        ("a,a\n" + ROWS, {}, "'a' is the name of more than one column"),
        ("a,\n" + ROWS, {}, "column 1 .from 0. has no name"),
        ("a;b\n1;2\n", {}, "values separated by ';'; commas were expected"),
        ("1\t2\n3\t4\n", {}, r"values separated by '\\t'"),
        ("id,2019\n" + ROWS, {}, "line 1 holds numbers and 'id'"),
        ("0,1\n" + ROWS, {}, "line 1 counts 0, 1, 2"),
        (",0,1\n" + "".join(f"{i},{i},2\n" for i in range(40)), {}, "line 1 counts 0, 1, 2"),
        ("a,b\n1,x\n2,y\n", {}, "2 rows, and none .*a.csv line 2: 'b' is 'x'.*data.drop, or named with data.label"),
        ('a,b\n1,2\n"3,4\n5,6\n', {}, "damaged in the row that begins at line 3"),
        ('a,b\n1,"2"x\n', {}, "damaged in the row that begins at line 2"),
        (b"a,b\n1,\x00\n", {}, r"line 2: 'b' is '\\x00'"),
        (b"a,b\n1,\xff\n", {}, "not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), {}, "not UTF-8"),
        ("a,b\n" + ROWS, {"drop": "A"}, "data.drop names 'A', which is no column"),
        ("alpha,beta\n" + ROWS, {"label": "alpa"}, "data.label names 'alpa', which is no column; did you mean 'alpha'"),
        ("a,b\n" + ROWS, {"keep": "a", "label": "a"}, "leave none of 2 columns"),
        (f"a,{'b' * 200}\n" + ROWS, {}, "no bundle can be of such vectors: features.1 String should have at most"),
        ("a,b\n" + ROWS, {"size": 8}, "data.size = 8 says nothing here: vectors are not resized"),
        ("a,b\n" + ROWS, {"labels": "y"}, "data.labels = 'y' says nothing here"),
        ("a,b\n" + ROWS, {"kind": "image"}, "a table holds vectors or signals"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path, content, options, says):
    with pytest.raises(DataFormatError, match=f"(?s)a.csv: .*{says}"):
        load(written(tmp_path / "a.csv", content), **options)


@pytest.mark.parametrize(
    ("columns", "options", "says"),
    [
        ({"a": [{"b": 1}] * 9}, {}, "column 'a' is struct<b: int64>"),
        ({"a": [[1, 2]] * 9}, {}, "column 'a' is list"),
        (
            {"a": ["x"] * 9},
            {},
            "column 'a' is string; numbers were expected: a column of text is left out with data.drop",
        ),
        ({"a": [True] * 9}, {}, "column 'a' is bool"),
        ({"a": pa.array([1] * 9, pa.timestamp("s"))}, {}, "column 'a' is timestamp"),
        ({"a": [1.0], "b": [[1]]}, {"label": "b"}, "data.label names 'b', which is nested"),
        ({"1": [1.0] * 9}, {}, "'1', which reads as a number"),
        ({"a": pa.array([], pa.float32())}, {}, "0 rows"),
        ({}, {}, "leave none of 0 columns"),
    ],
)
def test_parquet_that_cannot_be_read_says_why(tmp_path, columns, options, says):
    with pytest.raises(DataFormatError, match=f"(?s)a.parquet: .*{says}"):
        load(table(tmp_path / "a.parquet", **columns), **options)


def test_parquet_types_of_numbers(tmp_path):
    columns = {
        "i": pa.array(range(60), pa.int8()),
        "f": pa.array(np.arange(60, dtype=np.float16)),
        "d": pa.array([decimal.Decimal(f"{i}.25") for i in range(60)]),
        "c": pa.array([i % 3 for i in range(60)]).dictionary_encode(),
        "a.b": pa.array(range(60), pa.uint64()),
        "a": pa.array(["x"] * 60).dictionary_encode(),
    }
    dataset = load(table(tmp_path / "a.parquet", **columns), label="a")
    i = np.arange(60)
    assert dataset.preprocessing.features == ["i", "f", "d", "c", "a.b"]
    np.testing.assert_array_equal(dataset.pixels(i)[:, 0, 0], np.stack([i, i, i + 0.25, i % 3, i], axis=1))
    assert (dataset.labels.tolist(), dataset.label_names) == ([0] * 60, ["x"])


@pytest.mark.parametrize("cut", [0, 3, 200, -200, -5])
def test_damaged_parquet_is_refused(tmp_path, cut):
    whole = table(tmp_path / "whole.parquet", x=NUMBERS[:, 0]).read_bytes()
    with pytest.raises(DataFormatError, match="not a Parquet file that can be read"):
        load(written(tmp_path / "a.parquet", whole[:cut]))


def test_damaged_pages_of_parquet_are_refused(tmp_path):
    whole = bytearray(table(tmp_path / "whole.parquet", x=NUMBERS[:, 0]).read_bytes())
    whole[4:60] = b"\xff" * 56
    with pytest.raises(DataFormatError, match="not a Parquet file that can be read"):
        load(written(tmp_path / "a.parquet", bytes(whole)))


@pytest.mark.parametrize(
    ("array", "kind", "says"),
    [
        (np.zeros((9, 3, 2)), "vector", "9×3×2 is not N×D"),
        (np.zeros(9), "vector", "9 is not N×D"),
        (np.zeros((9, 2, 3, 1)), "signal", "9×2×3×1 is not N×C×T or N×T"),
        (np.zeros((9, 3), complex), "vector", "numbers are complex128"),
        (np.zeros((9, 3), bool), "vector", "numbers are bool"),
        (np.zeros((9, 3), "S4"), "signal", r"numbers are \|S4"),
        (np.zeros((9, 0)), "vector", "empty"),
        (np.zeros((9, 3), int), "auto", "pixels are int64.*data.kind says if these are vectors or signals"),
        (RANDOM.randn(60, 5, 5), "auto", "(?s)no usable image.*data.kind says if these"),
        (
            np.zeros((9, 2**20 + 1), np.uint8),
            "vector",
            "no bundle can be of such vectors: natural.0 Input should be less",
        ),
    ],
)
def test_arrays_that_are_no_rows_are_refused(tmp_path, array, kind, says):
    with pytest.raises((DataFormatError, SplitError), match=says):
        load(saved(tmp_path / "a.npy", array), kind=kind)


def test_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1.0, {}]], dtype=object), allow_pickle=True)
    with pytest.raises(DataFormatError, match=r"not an \.npy file of plain numbers"):
        load(tmp_path / "a.npy", kind="vector")


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_images_are_no_vectors(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(DataFormatError, match=r"data\.kind = 'vector': these are images"):
        load_dataset(DataConfig(source=source, kind="vector"))
    with pytest.raises(DataFormatError, match=r"data\.label = '3' says nothing here"):
        load_dataset(DataConfig(source=source, label=3))


def test_too_few_rows_are_called_by_their_kind(tmp_path):
    with pytest.raises(SplitError, match="5 usable vectors are too few"):
        load(saved(tmp_path / "a.npy", NUMBERS[:5]))


def test_nothing_there(tmp_path):
    with pytest.raises(DataNotFound, match="no such file or folder"):
        load(tmp_path / "a.csv")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=60, max_size=60))
def test_texts_of_float32_come_back(tmp_path_factory, numbers):
    rows = np.array(numbers, dtype=np.float32).reshape(20, 3)
    path = written(tmp_path_factory.mktemp("csv") / "a.csv", lines([[str(x) for x in row] for row in rows], NAMES))
    try:
        dataset = load(path)
    except SplitError:  # too many equal rows
        return
    np.testing.assert_array_equal(dataset.pixels(range(20))[:, 0, 0], rows)
