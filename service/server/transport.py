"""What goes out of a connection: in one piece where written in one go, and not kept for ever for who does not read."""

from __future__ import annotations

import asyncio
from typing import Any

from service.api.middleware import Bodies
from service.logs import get_logger

GATHERED_BYTES = 2**16  # that wait for the end of an iteration at most: what is streamed must feel its reader


class GatheringTransport:
    """A transport that hands on in one piece what is written in one iteration of the event loop.

    uvicorn writes the head of an answer and its body apart: two system calls, two packets, and a reader woken twice.

    What the peer does not read is held here, beyond what the kernel takes. As long as that is much it counts among the
    ``bodies`` that are held; and where nothing of it has gone in ``send_timeout`` seconds, the connection is given up.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, bodies: Bodies, send_timeout: float
    ) -> None:
        self._transport, self._loop = transport, loop
        self._bodies, self._send_timeout = bodies, send_timeout
        self._parts: list[bytes] = []
        self._size = 0
        self._written = 0  # bytes handed on so far
        self._counted = 0  # bytes held that count among the bodies
        self._look: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> None:
        """As a transport's; not before the end of the iteration, unless it is much."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > GATHERED_BYTES:
            self.flush()

    def write_whole(self, data: bytes) -> None:
        """Hand on a whole answer, after what was gathered."""
        self.flush()
        self._written += len(data)
        self._transport.write(data)

    def flush(self) -> None:
        """Hand on what was gathered, unless the connection is closed by now."""
        parts, self._parts, size, self._size = self._parts, [], self._size, 0
        if parts and not self._transport.is_closing():
            self._written += size
            self._transport.writelines(parts)

    def hold(self) -> None:
        """Much is held from now on (a protocol's ``pause_writing``)."""
        self._count(self._transport.get_write_buffer_size())
        self._look_later()

    def release(self) -> None:
        """Little is (``resume_writing``): that is looked after only where the connection is to be closed."""
        self.end()
        if self._transport.is_closing():
            self._look_later()

    def end(self) -> None:
        """The connection has ended."""
        self._count(0)
        if self._look is not None:
            self._look.cancel()
            self._look = None

    def _count(self, held: int) -> None:
        self._bodies.held += held - self._counted
        self._counted = held

    def _look_later(self) -> None:
        """Whether any of what is held will have gone."""
        held = self._transport.get_write_buffer_size()
        if held and self._look is None:
            gone = self._written - held
            self._look = self._loop.call_later(self._send_timeout, self._give_up_unless_more_than, gone)

    def _give_up_unless_more_than(self, gone: int) -> None:
        self._look = None
        held = self._transport.get_write_buffer_size()
        if held and self._written - held <= gone:
            get_logger().info("connection given up: its answer is not read", held=held, seconds=self._send_timeout)
            self._transport.abort()
            return
        if self._counted:
            self._count(held)
        self._look_later()

    def is_closing(self) -> bool:
        """As a transport's."""
        return self._transport.is_closing()

    def close(self) -> None:
        """As a transport's, after what was written."""
        self.flush()
        self._transport.close()
        self._look_later()

    def write_eof(self) -> None:
        """As a transport's, after what was written."""
        self.flush()
        self._transport.write_eof()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
