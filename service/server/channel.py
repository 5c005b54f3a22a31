"""The line between the supervisor and a worker: JSON messages on a pair of connected sockets.

SOCK_SEQPACKET keeps messages apart, sends each wholly or not at all, and comes to its end where the other process does,
however that ended. So the line is also how each notices that the other is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

import orjson

from service.errors import DeadlineExceeded

MOST_BYTES = 2**17  # of a message; the kernel lets some 200 KiB wait on such a socket
ANSWER_SECONDS = 5.0

Message = dict[str, Any]


def connected_pair() -> tuple[socket.socket, socket.socket]:
    """The supervisor's end, which never blocks, and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def encode(message: Message) -> bytes:
    """One message; arrays are written as lists."""
    return orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)


def receive_waiting(end: socket.socket, most: int = 1000) -> tuple[list[Message], bool]:
    """Messages that have arrived at a socket that never blocks, at most so many, and whether the other end is gone."""
    messages: list[Message] = []
    while len(messages) < most:
        try:
            data = end.recv(MOST_BYTES)
        except BlockingIOError:
            break
        except OSError:
            return messages, True
        if not data:
            return messages, True
        messages.append(orjson.loads(data))
    return messages, False


class WorkerLine:
    """A worker's end of the line. Safe between threads."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._numbers = itertools.count()
        self._asked: dict[int, tuple[list[Message], Future[list[Message]]]] = {}

    def tell(self, message: Message) -> bool:
        """Send without waiting; False if the supervisor is too busy to take it, or gone."""
        try:
            self._end.send(encode(message), socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    async def ask(self, message: Message) -> list[Message]:
        """The messages that answer this one.

        Raises:
            DeadlineExceeded: the supervisor did not answer.
        """
        number, answer = next(self._numbers), Future[list[Message]]()
        self._asked[number] = [], answer
        try:
            if not self.tell({**message, "number": number}):
                raise DeadlineExceeded("the supervisor of this service is too busy to answer: try again later")
            return await asyncio.wait_for(asyncio.wrap_future(answer), ANSWER_SECONDS)
        except TimeoutError:
            raise DeadlineExceeded(f"no answer of the supervisor within {ANSWER_SECONDS:g} s") from None
        finally:
            del self._asked[number]

    def listen(self, at_end: Callable[[], None]) -> None:
        """Take answers in on a thread of its own; call ``at_end`` there when the supervisor is gone."""
        threading.Thread(target=self._listen, args=(at_end,), name="supervisor", daemon=True).start()

    def _listen(self, at_end: Callable[[], None]) -> None:
        while data := self._receive():
            self._take(orjson.loads(data))
        at_end()

    def _receive(self) -> bytes:
        try:
            return self._end.recv(MOST_BYTES)
        except OSError:
            return b""

    def _take(self, message: Message) -> None:
        parts, answer = self._asked.get(message["number"], ([], None))
        if answer is None:
            return  # whoever asked has given up
        if not message.get("end"):
            parts.append(message)
            return
        with suppress(InvalidStateError):  # given up in this moment
            answer.set_result(parts)
