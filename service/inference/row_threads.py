"""Plain threads that share the batches of one large run; which CPUs they compute on is the kernel's business.

A session of one thread computes on one CPU, so that a caller whose requests come one after the other would leave all
other CPUs idle. A row's result does not depend on the rows beside it, so no caller can tell that its rows were divided.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class RowThreads:
    """Divides a run over at most ``count`` threads, the caller's among them. Safe to call from several threads.

    >>> RowThreads(2).run([lambda: "a", lambda: "b", lambda: "c"], threads=2)
    ['a', 'b', 'c']
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = self._new_pool()

    def run(self, works: Sequence[Callable[[], T]], threads: int) -> list[T]:
        """Return the results of all works in their order, computed by this thread and at most ``threads`` − 1 more.

        Each thread takes the next work as soon as it is free, and this one does not wait for threads that have not
        begun. What a work raises is raised once no thread computes any more. If no further thread can be started, the
        threads that there are do all works.
        """
        if threads == 1:
            return [work() for work in works]
        results: dict[int, T] = {}
        numbers = iter(range(len(works)))  # shared: the interpreter lock gives each number to one thread

        def take_works() -> None:
            try:
                for number in numbers:
                    results[number] = works[number]()
            finally:
                deque(numbers, maxlen=0)  # after a fault nothing more is begun

        helpers: list[Future[None]] = []
        with suppress(RuntimeError):  # no thread can be started
            helpers.extend(self._pool.submit(take_works) for _ in range(threads - 1))
        try:
            take_works()
        finally:
            begun = [future for future in helpers if not future.cancel()]
            wait(begun)
        for future in begun:
            future.result()  # raises what its work has raised
        return [results[number] for number in range(len(works))]

    def end_threads(self) -> None:
        """End the threads, which a process must not have when it is forked; later runs start new ones."""
        self._pool.shutdown()
        self._pool = self._new_pool()

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max(1, self.count - 1), thread_name_prefix="rows")
