"""A bounded pool of worker threads: work is refused at once rather than queued for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from service.errors import ClientDisconnected, DeadlineExceeded, Overloaded

WATCH_AFTER = 0.05  # seconds: most results are there before a look at the client would be worth its cost

T = TypeVar("T")
WaitForDisconnect = Callable[[], Awaitable[None]]
"""Returns when the client has closed its connection."""


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

    async def run(self, work: Callable[[], T], disconnected: WaitForDisconnect) -> T:
        """The result of ``work()``; ``disconnected()`` returns when the client has closed its connection.

        Raises:
            Overloaded: every thread is busy and the queue is full.
            DeadlineExceeded, ClientDisconnected: as ``wait`` does.
        """
        self.acquire()
        loop = asyncio.get_running_loop()
        try:
            future = self.start(work)
        except Overloaded:
            self.release()
            raise
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self.release))
        return await self.wait(asyncio.wrap_future(future), disconnected)

    async def wait(self, result: asyncio.Future[T], disconnected: WaitForDisconnect) -> T:
        """The result, which is cancelled when nobody waits for it any more. The client is watched after
        WATCH_AFTER seconds.

        Raises:
            DeadlineExceeded: none within the timeout.
            ClientDisconnected: the client has left; work that had not begun never runs.
        """
        deadline = asyncio.get_running_loop().time() + self.timeout
        try:
            await asyncio.wait({result}, timeout=min(WATCH_AFTER, self.timeout))
            return result.result() if result.done() else await self._watched(result, disconnected, deadline)
        finally:
            result.cancel()

    async def _watched(self, result: asyncio.Future[T], disconnected: WaitForDisconnect, deadline: float) -> T:
        watcher = asyncio.ensure_future(disconnected())
        waited: set[asyncio.Future[Any]] = {result, watcher}
        try:
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait(waited, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            if watcher.done():
                raise ClientDisconnected("the client closed the connection")
            raise self.deadline_error()
        finally:
            watcher.cancel()

    def deadline_error(self) -> DeadlineExceeded:
        """The error of a request that has no answer after ``timeout`` seconds."""
        return DeadlineExceeded(f"no answer within {self.timeout:g} s (setting request_timeout)")

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` for requests that hold their slots already. Raises Overloaded once the pool is closed."""
        try:
            return self._executor.submit(work)
        except RuntimeError as error:
            raise Overloaded("the service is stopping") from error

    def acquire(self) -> None:
        """Take a slot. Raises Overloaded if there is none."""
        if self.pending >= self.capacity:
            raise Overloaded(f"all threads are busy and {self.capacity} requests are in the house: try again later")
        self.pending += 1

    def release(self, requests: int = 1) -> None:
        """Give back the slots of ``requests`` requests."""
        self.pending -= requests

    def close(self) -> None:
        """Wait for work in progress, drop what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)
