"""What a request wants computed, apart from how it is asked and answered, so that requests can be computed together."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """``run`` of ``rows`` [N,…], N ≥ 1, where a row's results are bitwise the same whatever rows are beside it.

    Rows of jobs of one ``key`` may be computed in one run; results are arrays along the rows, and tuples and
    dictionaries of these.
    """

    key: Hashable
    rows: np.ndarray
    run: Callable[[np.ndarray], Any]


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


def rows_of(result: Any, at: slice) -> Any:
    """Some rows of a job's result; what is no array (a number that all share, None) as it is."""
    if isinstance(result, np.ndarray):
        return result[at]
    if isinstance(result, dict):
        return {name: rows_of(each, at) for name, each in result.items()}
    if isinstance(result, tuple):
        parts = [rows_of(each, at) for each in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return result
