"""Splits: disjoint, complete, exact in size, the same everywhere, never parting equal images."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.data.splits import number_groups, split, split_with_test
from training.errors import SplitError

FRACTIONS = {"validation": 0.05, "calibration": 0.05, "test": 0.10}


def test_sizes_are_exact_and_parts_disjoint():
    parts = split(np.arange(1797), FRACTIONS, seed=0)
    assert {name: len(indices) for name, indices in parts.items()} == {
        "train": 1437,
        "validation": 90,
        "calibration": 90,
        "test": 180,
    }
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1797))


def test_splits_never_change():
    """Written out once: these must hold on every machine and with every later NumPy."""
    parts = split(np.arange(40), FRACTIONS, seed=7)
    assert parts["validation"].tolist() == [17, 37]
    assert parts["calibration"].tolist() == [34, 18]
    assert parts["test"].tolist() == [32, 1, 22, 2]
    assert parts["train"][:5].tolist() == [9, 36, 29, 21, 13]
    assert split(np.arange(40), FRACTIONS, seed=8)["test"].tolist() != parts["test"].tolist()


@given(
    groups=st.lists(st.integers(0, 60), min_size=60, max_size=200).map(np.array),
    seed=st.integers(0, 2**32 - 1),
)
def test_equal_images_stay_together(groups, seed):
    try:
        parts = split(groups, FRACTIONS, seed)
    except SplitError:
        return
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(len(groups)))
    where = [set(groups[indices].tolist()) for indices in parts.values()]
    assert sum(map(len, where)) == len(set(groups.tolist()))
    for name, fraction in FRACTIONS.items():
        assert 0 < len(parts[name]) <= int(fraction * len(groups) + 0.5)


def test_a_few_copies_leave_the_sizes_exact():
    groups = np.concatenate([np.arange(300), np.arange(50), np.zeros(30, dtype=np.int64)])
    parts = split(groups, FRACTIONS, seed=0)
    assert [len(parts[name]) for name in FRACTIONS] == [19, 19, 38]


def test_the_official_test_part_stays_whole():
    is_test = np.arange(70) >= 60
    parts = split_with_test(np.arange(70), is_test, FRACTIONS, seed=0)
    assert sorted(parts["test"].tolist()) == list(range(60, 70))
    assert parts["test"].tolist() != list(range(60, 70)), "a prefix of the test part must be a random sample of it"
    assert {name: len(indices) for name, indices in parts.items()} == {
        "train": 54,
        "validation": 3,
        "calibration": 3,
        "test": 10,
    }
    assert max(parts["train"].max(), parts["validation"].max(), parts["calibration"].max()) < 60


def test_copies_of_the_official_test_part_are_in_no_other_split():
    groups = np.concatenate([np.arange(60), np.arange(5), [70, 71, 71, 72, 73]])
    parts = split_with_test(groups, np.arange(70) >= 60, FRACTIONS, seed=0)
    assert sorted(parts["test"].tolist()) == list(range(60, 70)), "its own copies stay: the part is kept whole"
    rest = np.concatenate([indices for name, indices in parts.items() if name != "test"])
    assert sorted(rest.tolist()) == list(range(5, 60))


@pytest.mark.parametrize("count", [0, 1, 9])
def test_too_few_images_are_counted(count):
    with pytest.raises(SplitError, match=f"{count} usable images are too few .* at least 10 needed"):
        split(np.arange(count), FRACTIONS, seed=0)


def test_ten_images_are_enough():
    assert [len(part) for part in split(np.arange(10), FRACTIONS, seed=0).values()] == [7, 1, 1, 1]


def test_copies_of_one_image_cannot_be_split():
    with pytest.raises(SplitError, match="100 images hold only 1 different"):
        split(np.zeros(100, dtype=np.int64), FRACTIONS, seed=0)


def test_a_test_part_that_is_gone_is_named():
    with pytest.raises(SplitError, match="test part"):
        split_with_test(np.arange(50), np.zeros(50, dtype=bool), FRACTIONS, seed=0)


def test_groups_are_numbered_by_first_occurrence():
    digests = np.array([[7, 7], [1, 2], [7, 7], [0, 0], [1, 2]], dtype=np.uint8)
    assert number_groups(digests).tolist() == [0, 1, 0, 2, 1]
