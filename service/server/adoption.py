"""Child processes known by their pid, those that another process has forked for this one too. Linux only.

A process whose parent has ended goes to the nearest ancestor that is a reaper of orphans (prctl(2)). So the supervisor
becomes the parent of its workers, learns their exit codes, and keeps them when the nursery that forked them is gone.
A process is signalled and awaited by a descriptor (pidfd_open(2)): no other process can be meant, whatever its pid.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose own parent has ended. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"orphaned workers cannot be adopted: {os.strerror(number)}")


def end_children() -> None:
    """Kill and await all children, those too that this process has adopted and never heard of.

    A worker is such an orphan if the nursery dies between the fork and its telling of it.
    """
    while children := _children():
        for pid in children:
            os.kill(pid, signal.SIGKILL)  # nobody else waits for it: if it is dead its pid is still its own
            os.waitpid(pid, 0)


def _children() -> list[int]:
    """Pids of this process's children, dead ones included. None where the kernel does not list them (proc(5))."""
    found: list[int] = []
    for each in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended meanwhile
            found += map(int, each.read_text().split())
    return found


class Child:
    """A child of this process, dead or alive, that nobody else waits for. Made where an event loop runs.

    Raises OSError: there is no such child.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._loop = asyncio.get_running_loop()
        self._descriptor = os.pidfd_open(pid)
        self._exit_code: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self._descriptor, self._reap)

    def send_signal(self, signum: int) -> None:
        """Nothing happens to one that has ended."""
        if not self._exit_code.done():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signum)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit code once it has ended, or minus the signal that ended it."""
        return await asyncio.shield(self._exit_code)

    def _reap(self) -> None:
        """Called when it has ended."""
        self._loop.remove_reader(self._descriptor)
        ended = os.waitid(os.P_PIDFD, self._descriptor, os.WEXITED)
        os.close(self._descriptor)
        assert ended is not None
        self._exit_code.set_result(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)
