"""Jobs: the computation of a request, apart from how it is read and answered, so that several share a batch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class RequestReader(NamedTuple):
    """Reads a request whose address, query, Content-Type, Accept and length are those of one before.

    ``read`` returns its rows, or None if this body must be read as any other; ``answer`` makes the answer's body and
    media type from the job's result. ``key`` and ``run`` are those of the job.
    """

    key: Hashable
    read: Callable[[bytes], np.ndarray | None]
    run: Callable[[np.ndarray], Any]
    answer: Callable[[Any], tuple[bytes, str]]


class Job(NamedTuple):
    """A computation: ``run`` is to be called with ``rows`` [N,…], N ≥ 1.

    Rows of jobs of one ``key`` may be computed in one run, since a row's results are bitwise the same whatever rows are
    beside it. Results are arrays along the rows, and tuples and dictionaries of these. ``reader``, if there is one,
    reads requests that differ from this one in their rows alone.
    """

    key: Hashable
    rows: np.ndarray
    run: Callable[[np.ndarray], Any]
    reader: RequestReader | None = None


Work = Generator[Job, Any, T]
"""A generator that reads a request, yields jobs, is sent their results, and returns the answer."""


def finish(work: Work[T]) -> T:
    """Run the work to its answer, each job by itself and on the calling thread."""
    try:
        job = next(work)
        while True:
            job = work.send(job.run(job.rows))
    except StopIteration as done:
        answer: T = done.value
        return answer


def split_result(result: Any, slices: Sequence[slice]) -> list[Any]:
    """Split a job's result into the rows of each slice; what is no array (a number, None) goes to each part."""
    if isinstance(result, np.ndarray):
        return [result[rows] for rows in slices]
    if isinstance(result, dict):
        return [dict(zip(result, part, strict=True)) for part in _split_each(result.values(), slices)]
    if isinstance(result, tuple):
        make = getattr(result, "_make", tuple)
        return [make(part) for part in _split_each(result, slices)]
    return [result] * len(slices)


def _split_each(results: Iterable[Any], slices: Sequence[slice]) -> Iterator[tuple[Any, ...]]:
    """Return, for each slice, that slice of every result."""
    columns = [split_result(result, slices) for result in results]
    return zip(*columns, strict=True) if columns else repeat((), len(slices))
