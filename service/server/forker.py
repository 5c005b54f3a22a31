"""The supervisor's way to a new worker: it asks the nursery (service/server/nursery.py), and has another where that is
gone.

The first nursery is a fork of the supervisor's process before that has a second thread or an event loop, and so has
what the command line has imported. Later ones are fresh interpreters.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import NamedTuple

import orjson

from service.errors import WorkerFailed
from service.logs import get_logger
from service.server.adoption import Child
from service.server.channel import MOST_BYTES, Message, connected_pair, encode
from service.server.interpreters import fresh_interpreter


class Started(NamedTuple):
    """A nursery's process and this end of the line to it."""

    pid: int
    line: socket.socket

    def end(self) -> None:
        """End it, unless that has been done: once awaited its pid may be another's."""
        self.line.close()
        with suppress(ChildProcessError):
            if os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)


def fork_nursery() -> Started | None:
    """The first nursery. It returns from here too, and so does each worker, with None, when it is to end."""
    from service.server import nursery

    sys.stdout.flush()
    sys.stderr.flush()
    if nursery.threads_of_process() > 1:
        return spawn_nursery()
    ours, theirs = connected_pair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        nursery.main(theirs.detach())
        return None
    theirs.close()
    return Started(pid, ours)


def spawn_nursery() -> Started:
    """Another one. Raises OSError: no process is to be had."""
    ours, theirs = connected_pair()
    with theirs:
        theirs.set_inheritable(True)
        command = fresh_interpreter("service.server.nursery", theirs.fileno())
        return Started(os.posix_spawn(command[0], command, os.environ), ours)


class Forker:
    """Gets workers from a nursery: the one that is there, or another. Made and used where an event loop runs.

    Arguments: ``first`` nursery; ``orders`` of every nursery; ``patience`` in seconds, in which one that has loaded all
    must fork a worker, None: for ever. ``bundles``: their digests by NAME/VERSION as the first nursery found them,
    None until then.
    """

    def __init__(self, first: Started | None, orders: Message, patience: float | None) -> None:
        self.bundles: dict[str, str] | None = None
        self._orders, self._patience = orders, patience
        self._turn, self._ended = asyncio.Lock(), False
        self._nursery = None if first is None else self._know(first)

    async def fork(self, end: socket.socket) -> Child:
        """A new worker that has a copy of ``end``.

        Raises:
            OSError: no process is to be had, or the nursery is gone.
            WorkerFailed: the bundles cannot be loaded; the text says why.
        """
        async with self._turn:
            if self._ended:
                raise OSError("no more workers are forked")
            if self._nursery is None:
                self._nursery = self._know(spawn_nursery())
            nursery = self._nursery
            try:
                await self._prepare(nursery)
                return Child(await asyncio.wait_for(nursery.fork(end), self._patience))
            except TimeoutError:
                self._drop()
                raise OSError("the nursery does not answer") from None
            except (ConnectionError, WorkerFailed):
                self._drop()
                raise

    async def _prepare(self, nursery: _Nursery) -> None:
        """Wait until it has loaded everything."""
        if nursery.prepared:
            return
        await nursery.tell({**self._orders, "bundles": self.bundles})
        answer = await nursery.answer()
        if answer["kind"] == "failed":
            raise WorkerFailed(answer["text"])
        self.bundles, nursery.prepared = answer["bundles"], True

    def _know(self, started: Started) -> _Nursery:
        nursery = _Nursery(started)
        nursery.watcher = asyncio.create_task(self._watch(nursery))
        return nursery

    async def _watch(self, nursery: _Nursery) -> None:
        """Workers live on without it; the next one needs another."""
        code = await nursery.child.wait()
        if nursery is self._nursery and not self._turn.locked():  # else whoever waits for it is told
            if not self._ended:
                get_logger().error("nursery ended", pid=nursery.child.pid, exit_code=code)
            self._drop()

    def _drop(self) -> None:
        if self._nursery is not None:
            self._nursery.child.kill()
            self._nursery.line.close()
            self._nursery = None

    def end(self) -> None:
        """Fork no more workers; who waits for one is told."""
        self._ended = True
        if self._nursery is not None:
            self._nursery.child.kill()  # and not its line closed: a closed socket wakes nobody

    async def ended(self) -> None:
        """Wait until no nursery is left."""
        if self._nursery is not None and self._nursery.watcher is not None:
            await self._nursery.watcher
            self._drop()


class _Nursery:
    """This side of one nursery."""

    def __init__(self, started: Started) -> None:
        self.child, self.prepared = Child(started.pid), False
        self.watcher: asyncio.Task[None] | None = None
        self.line = started.line

    async def tell(self, message: Message) -> None:
        await asyncio.get_running_loop().sock_sendall(self.line, encode(message))

    async def answer(self) -> Message:
        """What it says next. Raises ConnectionError: it has ended."""
        data = await asyncio.get_running_loop().sock_recv(self.line, MOST_BYTES)
        if not data:
            raise ConnectionError("the nursery has ended")
        answer: Message = orjson.loads(data)
        return answer

    async def fork(self, end: socket.socket) -> int:
        """The pid of a new worker. Raises OSError: no process is to be had; ConnectionError: see ``answer``."""
        socket.send_fds(self.line, [encode({"kind": "fork"})], [end.fileno()])
        answer = await self.answer()
        if answer["kind"] == "failed":
            raise OSError(answer["text"])
        pid: int = answer["pid"]
        return pid
