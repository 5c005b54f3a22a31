"""Lasting connections spread evenly over the workers: one that was accepted where many are is handed over, unread.

The kernel spreads connections by a hash of their addresses, so that of four, two workers may have three and one, or
four and none, for as long as these last. A worker that has just accepted a connection, and has at least two more than
the worker with fewest, passes the socket on to that one (SCM_RIGHTS), which serves it as its own. Nothing has been read
of it: event loops read only once ``connection_made`` has returned. A connection that has begun stays where it is.

Where many connections end after few requests, new ones stay where they are, too: with one request a connection, handing
over took a sixth more CPU, and gained nothing.

What has been sent is kept open until the other has taken it: if that one ends before, it comes back and is served here.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from service.logs import get_logger
from service.server.limits import LimitedProtocol
from service.server.mapped import map_numbers

UNEVEN = 2  # connections more than another worker has; with one more, handing over would only turn it round
FEW_REQUESTS = 8  # fewer make a connection brief
BRIEF_SECONDS, MANY_BRIEF = 1.0, 16  # so many brief ones ended in that time: few are lasting ones
MESSAGE = struct.Struct("=qq")  # the sender's number, and which of its connections to this receiver it is
TAKEN = b"\0"  # what the receiver says when it has taken some; how many, the table says


class Table:
    """How many connections each of n workers has, and how many are on their way, in a file that all of them map.

    Each number has one writer:
    ``present`` [n], one more than the connections of each worker, 0 where none serves (a new file's content);
    ``sent`` [n, n], by receiver and sender, the number of the last connection sent;
    ``taken`` [n, n], the same, of the last one taken, written by the receiver.

    Raises OSError where the file cannot be had.
    """

    def __init__(self, path: Path, workers: int) -> None:
        rows = 2 * workers + 1
        flat = map_numbers(path, rows * workers)
        numbers = np.frombuffer(flat, np.int64).reshape(rows, workers)
        self.present, self.sent, self.taken = numbers[0], numbers[1 : workers + 1], numbers[workers + 1 :]
        self._rows = [flat[i : i + workers] for i in range(0, len(flat), workers)]  # quicker than numpy for few numbers
        self._workers = workers

    def fewest(self) -> int:
        """The least number of connections that a worker has, those on their way left out; 0 where none serves."""
        return min(filter(None, self._rows[0]), default=1) - 1

    def coming(self, worker: int) -> int:
        """How many connections are on their way to that worker."""
        return sum(self._rows[1 + worker]) - sum(self._rows[1 + self._workers + worker])

    def emptiest(self) -> tuple[int, int]:
        """The worker with fewest connections, with those that are on their way to it, and how many these are."""
        coming = (self.sent - self.taken).sum(axis=1)
        numbers = np.where(self.present > 0, self.present - 1 + coming, np.iinfo(np.int64).max)
        worker = int(numbers.argmin())
        return worker, int(numbers[worker])


class Link:
    """The way to one other worker, and the connections that it was sent and has not taken yet, by their number."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.kept: deque[tuple[int, socket.socket]] = deque()

    def release(self, taken: int) -> None:
        """Close what has been taken: the other has descriptors of its own."""
        while self.kept and self.kept[0][0] <= taken:
            self.kept.popleft()[1].close()


class Balance:
    """One worker's part: what it hands over, what it is handed. Everything happens on its event loop.

    ``folder`` is the workers' own, readable for this user alone; in it lie the table and a socket of each worker.
    """

    def __init__(self, folder: Path, number: int, workers: int) -> None:
        self._folder, self._number, self._workers = folder, number, workers
        self._is_open = self._has_left = False
        self._links: dict[int, Link] = {}
        self._ends: set[socket.socket] = set()
        self._arriving: set[asyncio.BaseProtocol] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._brief: deque[float] = deque(maxlen=MANY_BRIEF)

    def open(self, connections: Collection[Any], protocol: Callable[[], BalancedProtocol]) -> None:
        """Begin: ``connections`` are those being served, ``protocol()`` makes one for another connection.

        Where files or sockets are not to be had, connections stay where they are accepted, and the log says so.
        """
        self._loop = asyncio.get_running_loop()
        self._connections, self._protocol = connections, protocol
        try:
            self._table = Table(self._folder / "connections", self._workers)
            self._listening = self._listen()
        except OSError as error:
            get_logger().warning("connections stay where they are accepted", reason=str(error))
            return
        mine = self._number
        self._table.sent[:, mine] = self._table.taken[:, mine]  # nothing of a dead worker in this place is on its way
        self._loop.add_reader(self._listening, self._welcome)
        self._is_open = True
        self.changed()

    def changed(self) -> None:
        """Tell the others how many connections there are."""
        if self._is_open:
            self._table.present[self._number] = 0 if self._has_left else self._count() + 1

    def begun(self, protocol: asyncio.BaseProtocol) -> None:
        """A connection is being served here."""
        self._arriving.discard(protocol)
        self.changed()

    def ended(self, requests: int) -> None:
        """A connection that was served here has ended after so many answers."""
        if requests < FEW_REQUESTS:
            self._brief.append(self._loop.time())
        self.changed()

    def hand_over(self, transport: asyncio.BaseTransport) -> bool:
        """Whether a connection of which nothing was read is another's from now on; the transport is closed then."""
        if not self._is_open:
            return False
        here = self._count() + 1 + self._table.coming(self._number)
        if here - self._table.fewest() < UNEVEN or self._are_brief():
            return False
        other, there = self._table.emptiest()
        if here - there < UNEVEN:
            return False
        try:
            self._send(other, transport.get_extra_info("socket").dup())
        except OSError:  # the other is gone, or takes nothing in; or no descriptor is to be had
            return False
        transport.abort()  # type: ignore[attr-defined]
        return True

    def leave(self) -> None:
        """Be handed nothing more; what is on its way is served. Safe in a signal handler."""
        self._has_left = True
        if self._is_open:
            self._loop.call_soon_threadsafe(self.changed)

    def close(self) -> None:
        """Take nothing more: what is on its way here goes back, what was sent to others is theirs."""
        if not self._is_open:
            return
        self._table.present[self._number] = 0
        self._is_open = False
        self._loop.remove_reader(self._listening)
        self._listening.close()
        self._path(self._number).unlink(missing_ok=True)
        for end in list(self._ends):
            self._drop(end)
        for link in self._links.values():
            self._loop.remove_reader(link.end)
            link.end.close()
            for _, connection in link.kept:
                connection.close()
        self._links.clear()

    def _count(self) -> int:
        return len(self._connections) + len(self._arriving)

    def _are_brief(self) -> bool:
        return len(self._brief) == MANY_BRIEF and self._loop.time() - self._brief[0] < BRIEF_SECONDS

    def _path(self, number: int) -> Path:
        return self._folder / f"worker-{number}.socket"

    def _send(self, other: int, connection: socket.socket) -> None:
        """Raises OSError, with ``connection`` closed, if it was not sent."""
        sent, mine = self._table.sent, self._number
        number = int(sent[other, mine]) + 1
        try:
            link = self._links.get(other) or self._connect(other)
            sent[other, mine] = number  # before it is taken
            socket.send_fds(link.end, [MESSAGE.pack(mine, number)], [connection.fileno()], socket.MSG_DONTWAIT)
        except OSError:
            sent[other, mine] = number - 1
            connection.close()
            raise
        link.kept.append((number, connection))

    def _connect(self, other: int) -> Link:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.setblocking(False)
        try:
            end.connect(os.fspath(self._path(other)))
        except OSError:
            end.close()
            self._table.present[other] = 0  # as it is no more there; if it is, it will say so again
            raise
        link = self._links[other] = Link(end)
        self._loop.add_reader(end, self._taken, other, link)
        return link

    def _taken(self, other: int, link: Link) -> None:
        """Some of what was sent has been taken, or the other has ended and the rest is served here."""
        try:
            gone = not link.end.recv(len(TAKEN))
        except BlockingIOError:
            return
        except OSError:
            gone = True
        taken = int(self._table.taken[other, self._number])
        link.release(taken)
        if gone:
            del self._links[other]
            self._loop.remove_reader(link.end)
            link.end.close()
            self._table.sent[other, self._number] = taken
            self._table.present[other] = 0
            for _, connection in link.kept:
                self._adopt(connection)

    def _listen(self) -> socket.socket:
        path = self._path(self._number)
        path.unlink(missing_ok=True)  # of a dead worker in this place
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listening.setblocking(False)
        try:
            listening.bind(os.fspath(path))
            listening.listen(self._workers)
        except OSError:
            listening.close()
            raise
        return listening

    def _welcome(self) -> None:
        """Another worker has something to hand over for the first time."""
        try:
            end, _ = self._listening.accept()
        except BlockingIOError:
            return
        except OSError as error:  # no descriptors left: it would be tried without end
            get_logger().warning("connections stay where they are accepted", reason=str(error))
            self.close()
            return
        end.setblocking(False)
        self._ends.add(end)
        self._loop.add_reader(end, self._receive, end)

    def _receive(self, end: socket.socket) -> None:
        """Take what another worker has sent, and say so."""
        while True:
            try:
                received = _receive_socket(end)
            except BlockingIOError:
                break
            except OSError:
                received = None
            if received is None:
                self._drop(end)
                return
            sender, number, connection = received
            self._table.taken[self._number, sender] = number
            self._adopt(connection)
        with suppress(OSError):  # the sender has ended, or finds many such words when it wakes
            end.send(TAKEN)

    def _drop(self, end: socket.socket) -> None:
        self._ends.discard(end)
        self._loop.remove_reader(end)
        end.close()

    def _adopt(self, connection: socket.socket) -> None:
        """Serve it here."""
        protocol = self._protocol()
        protocol.adopted = connection
        self._arriving.add(protocol)
        self.changed()
        task = self._loop.create_task(self._take_up(protocol, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take_up(self, protocol: BalancedProtocol, connection: socket.socket) -> None:
        try:
            connection.setblocking(False)
            await self._loop.connect_accepted_socket(lambda: protocol, connection)
        except OSError:  # its client has gone meanwhile
            connection.close()
            self.begun(protocol)


def _receive_socket(end: socket.socket) -> tuple[int, int, socket.socket] | None:
    """The sender's number, the connection's number, the connection; None if the sender has ended.

    Raises OSError if there is nothing, or no descriptor is left for it.
    """
    flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    data, descriptors, _, _ = socket.recv_fds(end, MESSAGE.size, 1, flags)
    if not data:
        return None
    if not descriptors:
        raise OSError("a connection that was handed over did not arrive")
    sender, number = MESSAGE.unpack(data)
    return sender, number, socket.socket(fileno=descriptors[0])


class BalancedProtocol(LimitedProtocol):
    """Hands a new connection over where another worker should have it; counts those that stay."""

    balance: Balance
    adopted: socket.socket | None = None  # it was handed over, or came back: it stays
    _is_away = False
    _answered = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self.adopted is None and self.balance.hand_over(transport):
            self._is_away = True
            return
        super().connection_made(transport)
        self.balance.begun(self)

    def on_response_complete(self) -> None:
        self._answered += 1
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_away:
            return
        if self.adopted is not None:
            _shut_down(self.adopted)
        super().connection_lost(exc)
        self.balance.ended(self._answered)


def balanced_protocol(protocol: type[LimitedProtocol], balance: Balance) -> type[BalancedProtocol]:
    """That protocol class, for ``uvicorn.Config(http=…)`` of a worker."""
    return type("WorkersProtocol", (BalancedProtocol, protocol), {"balance": balance})


def _shut_down(connection: socket.socket) -> None:
    """Tell the client of the end: closing alone does not while a sender that is late keeps its descriptor."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
