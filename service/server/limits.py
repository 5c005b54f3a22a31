"""Limits on connections that uvicorn's HTTP protocol lacks, and that no ASGI application can set.

Long (431) or late (408) headers, heads that are not HTTP/1 (400), late bodies and unread answers end a connection.
Mended are bodies behind an Upgrade, trailers, pipelining, and answers in two writes. A test names the undocumented
attributes of uvicorn that this takes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sized
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.api.middleware import LINGER_SECONDS, BodyBudget, new_request_id, request_id_of
from service.api.problems import problem_response
from service.logs import get_logger
from service.settings import Settings

PIECE_BYTES = 1024  # parsed at once of a read that holds several requests: they are some 40 at most

_HOST = re.compile(rb"(\[[^\]\s]+\]|[\w.~!$&'()*+,;=%-]*)(:[0-9]*)?", re.ASCII)  # RFC 9110, 7.2


class LimitedProtocol(HttpToolsProtocol):
    """A connection, under the limits of ``settings``. Unread answers count in the app's ``budget``."""

    def __init__(self, settings: Settings, budget: BodyBudget, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings, self.budget, self.headers = settings, budget, []
        self._timer: asyncio.TimerHandle | None = None  # of headers, a body, or the end of a refused connection
        self._in_headers, self._in_message = True, False  # a new connection owes its first request
        self._reading = self._line_bytes = 0  # bytes of this piece; of headers, trailers and chunk extensions so far
        self._behind_answer = 0  # bytes of a request that came after its answer, which nobody reads
        self._refusal: bytes | None = None  # the last bytes of the connection, written when no answer is due

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._answers = AnswerTransport(transport, self.budget, self.settings.send_timeout)
        super().connection_made(self._answers)  # type: ignore[arg-type]
        self.flow: PipelineFlow = PipelineFlow(transport)
        self.flow.waiting = self.pipeline
        self._watch_arrival()

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer()
        self._unset_keepalive_if_required()  # uvicorn leaves it where the client has reset the connection
        self.flow.unparsed = b""
        super().connection_lost(exc)
        self._answers.end()

    def eof_received(self) -> None:
        self.transport.close()  # after what was joined; the event loop would close the transport below

    def pause_writing(self) -> None:
        super().pause_writing()
        self._answers.watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():  # else what little is left is still watched
            self._answers.end()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        if len(data) <= PIECE_BYTES or data.count(b" HTTP/") < 2:
            self._parse(data)
        else:
            self.flow.unparsed = memoryview(data)
            self._parse_pieces()

    def _parse_pieces(self) -> None:
        """Parse on, piece by piece, until requests wait for their turn; each costs a hundred times its bytes."""
        while self.flow.unparsed and not self.pipeline:
            piece, self.flow.unparsed = self.flow.unparsed[:PIECE_BYTES], self.flow.unparsed[PIECE_BYTES:]
            self._parse(piece)

    def _parse(self, data: bytes | memoryview) -> None:
        self._unset_keepalive_if_required()
        self._reading = len(data)
        self._feed(data)
        self._line_bytes += len(data)
        if self._in_message:
            self._check_lines(self._line_bytes)
        if not self._in_headers:
            self.headers.clear()  # trailers
            self._check_behind_answer(len(data))
        if self._refusal is None and self._timer is None:
            self._watch_arrival()

    def shutdown(self) -> None:
        """End as the server ends: what came whole is answered; a body that is still on its way is refused."""
        if self._in_message and not self._in_headers:
            self._refuse(503, "the service is stopping, and the body has not arrived: send it again")
        if self._refusal is None:  # which is the last answer, after those that are due
            super().shutdown()

    def _watch_arrival(self) -> None:
        """Set the timer of what has to come: headers, a body, or another request."""
        if self._in_headers:
            self._set_timer(self.settings.header_timeout, self._time_out, "headers", "header_timeout")
        elif self._in_message:
            self._set_timer(self.settings.receive_timeout, self._time_out, "body", "receive_timeout")
        elif self.cycle.response_complete:
            close = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, close)

    def _time_out(self, part: str, setting: str) -> None:
        self._timer = None
        if self.flow.read_paused:  # the client waits for us
            self._watch_arrival()
        else:
            text = f"the {part} did not arrive within {getattr(self.settings, setting):g} s (setting {setting})"
            self._refuse(408, text)

    def _feed(self, data: bytes | memoryview) -> None:
        """Parse, as uvicorn does; but a head that asks for an Upgrade, where the parser stops, is read without it."""
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    if self.parser.get_method() == b"CONNECT":  # a tunnel, of which no more is read
                        return
                    data = data[upgrade.args[0] :]
                    self._read_head_again()
        except httptools.HttpParserError:
            self._refuse(400, "Invalid HTTP request received.")

    def _read_head_again(self) -> None:
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        kept = [b"%b: %b" % header for header in self.headers if header[0] not in (b"upgrade", b"http2-settings")]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *kept, b"", b""]))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_headers, self._in_message, self._line_bytes = True, True, -self._reading
        self._behind_answer = 0

    def on_body(self, body: bytes) -> None:
        self._line_bytes = -self._reading  # which bytes of a piece are whose the parser does not tell
        super().on_body(body)

    def on_headers_complete(self) -> None:
        is_small = self._line_bytes < 0 and self._reading <= self.settings.max_header_bytes  # they began in this piece
        self._check_lines(0 if is_small else len(self.url) + sum(len(name + value) for name, value in self.headers))
        self._check_framing()
        if self._refusal is not None:
            raise httptools.HttpParserError("headers refused")
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # the parser stops here
        self._set_timer()
        super().on_headers_complete()
        self._in_headers = False
        self.headers = []  # the request keeps its list: trailers come into another

    def on_message_complete(self) -> None:
        if not self._in_headers:  # else it is an upgrade's, which is read again
            self._in_message = False
            self._set_timer()
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._refusal is not None and not self.pipeline:
            self._part()
        super().on_response_complete()
        if self.flow.unparsed and not self.transport.is_closing():
            self._parse_pieces()
            self.flow.resume_reading()

    def _check_lines(self, size: int) -> None:
        if len(self.headers) > self.settings.max_headers:
            self._refuse(431, f"more than {self.settings.max_headers} header lines (setting max_headers)")
        elif size > self.settings.max_header_bytes:
            self._refuse(431, f"more than {self.settings.max_header_bytes} bytes of headers (setting max_header_bytes)")

    def _check_framing(self) -> None:
        """Refuse a head that RFC 9112 (2.3, 3.2, 6.1) has a server refuse, and that the parser takes."""
        version = self.parser.get_http_version()
        hosts = [value for name, value in self.headers if name == b"host"]
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if version not in ("1.1", "1.0"):
            self._refuse(400, f"HTTP/{version} is not read here: send HTTP/1.1")
        elif len(hosts) > 1 or (version == "1.1" and not hosts):
            self._refuse(400, f"{len(hosts)} Host headers: one is expected")
        elif hosts and not _HOST.fullmatch(hosts[0]):
            self._refuse(400, "the Host header is none: a name or an address is expected, and a port if need be")
        elif codings and (codings != [b"chunked"] or version == "1.0"):
            self._refuse(400, "this Transfer-Encoding is not read here: chunked alone, of HTTP/1.1, is")

    def _check_behind_answer(self, size: int) -> None:
        self._behind_answer += size if self._in_message and self.cycle.response_complete else 0
        if self._behind_answer > self.settings.max_body_bytes:
            self._refuse(413, f"more than {self.settings.max_body_bytes} bytes behind an answer (max_body_bytes)")

    def _set_timer(self, seconds: float = 0, then: Callable[..., None] | None = None, *arguments: str) -> None:
        """Call ``then`` after ``seconds`` in place of what the timer would have called before."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if then is None else self.loop.call_later(seconds, then, *arguments)

    def _refuse(self, status: int, detail: str) -> None:
        """Read no more; answer what is due, then the refusal, then close. A refused body's takes the answer's place."""
        if self._refusal is not None:
            return
        self._set_timer()
        self.flow.unparsed = b""
        cycle, in_body = self.cycle, self._in_message and not self._in_headers  # the body of the latest request
        request_id = request_id_of(cycle.scope) if in_body else new_request_id()  # type: ignore[arg-type]
        get_logger().info("connection refused", request_id=request_id, status=status, detail=detail, client=self.client)
        self._refusal = problem_response(status, detail, request_id)
        if in_body:
            if self.pipeline:  # whose turn has not come
                self.pipeline.popleft()
                cycle.response_complete = True
                return
            self._refusal = b"" if cycle.response_started else self._refusal
            cycle.disconnected = True
            cycle.message_event.set()
        elif self.pipeline or (cycle is not None and not cycle.response_complete):
            return
        self._part()

    def _part(self) -> None:
        """Write the refusal, drop what still arrives, then close: a socket closed on unread bytes is reset."""
        self.flow.resume_reading()
        if not self.transport.is_closing():
            self.transport.write(self._refusal or b"")
            self._answers.flush()
            self.transport.write_eof()
            self._set_timer(LINGER_SECONDS, self.transport.close)


class PipelineFlow(FlowControl):
    """uvicorn's flow control, but for reading on while pipelined requests wait, or bytes that are not parsed yet."""

    waiting: Sized
    unparsed: bytes | memoryview = b""

    def resume_reading(self) -> None:
        if self.read_paused and not self.waiting and not self.unparsed:
            super().resume_reading()


