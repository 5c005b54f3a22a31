"""Jobs: what a request has computed, apart from how it is read and answered, so that requests share a batch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class RequestReader(NamedTuple):
    """How a request is read whose address, query, Content-Type, Accept and length are those of one before.

    ``read`` gives its rows, or None where such a body must be looked at as any other; ``answer`` makes the answer's
    body and media type of the job's result. ``key`` and ``run`` are the job's.
    """

    key: Hashable
    read: Callable[[bytes], np.ndarray | None]
    run: Callable[[np.ndarray], Any]
    answer: Callable[[Any], tuple[bytes, str]]


class Job(NamedTuple):
    """``run`` of ``rows`` [N,…], N ≥ 1, where a row's results are bitwise the same whatever rows are beside it.

    Rows of jobs of one ``key`` may be computed in one run; results are arrays along the rows, and tuples and
    dictionaries of these. ``reader`` reads requests that differ from this one in their rows alone, if there is one.
    """

    key: Hashable
    rows: np.ndarray
    run: Callable[[np.ndarray], Any]
    reader: RequestReader | None = None


Work = Generator[Job, Any, T]
"""A generator that reads a request, yields jobs, is sent their results, and returns the answer."""


def finish(work: Work[T]) -> T:
    """Run the work to its answer, each job alone and on this thread."""
    try:
        job = next(work)
        while True:
            job = work.send(job.run(job.rows))
    except StopIteration as done:
        answer: T = done.value
        return answer


def parts_of(result: Any, at: Sequence[slice]) -> list[Any]:
    """Cut a job's result into the rows of each slice of ``at``; what is no array (a number, None) goes to each part."""
    if isinstance(result, np.ndarray):
        return [result[rows] for rows in at]
    if isinstance(result, dict):
        return [dict(zip(result, part, strict=True)) for part in _zipped(result.values(), at)]
    if isinstance(result, tuple):
        make = getattr(result, "_make", tuple)
        return [make(part) for part in _zipped(result, at)]
    return [result] * len(at)


def _zipped(results: Iterable[Any], at: Sequence[slice]) -> Iterator[tuple[Any, ...]]:
    """For each slice of ``at``, that slice of every result."""
    columns = [parts_of(result, at) for result in results]
    return zip(*columns, strict=True) if columns else repeat((), len(at))
