"""Writing that many requests share: log lines and metrics are written together, once in many requests."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar
from weakref import WeakSet

PAUSE_SECONDS = 0.01  # between two writes: one of few items costs as much as one of many

T = TypeVar("T")


class DeferredWriter(Generic[T]):
    """Collects items and writes them together. Safe to call from several threads.

    It writes in the event loop's next iteration, but not before PAUSE_SECONDS after the last time; at once where no
    event loop runs.
    """

    def __init__(self, write: Callable[[list[T]], None]) -> None:
        self._write = write
        self._items: deque[T] = deque()
        self._waits_for: asyncio.AbstractEventLoop | None = None
        self._not_before = 0.0
        _WRITERS.add(self)

    def add(self, item: T) -> None:
        """Queue an item for the next write."""
        self._items.append(item)
        waits_for = self._waits_for
        if waits_for is not None and waits_for.is_running():  # it will flush, this item too
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        self._waits_for = loop  # the one before may have ended without another turn
        pause = self._not_before - time.monotonic()
        if pause > 0:
            loop.call_later(pause, self.flush)
        else:
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what is queued."""
        self._waits_for = None
        items: list[T] = []
        with suppress(IndexError):  # another thread may take the last one
            while True:
                items.append(self._items.popleft())
        if items:
            self._not_before = time.monotonic() + PAUSE_SECONDS
            self._write(items)


_WRITERS: WeakSet[DeferredWriter] = WeakSet()


def flush_all() -> None:
    """Write what is queued by any writer: nothing may wait when the process ends."""
    for writer in list(_WRITERS):
        writer.flush()
