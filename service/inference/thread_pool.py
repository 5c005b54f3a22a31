"""A bounded pool of worker threads, which refuses work at once rather than queue it for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from service.errors import ClientDisconnected, DeadlineExceeded, Overloaded

WATCH_AFTER = 0.05  # seconds: most results come before a look at the client would be worth its cost

T = TypeVar("T")
WaitForDisconnect = Callable[[], Awaitable[None]]
"""An async function that returns when the client has closed its connection."""


class WorkerPool:
    """Runs blocking work of requests on ``concurrency`` threads, while at most ``queue`` more requests wait.

    A request has ``timeout`` seconds. Its slot is held until the work has really ended, also when its caller has given
    up: threads cannot be killed, so an abandoned computation must keep others out rather than pile up.
    """

    def __init__(self, concurrency: int, queue: int, timeout: float) -> None:
        self._executor = ThreadPoolExecutor(concurrency, thread_name_prefix="vaeserve")
        self.concurrency, self.capacity = concurrency, concurrency + queue
        self.timeout = timeout
        self.pending = 0

    async def run(self, work: Callable[[], T], disconnected: WaitForDisconnect) -> T:
        """Run ``work`` on a thread and return its result, as long as the client waits for it.

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
        """Wait for a result and return it; it is cancelled if nobody waits for it any more.

        Raises:
            DeadlineExceeded: there was no result within the timeout.
            ClientDisconnected: the client has closed the connection; work that had not begun never runs.
        """
        deadline = asyncio.get_running_loop().time() + self.timeout
        try:
            await asyncio.wait({result}, timeout=min(WATCH_AFTER, self.timeout))
            return result.result() if result.done() else await self._watched(result, disconnected, deadline)
        finally:
            result.cancel()

    async def _watched(self, result: asyncio.Future[T], disconnected: WaitForDisconnect, deadline: float) -> T:
        """Wait for a result while watching the client. Raises as ``wait``."""
        watcher = asyncio.ensure_future(disconnected())
        waited: set[asyncio.Future[Any]] = {result, watcher}
        try:
            remaining = max(0.0, deadline - asyncio.get_running_loop().time())
            await asyncio.wait(waited, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            if watcher.done():
                raise ClientDisconnected("the client closed the connection")
            raise self.deadline_error()
        finally:
            watcher.cancel()

    def deadline_error(self) -> DeadlineExceeded:
        """Make the error of a request that has no answer after ``timeout`` seconds."""
        return DeadlineExceeded(f"no answer within {self.timeout:g} s (setting request_timeout)")

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Start ``work`` for requests that hold their slots already. Raises Overloaded once the pool is closed."""
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
        """Give the slots of ``requests`` requests back."""
        self.pending -= requests

    def close(self) -> None:
        """Wait for the work in progress to end, and drop the work that has not begun."""
        self._executor.shutdown(wait=True, cancel_futures=True)
