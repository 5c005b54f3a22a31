"""Disjoint, seeded splits. The same seed and the same images give the same splits on every machine.

Randomness is numpy.random.RandomState, whose stream NumPy guarantees never to change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from training.errors import SplitError


def split(groups: np.ndarray, fractions: Mapping[str, float], seed: int, noun: str = "images") -> dict[str, np.ndarray]:
    """Split images 0 … N-1 into ``fractions`` and ``train``, which takes the rest.

    ``groups`` int64 [N] numbers equal images alike, so that no image stands in two splits: groups are visited in
    seeded order and each goes whole to the first split that still has room for it. A split of fraction f has room for
    ⌊f·N + ½⌋ images. Returns int64 indices by split, in seeded order: the first n of a split are a random sample of it.
    Raises SplitError, which calls them ``noun``, where a split would be empty.
    """
    total = len(groups)
    wanted = {name: math.floor(fraction * total + 0.5) for name, fraction in fractions.items()}
    _check_sizes(wanted, fractions, total, noun)
    members = _members(groups)
    room = dict(wanted)
    chosen: dict[str, list[np.ndarray]] = {name: [] for name in ("train", *fractions)}
    for group in np.random.RandomState(seed).permutation(len(members)):
        size = len(members[group])
        name = next((name for name, left in room.items() if left >= size), "train")
        if name != "train":
            room[name] -= size
        chosen[name].append(members[group])
    result = {name: np.concatenate(parts) for name, parts in chosen.items() if parts}
    _check_filled(result, chosen, f"{total} {noun}", len(members))
    return result


def split_with_test(
    groups: np.ndarray, is_test: np.ndarray, fractions: Mapping[str, float], seed: int
) -> dict[str, np.ndarray]:
    """As ``split``, where ``is_test`` bool [N] marks the test part that the data set came with; it is kept whole.

    Other images that equal one of it are in no split.
    """
    rest = np.flatnonzero(~np.isin(groups, groups[is_test]))
    parts = split(groups[rest], {name: part for name, part in fractions.items() if name != "test"}, seed)
    test = np.flatnonzero(is_test)
    if not len(test):
        raise SplitError(f"none of the {len(groups)} images is of the data set's test part; raise data.limit")
    return {name: rest[indices] for name, indices in parts.items()} | {
        "test": np.random.RandomState(seed).permutation(test)
    }


def number_groups(digests: np.ndarray) -> np.ndarray:
    """Group numbers int64 [N] of digests uint8 [N, D]: equal rows alike, numbered by first occurrence."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in digests], dtype=np.int64)


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Indices of each group; groups in order of first occurrence."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    parts = np.split(order.astype(np.int64), starts) if len(order) else []
    return sorted(parts, key=lambda part: int(part[0]))


def _check_sizes(wanted: Mapping[str, int], fractions: Mapping[str, float], total: int, noun: str) -> None:
    empty = [name for name, count in wanted.items() if count == 0]
    if empty or sum(wanted.values()) >= total:
        least = max(math.ceil(0.5 / fraction) for fraction in fractions.values())
        asked = ", ".join(f"{name} {fraction:g}" for name, fraction in fractions.items())
        raise SplitError(f"{total} usable {noun} are too few to split into {asked} and train: at least {least} needed")


def _check_filled(result: Mapping[str, np.ndarray], chosen: Mapping[str, list], total: str, distinct: int) -> None:
    empty = [name for name in chosen if name not in result]
    if empty:
        raise SplitError(
            f"nothing is left for {', '.join(empty)}: the {total} hold only {distinct} different ones, and "
            "equal ones are kept in one split"
        )
