"""A bounded pool of worker threads: work is refused at once rather than queued for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from service.errors import ClientGone, DeadlineExceeded, Overloaded

LOOK_AFTER = 0.05
GONE = "the client closed the connection"

T = TypeVar("T")
Gone = Callable[[], Awaitable[None]]
"""Returns when the client has left."""


class WorkerPool:
    """Runs blocking work of requests on ``concurrency`` threads; at most ``queue`` more may wait.

    A slot is held until the work has really ended, also when its caller has given up: threads cannot be killed, so an
    abandoned computation must keep others out rather than pile up.
    """

    def __init__(self, concurrency: int, queue: int, timeout: float) -> None:
        self._executor = ThreadPoolExecutor(concurrency, thread_name_prefix="vaeserve")
        self.concurrency, self.capacity = concurrency, concurrency + queue
        self.timeout = timeout
        self.pending = 0

    async def run(self, work: Callable[[], T], gone: Gone) -> T:
        """The result of ``work()``; ``gone()`` returns when the client has left.

        Raises:
            Overloaded: every thread is busy and the queue is full.
            DeadlineExceeded, ClientGone: as ``wait`` does.
        """
        self.enter()
        loop = asyncio.get_running_loop()
        try:
            future = self.start(work)
        except Overloaded:
            self.leave()
            raise
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self.leave))
        return await self.wait(asyncio.wrap_future(future), gone)

    async def wait(self, result: asyncio.Future[T], gone: Gone) -> T:
        """The result, which is cancelled when nobody waits for it any more; a client is missed after LOOK_AFTER s.

        Raises:
            DeadlineExceeded: none within the timeout.
            ClientGone: the client has left; work that had not begun never runs.
        """
        deadline = asyncio.get_running_loop().time() + self.timeout
        try:
            # Most results are here before a look at the client would be worth its cost.
            await asyncio.wait({result}, timeout=min(LOOK_AFTER, self.timeout))
            return result.result() if result.done() else await self._watched(result, gone, deadline)
        finally:
            result.cancel()

    async def _watched(self, result: asyncio.Future[T], gone: Gone, deadline: float) -> T:
        watcher = asyncio.ensure_future(gone())
        waited: set[asyncio.Future[Any]] = {result, watcher}
        try:
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait(waited, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            if watcher.done():
                raise ClientGone(GONE)
            raise self.late()
        finally:
            watcher.cancel()

    def late(self) -> DeadlineExceeded:
        """What is to be said after ``timeout`` seconds."""
        return DeadlineExceeded(f"no answer within {self.timeout:g} s (setting request_timeout)")

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Have it run for requests that hold their slots already. Raises Overloaded once the pool is closed."""
        try:
            return self._executor.submit(work)
        except RuntimeError as error:
            raise Overloaded("the service is stopping") from error

    def enter(self) -> None:
        """Take a slot. Raises Overloaded: there is none."""
        if self.pending >= self.capacity:
            raise Overloaded(f"all threads are busy and {self.capacity} requests are in the house: try again later")
        self.pending += 1

    def leave(self, requests: int = 1) -> None:
        """Give back the slots of so many requests."""
        self.pending -= requests

    def close(self) -> None:
        """Wait for work in progress, drop what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)
