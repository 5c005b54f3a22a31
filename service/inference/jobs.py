"""What a request wants computed, apart from how it is asked and answered, so that requests can be computed together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Again(NamedTuple):
    """How a request goes on whose head is that of one before, and whose body is as long: that is not looked at anew.

    ``read`` gives its rows, or None where such a body is to be looked at as any other; ``answer`` is what is made of
    the job's result.
    """

    key: Hashable
    read: Callable[[bytes], np.ndarray | None]
    run: Callable[[np.ndarray], Any]
    answer: Callable[[Any], tuple[bytes, str]]


class Job(NamedTuple):
    """``run`` of ``rows`` [N,…], N ≥ 1, where a row's results are bitwise the same whatever rows are beside it.

    Rows of jobs of one ``key`` may be computed in one run; results are arrays along the rows, and tuples and
    dictionaries of these. ``again`` tells of requests like this one, where their heads alone say what they ask for.
    """

    key: Hashable
    rows: np.ndarray
    run: Callable[[np.ndarray], Any]
    again: Again | None = None


Work = Generator[Job, Any, T]
"""Reads a request, yields jobs and is sent their results, returns the answer."""


def finish(work: Work[T]) -> T:
    """The work's answer, each job computed alone and on this thread."""
    try:
        job = next(work)
        while True:
            job = work.send(job.run(job.rows))
    except StopIteration as done:
        answer: T = done.value
        return answer


def parts_of(result: Any, at: Sequence[slice]) -> list[Any]:
    """A job's result cut into those rows each; what is no array (a number that all share, None) goes to each part."""
    if isinstance(result, np.ndarray):
        return [result[rows] for rows in at]
    if isinstance(result, dict):
        return [dict(zip(result, part, strict=True)) for part in _zipped(result.values(), at)]
    if isinstance(result, tuple):
        make = getattr(result, "_make", tuple)
        return [make(part) for part in _zipped(result, at)]
    return [result] * len(at)


def _zipped(results: Iterable[Any], at: Sequence[slice]) -> Iterator[tuple[Any, ...]]:
    """Of each part of ``at``, what each of the results has of it."""
    columns = [parts_of(each, at) for each in results]
    return zip(*columns, strict=True) if columns else repeat((), len(at))
