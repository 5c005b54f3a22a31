"""Callers that keep connections to a service busy while its processes are killed, and tell how each request ended.

What TCP says tells whether a server had read a request that it never answered. A socket that is closed with unread
bytes, or gets some after it was closed, is reset; one whose request was read is closed in peace. So a connection that
ends without a byte of an answer and without a reset had a request that was read, and lost.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path

RESET_SECONDS = 0.2  # in which a reset must follow the end of a connection to be seen
MAX_REQUESTS = 300
PAUSE = 0.02  # seconds before a refused connection is tried again
CHUNK = 2**18
ESTABLISHED = "01"


class End(Enum):
    """How a request ended."""

    RIGHT = "answered, bitwise right"
    WRONG = "answered otherwise"
    REFUSED = "refused with 429 or 503"
    CUT = "the connection ended within the answer"
    DROPPED = "read by the server, and the connection closed without an answer"
    UNREAD = "not read by the server: the connection was reset before any answer"

    @property
    def is_lost(self) -> bool:
        """No answer came."""
        return self in (End.CUT, End.DROPPED, End.UNREAD)


@dataclass(frozen=True)
class Case:
    """A request, and the body that answers it with 200."""

    request: bytes
    body: bytes


@dataclass(frozen=True)
class Loss:
    """A request without an answer: on which local ``port``, and when that was connected and lost (s, monotonic)."""

    port: int
    connected: float
    at: float
    end: End


@dataclass
class Record:
    """What all callers have seen."""

    ends: Counter[End] = field(default_factory=Counter)
    losses: list[Loss] = field(default_factory=list)
    examples: list[bytes] = field(default_factory=list)
    """Of wrong answers, their first bytes."""
    right_at: list[float] = field(default_factory=list)
    refused_connections: int = 0

    def right_between(self, start: float, end: float) -> int:
        """Right answers between these moments."""
        return sum(start <= at <= end for at in self.right_at)

    def longest_silence(self, start: float, end: float) -> float:
        """Seconds between these moments in which no right answer came."""
        moments = [start, *(at for at in self.right_at if start <= at <= end), end]
        return max(later - earlier for earlier, later in pairwise(moments))


class Callers:
    """So many connections, each with one request after the other until ``stop``.

    A caller changes its connection after up to MAX_REQUESTS, so that a new worker gets its share, but not while
    ``keep`` is set.
    """

    def __init__(self, address: tuple[str, int], cases: Sequence[Case], weights: Sequence[float], count: int) -> None:
        self.record = Record()
        self._address, self._cases, self._weights = address, cases, weights
        self.keep = False
        self._stopping = self._is_leaving = False
        self._tasks = [asyncio.create_task(self._call(random.Random(index))) for index in range(count)]

    def let_go(self) -> None:
        """From now on a caller that is not let in has finished: the service is to end."""
        self._is_leaving = True

    async def stop(self) -> None:
        """Finish what is under way."""
        self._stopping = True
        await self.wait()

    async def wait(self) -> None:
        """Until all callers have finished."""
        await asyncio.gather(*self._tasks)

    async def _call(self, choices: random.Random) -> None:
        while not self._stopping:
            try:
                connection = await connect(self._address)
            except OSError:
                self.record.refused_connections += 1
                if self._is_leaving:
                    return
                await asyncio.sleep(PAUSE)
                continue
            with connection:
                await self._talk(connection, choices)

    async def _talk(self, connection: socket.socket, choices: random.Random) -> None:
        port, connected = connection.getsockname()[1], time.monotonic()
        left = choices.randrange(1, MAX_REQUESTS)
        while not self._stopping and (left > 0 or self.keep):
            left -= 1
            end, goes_on = await self._ask(connection, choices.choices(self._cases, self._weights)[0])
            self.record.ends[end] += 1
            if end is End.RIGHT:
                self.record.right_at.append(time.monotonic())
            if end.is_lost:
                self.record.losses.append(Loss(port, connected, time.monotonic(), end))
            if not goes_on:
                return

    async def _ask(self, connection: socket.socket, case: Case) -> tuple[End, bool]:
        """How it ended, and whether the connection can be used on."""
        try:
            await asyncio.get_running_loop().sock_sendall(connection, case.request)
        except OSError:
            return End.UNREAD, False
        end, head, body = await read_answer(connection)
        if end is not None:
            return end, False
        status, goes_on = int(head.split(b" ", 2)[1]), b"connection: close" not in head.lower()
        if status == 200 and body == case.body:
            return End.RIGHT, goes_on
        if status in (429, 503):
            return End.REFUSED, goes_on
        self.record.examples.append(head[:100] + b" ... " + body[:200])
        return End.WRONG, goes_on


async def connect(address: tuple[str, int]) -> socket.socket:
    """A connected socket that does not block. Raises OSError."""
    connection = socket.socket()
    connection.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


async def read_answer(connection: socket.socket) -> tuple[End | None, bytes, bytes]:
    """None, head and body of a whole answer, which must have a Content-Length; else how it ended."""
    loop, received = asyncio.get_running_loop(), bytearray()
    needed = None
    while needed is None or len(received) < needed:
        try:
            data = await loop.sock_recv(connection, CHUNK)
        except OSError:
            return End.CUT if received else End.UNREAD, b"", b""
        if not data:
            return End.CUT if received else await _unread_or_dropped(connection), b"", b""
        received += data
        if needed is None and (at := received.find(b"\r\n\r\n")) >= 0:
            lines = bytes(received[:at]).lower().split(b"\r\n")
            needed = at + 4 + next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return None, head, body


async def _unread_or_dropped(connection: socket.socket) -> End:
    """Of a connection that was closed before an answer: did a reset follow, for a request that nobody read?"""
    deadline = time.monotonic() + RESET_SECONDS
    while time.monotonic() < deadline:
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return End.UNREAD
        await asyncio.sleep(RESET_SECONDS / 20)
    return End.DROPPED


def connections_to(port: int) -> dict[int, int]:
    """Of each IPv4 connection to that local port, its other end's port and the inode of our end: 0 if not accepted."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    local = f":{port:04X}"
    return {
        int(row[2].rpartition(":")[2], 16): int(row[9])
        for row in rows
        if row[1].endswith(local) and row[3] == ESTABLISHED
    }


def sockets_of(pid: int) -> set[int]:
    """Inodes of the sockets that a process has open."""
    inodes = set()
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended
        for descriptor in os.scandir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                link = os.readlink(descriptor.path)
                if link.startswith("socket:["):
                    inodes.add(int(link[8:-1]))
    return inodes
