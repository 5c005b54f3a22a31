"""A bounded pool of worker threads: work is refused at once rather than queued for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from service.errors import ClientGone, DeadlineExceeded, Overloaded

T = TypeVar("T")


class WorkerPool:
    """Runs blocking work of requests on ``concurrency`` threads; at most ``queue`` more may wait.

    A slot is held until the work has really ended, also when its caller has given up: threads cannot be killed, so an
    abandoned computation must keep others out rather than pile up.
    """

    def __init__(self, concurrency: int, queue: int, timeout: float) -> None:
        self._executor = ThreadPoolExecutor(concurrency, thread_name_prefix="vaeserve")
        self._capacity = concurrency + queue
        self._timeout = timeout
        self.pending = 0

    async def run(self, work: Callable[[], T], gone: Callable[[], Awaitable[None]]) -> T:
        """The result of ``work()``; ``gone()`` returns when the client has left.

        Raises:
            Overloaded: every thread is busy and the queue is full.
            DeadlineExceeded: no result within the timeout.
            ClientGone: nobody waits any more; work that had not begun never runs.
        """
        if self.pending >= self._capacity:
            raise Overloaded(f"all threads are busy and {self._capacity} requests are in the house: try again later")
        future = self._submit(work)
        result = asyncio.wrap_future(future)
        watcher = asyncio.ensure_future(gone())
        waited: set[asyncio.Future[Any]] = {result, watcher}
        try:
            await asyncio.wait(waited, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if result.done():
                return result.result()
            if watcher.done():
                raise ClientGone("the client closed the connection")
            raise DeadlineExceeded(f"no answer within {self._timeout:g} s (setting request_timeout)")
        finally:
            watcher.cancel()
            result.cancel()

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        loop = asyncio.get_running_loop()
        self.pending += 1
        future = self._executor.submit(work)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._release))
        return future

    def _release(self) -> None:
        self.pending -= 1

    def close(self) -> None:
        """Wait for work in progress, drop what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)
