"""Deferred writing of log lines and metrics, so that those of many requests are written together."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar
from weakref import WeakSet

PAUSE_SECONDS = 0.01  # between two writes, since a write of few items takes as long as one of many

T = TypeVar("T")


class DeferredWriter(Generic[T]):
    """Collects items and hands them to ``write`` together; several threads may add items.

    It writes in the next iteration of the event loop, but not before PAUSE_SECONDS after the last write. Where no event
    loop runs, it writes at once.
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
        if waits_for is not None and waits_for.is_running():  # a flush is scheduled, which writes this item, too
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        self._waits_for = loop  # an earlier loop may have ended before its flush
        pause = self._not_before - time.monotonic()
        if pause > 0:
            loop.call_later(pause, self.flush)
        else:
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write the queued items now."""
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
    """Write the queued items of all writers, which must be done before the process ends."""
    for writer in list(_WRITERS):
        writer.flush()
