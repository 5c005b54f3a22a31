"""What many requests of one turn of the event loop have in common is done once, at its end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Gathered(Generic[T]):
    """Items that are handed on together when the event loop turns, or at once where none runs. Safe among threads."""

    def __init__(self, hand_on: Callable[[list[T]], None]) -> None:
        self._hand_on = hand_on
        self._items: deque[T] = deque()
        self._waits_for: asyncio.AbstractEventLoop | None = None

    def add(self, item: T) -> None:
        """One more."""
        self._items.append(item)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if loop is not self._waits_for:  # that may have ended without another turn
            self._waits_for = loop
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Hand on what was gathered."""
        self._waits_for = None
        items: list[T] = []
        while self._items:
            items.append(self._items.popleft())
        if items:
            self._hand_on(items)