class AnswerTransport:
    """A transport that joins two writes at a time (uvicorn writes head and body apart), and watches that they are read.

    Unread bytes count in the budget of bodies; if none is read in ``timeout`` seconds, the connection is aborted.
    """

    def __init__(self, transport: asyncio.Transport, budget: BodyBudget, timeout: float) -> None:
        self._transport, self._budget, self._timeout = transport, budget, timeout
        self._loop, self.is_closing = asyncio.get_running_loop(), transport.is_closing
        self._timer: asyncio.TimerHandle | None = None
        self._parts: list[bytes] = []
        self._written = self._counted = 0  # bytes handed on so far, and how many of them count in the budget

    def write(self, data: bytes) -> None:
        self._parts.append(data)
        if len(self._parts) > 1:
            self.flush()
        else:
            self._loop.call_soon(self.flush)  # where nothing follows in this iteration of the event loop

    def flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._written += sum(map(len, parts))
            self._transport.writelines(parts)

    def close(self) -> None:
        self.flush()
        self._transport.close()
        self.watch()

    def watch(self, read_before: int = -1) -> None:
        """Count what the client has not read, and look again later whether more is read than ``read_before``."""
        unread = self._transport.get_write_buffer_size()
        read = self._written - unread
        self.end()
        if unread and read > read_before:
            self._counted = unread
            self._budget.held += unread
            self._timer = self._loop.call_later(self._timeout, self.watch, read)
        elif unread:
            get_logger().info("connection aborted: its answer is not read", unread=unread, seconds=self._timeout)
            self._transport.abort()

    def end(self) -> None:
        """Count nothing, and look no more."""
        self._budget.held -= self._counted
        self._counted = 0
        if self._timer is not None:
            self._timer.cancel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
