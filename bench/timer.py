"""Wake-ups to the microsecond: uvloop's own timers are of whole milliseconds, which is what is to be measured. Linux.

timerfd_create(2) through ctypes; Python has it since 3.13.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable

CLOCK_MONOTONIC = 1  # what time.perf_counter() reads on Linux
NONBLOCK = os.O_NONBLOCK
ABSOLUTE = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


_libc = ctypes.CDLL(None, use_errno=True)


class Timer:
    """Calls ``due`` on the running event loop, each time at the moment that ``at`` was given last."""

    def __init__(self, due: Callable[[], None]) -> None:
        self._loop, self._due = asyncio.get_running_loop(), due
        self._descriptor = _libc.timerfd_create(CLOCK_MONOTONIC, NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop.add_reader(self._descriptor, self._fire)

    def at(self, moment: float) -> None:
        """Fire at that moment of time.perf_counter(), or at once if it has passed."""
        nanoseconds = max(1, round(moment * 1e9))  # 0 would disarm it
        setting = _Setting(_Timespec(0, 0), _Timespec(*divmod(nanoseconds, 10**9)))
        if _libc.timerfd_settime(self._descriptor, ABSOLUTE, ctypes.byref(setting), None) < 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _fire(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:  # set anew since
            return
        self._due()

    def close(self) -> None:
        """Fire no more."""
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
