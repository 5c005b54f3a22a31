"""What uvicorn's HTTP protocol lacks: limits on connections that no ASGI application can set.

Headers that are too long (431), headers and bodies that are too late (408), answers that nobody reads, one write for the
head and the body of an answer, the body behind an Upgrade that is not made, trailers, and pipelined requests, which wait
in the socket while answers are due. This is the one file that uses undocumented attributes of uvicorn; a test names them.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.api.middleware import BodyBudget
from service.api.problems import MEDIA_TYPE, problem
from service.logs import get_logger
from service.settings import Settings

LINGER_SECONDS = 0.5
JOINED_BYTES = 2**16
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")


class LimitedProtocol(HttpToolsProtocol):
    """One connection. ``limited_protocol`` makes the class that has ``settings`` and the app's ``budget`` of bytes."""

    settings: Settings
    budget: BodyBudget

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.headers: list[tuple[bytes, bytes]] = []
        self._timer: asyncio.TimerHandle | None = None  # of the headers, and of the end of a refused connection
        self._in_headers, self._in_message = True, False  # a new connection owes its first request
        self._header_bytes = 0
        self._refusal: bytes | None = None  # the last bytes of the connection, written when no answer is due

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        settings = self.settings
        self._answers = AnswerTransport(transport, self.loop, self.budget, settings.send_timeout)
        super().connection_made(self._answers)  # type: ignore[arg-type]
        self.flow = PipelineFlow(transport, lambda: bool(self.pipeline))
        _send_without_delay(transport)
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer()
        self._unset_keepalive_if_required()
        self._answers.end()
        super().connection_lost(exc)

    def eof_received(self) -> None:
        """Close after what was written: the event loop would close the transport below the joined writes."""
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answers.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._answers.release()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._in_headers:
            self._header_bytes += len(data)  # a header line without an end is reported by no callback
            self._check_headers(self._header_bytes)
        else:
            self.headers.clear()  # trailers
        if self._refusal is None and self._timer is None:
            self._watch_arrival()

    def _watch_arrival(self) -> None:
        """Set the timer of what has to come: headers, a body, or another request."""
        if self._in_headers:
            self._set_timer(self.settings.header_timeout, self._time_out_headers)
        elif not self.cycle.response_complete:
            if self._in_message:
                self._set_timer(self.settings.receive_timeout, self._time_out_body)
        elif self.timeout_keep_alive_task is None and not self.transport.is_closing():
            idle, close = self.timeout_keep_alive, self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(idle, close)

    def _time_out_headers(self) -> None:
        seconds = self.settings.header_timeout
        self._refuse(408, f"the headers did not arrive within {seconds:g} s (setting header_timeout)")

    def _time_out_body(self) -> None:
        self._timer = None
        if self.flow.read_paused:  # the client waits for us
            self._watch_arrival()
            return
        seconds = self.settings.receive_timeout
        self._refuse(408, f"the body did not arrive within {seconds:g} s (setting receive_timeout)")

    def _feed(self, data: bytes) -> None:
        """As uvicorn's, which drops a body that comes with an Upgrade.

        The parser stops behind the headers of one: they are read again, without the Upgrade, by another parser.
        """
        pieces: list[bytes | memoryview] = [memoryview(data)]
        try:
            while pieces and self.parser is not None:
                piece = pieces.pop(0)
                try:
                    self.parser.feed_data(piece)
                except httptools.HttpParserUpgrade as upgrade:
                    if self.parser.get_method() != b"CONNECT":  # a tunnel, of which no more is read
                        pieces = [self._head_without_upgrade(), piece[upgrade.args[0] :]]
        except httptools.HttpParserError:
            self._refuse(400, "Invalid HTTP request received.")

    def _head_without_upgrade(self) -> bytes:
        """The head of the request whose headers have been read, and a new parser to read it."""
        parser = self.parser
        lines = [b"%b %b HTTP/%b" % (parser.get_method(), self.url, parser.get_http_version().encode())]
        lines += [b"%b: %b" % pair for pair in self.headers if pair[0] not in UPGRADE_HEADERS]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._in_message, self._header_bytes = True, True, 0

    def on_headers_complete(self) -> None:
        self._check_headers(len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers))
        if self._refusal is not None:
            raise httptools.HttpParserError("headers refused")
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # the parser stops here
        self._set_timer()
        self._in_headers = False
        super().on_headers_complete()
        self.headers = []  # the request keeps its list: trailers come into another

    def on_message_complete(self) -> None:
        if self._in_headers:  # an upgrade's, which is read again
            return
        self._in_message = False
        self._set_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._answers.flush()
        super().on_response_complete()
        if self._refusal is not None and not self.pipeline and self.cycle.response_complete:
            self._part(self._refusal)

    def _check_headers(self, size: int) -> None:
        settings = self.settings
        if len(self.headers) > settings.max_headers:
            self._refuse(431, f"more than {settings.max_headers} header lines (setting max_headers)")
        elif size > settings.max_header_bytes:
            self._refuse(431, f"more than {settings.max_header_bytes} bytes of headers (setting max_header_bytes)")

    def _set_timer(self, seconds: float = 0, then: Callable[[], None] | None = None) -> None:
        """Call ``then`` after ``seconds`` in place of what the timer would have called before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if then is None else self.loop.call_later(seconds, then)

    def _refuse(self, status: int, detail: str) -> None:
        """Read no more of the connection; answer what is due, then the refusal, then close.

        A refusal of a request's own body takes the place of its answer, unless that has begun.
        """
        if self._refusal is not None:
            return
        self._set_timer()
        get_logger().info("connection refused", status=status, detail=detail, client=self.client)
        self._refusal = _problem_bytes(status, detail)
        cycle = self.cycle
        if self._in_message and not self._in_headers:  # in the body of the latest request
            if self.pipeline:  # whose turn has not come
                self.pipeline.popleft()
                cycle.response_complete = True
                return
            if cycle.response_started:
                self._refusal = b""
            cycle.disconnected = True
            cycle.message_event.set()
        elif self.pipeline or (cycle is not None and not cycle.response_complete):
            return
        self._part(self._refusal)

    def _part(self, last: bytes) -> None:
        """Write ``last``, say that no more comes, drop what still arrives, close shortly.

        A socket that is closed on unread bytes is reset, and the client would never read the answer.
        """
        self.flow.resume_reading()
        if self.transport.is_closing():
            return
        if last:
            self.transport.write(last)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_timer(LINGER_SECONDS, self.transport.close)


class PipelineFlow(FlowControl):
    """uvicorn's flow control, which reads on for a request that is under way: not while pipelined requests wait."""

    def __init__(self, transport: asyncio.Transport, has_waiting: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._has_waiting = has_waiting

    def resume_reading(self) -> None:
        if not self._has_waiting():
            super().resume_reading()


class AnswerTransport:
    """A transport that joins the writes of an answer, and gives up a client that does not read it.

    Joined is what is written until ``flush`` or the end of the event loop's iteration: uvicorn writes head and body
    apart, which costs two system calls and wakes the client twice. Bytes that the client does not read count in the
    budget of bodies; if none of them is read in ``send_timeout`` seconds, the connection is aborted.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, budget: BodyBudget, send_timeout: float
    ) -> None:
        self._transport, self._loop, self._budget, self._send_timeout = transport, loop, budget, send_timeout
        self._parts: list[bytes] = []
        self._written = self._counted = 0  # bytes handed on so far; of these counted in the budget
        self._timer: asyncio.TimerHandle | None = None

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)
        if len(data) > JOINED_BYTES:  # what is streamed must feel how fast it is read
            self.flush()

    def flush(self) -> None:
        """Hand on what was joined, unless the connection is closed by now."""
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._written += sum(map(len, parts))
            self._transport.writelines(parts)

    def close(self) -> None:
        self.flush()
        self._transport.close()
        self._start_timer()

    def write_eof(self) -> None:
        self.flush()
        self._transport.write_eof()

    def watch(self) -> None:
        """Count what the client has not read, from now until ``release``."""
        self._count(self._transport.get_write_buffer_size())
        self._start_timer()

    def release(self) -> None:
        """Stop counting: most has been read. A connection that is to close is still watched."""
        self.end()
        if self._transport.is_closing():
            self._start_timer()

    def end(self) -> None:
        """Stop counting and watching."""
        self._count(0)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _count(self, unread: int) -> None:
        self._budget.held += unread - self._counted
        self._counted = unread

    def _start_timer(self) -> None:
        unread = self._transport.get_write_buffer_size()
        if unread and self._timer is None:
            self._timer = self._loop.call_later(self._send_timeout, self._abort_unless_read, self._written - unread)

    def _abort_unless_read(self, read_before: int) -> None:
        self._timer = None
        unread = self._transport.get_write_buffer_size()
        if unread and self._written - unread <= read_before:
            get_logger().info("connection aborted: its answer is not read", unread=unread, seconds=self._send_timeout)
            self._transport.abort()
            return
        if self._counted:
            self._count(unread)
        self._start_timer()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def limited_protocol(settings: Settings, budget: BodyBudget) -> type[LimitedProtocol]:
    """The protocol class for ``uvicorn.Config(http=…)``."""
    return type("ConfiguredProtocol", (LimitedProtocol,), {"settings": settings, "budget": budget})


def _send_without_delay(transport: asyncio.Transport) -> None:
    """Set TCP_NODELAY, which event loops set only on sockets that they opened themselves."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _problem_bytes(status: int, detail: str) -> bytes:
    request_id = uuid.uuid4().hex
    body = bytes(problem(status, detail, request_id).body)
    head = f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\nx-request-id: {request_id}\r\n"
    return STATUS_LINE[status] + head.encode() + b"connection: close\r\n\r\n" + body
