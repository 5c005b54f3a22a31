"""The load: a closed loop of keep-alive connections that send one request over and over.

It runs in a process of its own and is written on uvloop and httptools, which the service brings anyway: ten to fifty
microseconds of CPU a small request, where httpx takes 290 and would itself be what is measured. What it took is part of
the result. (wrk takes less still, but would have to be installed by hand.)
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import cast

import httptools
import uvloop

PATIENCE = 60.0  # seconds beyond the asked ones after which a block has failed
MIN_REQUESTS = 2  # a connection, however long one takes


class LoadError(RuntimeError):
    """A connection was lost, or an answer was not 200: its numbers would mean nothing."""


@dataclass(frozen=True)
class Target:
    """A server's address, and the bytes of the request to send to it."""

    host: str
    port: int
    request: bytes


@dataclass
class Load:
    """One block: answered ``requests`` in ``seconds``, their ``latencies`` (s), and the ``cpu`` (s) of the client."""

    requests: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Requests/s."""
        return self.requests / self.seconds


def http_request(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """The bytes of an HTTP/1.1 request with a Content-Length."""
    fields = {"host": "bench", **headers, "content-length": str(len(body))}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def drive(target: Target, connections: int, seconds: float) -> Load:
    """Keep ``connections`` busy for ``seconds`` (0: two requests each), then wait for what is under way.

    Raises:
        LoadError: an answer was not 200, or a connection was lost.
        TimeoutError: the server no longer answers.
    """
    return uvloop.run(_drive(target, connections, seconds))


async def _drive(target: Target, connections: int, seconds: float) -> Load:
    loop, load = asyncio.get_running_loop(), Load()
    made = [
        (await loop.create_connection(lambda: _Busy(target.request, load), target.host, target.port))[1]
        for _ in range(connections)
    ]
    cpu, started = time.process_time(), time.perf_counter()
    try:
        async with asyncio.timeout(seconds + PATIENCE):
            await asyncio.gather(*(connection.run(started + seconds) for connection in made))
    finally:
        for connection in made:
            connection.close()
    load.seconds, load.cpu = time.perf_counter() - started, time.process_time() - cpu
    return load


class Connection(asyncio.Protocol, ABC):
    """A keep-alive connection that parses answers; subclasses say what follows one, and what a failure is."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport
        self._parser = httptools.HttpResponseParser(self)

    @abstractmethod
    def answered(self, status: int) -> None:
        """An answer is whole."""

    @abstractmethod
    def failed(self, reason: str) -> None:
        """The connection is of no more use."""

    def send(self, request: bytes) -> None:
        """Write it."""
        self._transport.write(request)

    def close(self) -> None:
        """Give up what is under way, and the connection."""
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.failed("the server closed the connection")

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        """httptools: an answer is whole."""
        self.answered(self._parser.get_status_code())


class _Busy(Connection):
    """Sends the request, reads the answer, and sends again until the deadline."""

    def __init__(self, request: bytes, load: Load) -> None:
        super().__init__()
        self._request, self._load = request, load
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deadline = self._started = 0.0
        self._count = 0

    async def run(self, deadline: float) -> None:
        """Until the first answer after ``deadline`` (on time.perf_counter). Raises LoadError."""
        self._deadline = deadline
        self._again()
        await self._finished

    def _again(self) -> None:
        self._started = time.perf_counter()
        self.send(self._request)

    def close(self) -> None:
        self._finished.cancel()
        super().close()

    def failed(self, reason: str) -> None:
        if not self._finished.done():
            self._finished.set_exception(LoadError(reason))

    def answered(self, status: int) -> None:
        now = time.perf_counter()
        if status != 200:
            self.failed(f"answer {self._count} had status {status}, 200 expected")
        if self._finished.done():
            return
        self._count += 1
        self._load.requests += 1
        self._load.latencies.append(now - self._started)
        if now < self._deadline or self._count < MIN_REQUESTS:
            self._again()
        else:
            self._finished.set_result(None)
