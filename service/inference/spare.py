"""CPUs that stand idle, lent to a run that is large enough to be divided.

Processes of one thread each answer most requests a second (service/server/layouts.py), yet a caller whose requests come
one after the other has one CPU then, and the others wait for nothing. So every worker says here that it computes, and
one that has much to do divides its rows over the CPUs that are left (service/inference/batch_invariance.py). A row's
result does not depend on the rows beside it, so nobody can tell.

A thread that helps looks before each batch whether its CPU is wanted back. So an owner that gets work shares its CPU
for the rest of one batch, and where two workers take the same CPU at one moment it is given back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from service.resources import available_cpus
from service.server.mapped import BYTES, map_numbers

RECENT = 20_000_000  # ns since its last run in which a worker is taken to be at work: on what follows, or on HTTP
BUSY, LAST, TOLD = 0, 1, 2  # what a worker tells: the CPUs that its runs have now, and when the last run ended

T = TypeVar("T")


class SpareCpus:
    """What one process has to itself, ``threads`` CPUs, and after ``join`` those of the other workers while they idle.

    Safe to call from several threads.

    >>> SpareCpus(1).free(), SpareCpus(4).free()
    (0, 3)
    """

    def __init__(self, threads: int) -> None:
        self._own = self._cpus = threads
        self._board, self._mine = memoryview(bytearray(TOLD * BYTES)).cast("q"), 0
        self._busy, self._lock = 0, threading.Lock()
        self._lent = threading.local()
        self._threads = ThreadPoolExecutor(max(1, threads - 1), thread_name_prefix="spare")

    def join(self, file: Path, worker: int, workers: int) -> None:
        """Share the CPUs of so many workers, this one's among them: of each as many as its own, or all that there are.

        ``file`` is what they tell each other by. Raises OSError where it cannot be had.
        """
        board, mine = map_numbers(file, workers * TOLD), worker * TOLD
        board[mine + BUSY] = board[mine + LAST] = 0  # of a dead worker in this place
        self._board, self._mine = board, mine
        self._cpus = min(self._own * workers, max(self._own, available_cpus()))
        self._threads = ThreadPoolExecutor(max(1, self._cpus - 1), thread_name_prefix="spare")

    def begin(self) -> None:
        """A run begins, on the CPUs that are this process's own."""
        self._take(self._own)

    def end(self) -> None:
        """Such a run has ended."""
        self._board[self._mine + LAST] = time.monotonic_ns()
        self._take(-self._own)

    def free(self) -> int:
        """How many threads may help with a run that has begun."""
        return max(0, self._cpus - self._used() + self._own - 1)

    def run(self, works: Sequence[Callable[[], T]], helpers: int) -> list[T]:
        """The results of all works, in their order; raises what one of them does.

        This thread does one after the other, and so do at most so many others, which stop where CPUs are wanted. It
        waits for no more than what has begun.
        """
        results: dict[int, T] = {}
        line = iter(range(len(works)))  # each number is one thread's

        def help_out(lent: int) -> float:
            began = time.thread_time()
            self._take(lent)
            try:
                while self._used() <= self._cpus and (number := next(line, None)) is not None:
                    results[number] = works[number]()
            finally:
                self._take(-lent)
            return time.thread_time() - began

        offered = self._offer(help_out, helpers)
        try:
            for number in line:
                results[number] = works[number]()
        finally:
            deque(line, maxlen=0)  # nothing more is begun where this thread has failed
            begun = [future for future in offered if not future.cancel()]
            wait(begun)
        self._lent.seconds = self._seconds + sum([future.result() for future in begun])
        return [results[number] for number in range(len(works))]

    def clock(self) -> float:
        """CPU time of this thread, and of those that have helped it (``run``), in seconds."""
        return time.thread_time() + self._seconds

    @property
    def _seconds(self) -> float:
        return getattr(self._lent, "seconds", 0.0)

    def _offer(self, help_out: Callable[[int], float], helpers: int) -> list[Future[float]]:
        """Have so many threads help, as far as there are any; told each whether its CPU is lent by another process."""
        offered: list[Future[float]] = []
        with suppress(RuntimeError):  # no thread can be started
            offered.extend(self._threads.submit(help_out, int(number >= self._own)) for number in range(1, helpers + 1))
        return offered

    def _used(self) -> int:
        """CPUs that are computed on, or speak HTTP, by all workers."""
        recent = time.monotonic_ns() - RECENT
        used, board = self._busy, self._board
        for other in range(0, len(board), TOLD):
            if other != self._mine:
                used += board[other + BUSY] or (self._own if board[other + LAST] > recent else 0)
        return used

    def _take(self, cpus: int) -> None:
        with self._lock:
            self._busy += cpus
            self._board[self._mine + BUSY] = self._busy
