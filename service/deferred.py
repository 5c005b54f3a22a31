"""What many requests have in common is done once, at the end of a turn of the event loop, and not in every turn."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar
from weakref import WeakSet

PAUSE_SECONDS = 0.01  # from one handing on to the next: turns of few requests cost as much as those of many

T = TypeVar("T")


class Gathered(Generic[T]):
    """Items that are handed on together. Safe among threads.

    That is when the event loop turns, or PAUSE_SECONDS after the last time if that is later; at once where no loop
    runs.
    """

    def __init__(self, hand_on: Callable[[list[T]], None]) -> None:
        self._hand_on = hand_on
        self._items: deque[T] = deque()
        self._waits_for: asyncio.AbstractEventLoop | None = None
        self._not_before = 0.0
        _KNOWN.add(self)

    def add(self, item: T) -> None:
        """One more."""
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
        """Hand on what was gathered."""
        self._waits_for = None
        items: list[T] = []
        with suppress(IndexError):  # another thread may take the last one
            while True:
                items.append(self._items.popleft())
        if items:
            self._not_before = time.monotonic() + PAUSE_SECONDS
            self._hand_on(items)


_KNOWN: WeakSet[Gathered] = WeakSet()


def flush_all() -> None:
    """Hand on what is gathered anywhere: nothing may wait when the process ends."""
    for each in list(_KNOWN):
        each.flush()
