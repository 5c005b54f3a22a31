"""uvicorn's HTTP protocol with what it lacks: a deadline and caps for the headers, and errors in the one shape.

What is refused is refused in its turn, behind the answers that are due. An upgrade is never made, as HTTP allows: a
request that asks for one is read as if it had not.

Middleware sees a request only once its headers are complete; a connection that never completes them can be ended only
here.
"""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Coroutine
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.api.direct import Direct, Exchange, Plan
from service.api.middleware import Bodies
from service.api.problems import MEDIA_TYPE, problem
from service.logs import get_logger
from service.server.transport import GatheringTransport
from service.settings import Settings

LINGER_SECONDS = 0.5
UPGRADE_HEADERS = (b"upgrade", b"http2-settings")
HELD_SECONDS = 0.05  # between a request's headers and the end of its body, if it is not to go by ASGI


class GuardedProtocol(HttpToolsProtocol):
    """Answers 431 to more or longer headers than allowed and 408 to headers that do not arrive in time.

    A request that service.api.direct takes never reaches ASGI: its headers are held back until its body has been read.
    One whose body is long in coming goes on to ASGI, where the time and the memory that it takes are counted.
    """

    max_headers = 100
    max_header_bytes = 32 * 2**10
    header_timeout = 10.0
    send_timeout = 30.0
    bodies = Bodies(0, 0)
    direct: Direct | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._partial = 0  # bytes received while the headers were unfinished
        self._in_headers = True
        self._in_message = False  # a request has begun to arrive that has not arrived whole
        self._is_between = True  # no byte has come of a request that the parser would have to read on
        self._refused = False
        self._parting: bytes | None = None  # the refusal that waits for the answers before it
        self._held: tuple[Plan, str] | None = None  # what the request asks for whose headers are held back, its id
        self._parts: list[bytes] = []  # of its body
        self._keep_alive = True
        self.headers_at = 0.0
        self._idle_since: float | None = None  # by the loop's clock; None while a request is under way
        self.headers: list[tuple[bytes, bytes]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        gathering = GatheringTransport(transport, self.loop, self.bodies, self.send_timeout)
        super().connection_made(gathering)  # type: ignore[arg-type]
        _send_at_once(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._held, self._parts = None, []
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        self._gathering.end()
        super().connection_lost(exc)

    @property
    def _gathering(self) -> GatheringTransport:
        return self.transport  # type: ignore[return-value]

    def eof_received(self) -> None:
        """The loop closes the transport on the end of what the peer sends: before that goes what was written."""
        super().eof_received()
        self._gathering.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._gathering.hold()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._gathering.release()

    def data_received(self, data: bytes) -> None:
        if self._refused or (self._is_between and self._take_known(data)):
            return
        was_between, self._is_between = self._is_between, False
        self._parse(data)
        if self._idle_since is not None and self._in_message:  # of a body whose answer has gone out before its end
            self._idle_since = self.loop.time()
        if was_between and self._is_between:
            self._remember(data)
        if self._held is not None and self._timer is None:  # many clients send the body apart
            self._timer = self.loop.call_later(HELD_SECONDS, self._let_go)
        if self._in_headers and self.parser is not None:
            self._partial += len(data)  # a header line without an end is reported by no callback
            self._check(self._partial)
            if self._timer is None and not self._refused:
                self._arm()

    def _parse(self, data: bytes) -> None:
        """As uvicorn's ``data_received``, which drops a body that comes with an Upgrade.

        The parser stops at one: the request is read anew without it, by another parser, then what follows.
        """
        pieces: list[bytes | memoryview] = [memoryview(data)]
        try:
            while pieces:
                piece = pieces.pop(0)
                try:
                    self.parser.feed_data(piece)
                except httptools.HttpParserUpgrade as upgrade:
                    if self.parser.get_method() != b"CONNECT":  # of which no more is read
                        pieces = [self._begun_anew(), piece[upgrade.args[0] :]]
        except httptools.HttpParserError:
            self._refuse(400, "Invalid HTTP request received.")

    def _begun_anew(self) -> bytes:
        """The head of the request whose headers have come, without its Upgrade, for a parser that is new."""
        head = _head(self.parser, self.url, [pair for pair in self.headers if pair[0] not in UPGRADE_HEADERS])
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return head

    def _take_known(self, data: bytes) -> bool:
        """Whether it is one whole request whose head was read before, and now under way: the parser need not see it."""
        if self.direct is None or (found := self.direct.heads.find(data)) is None or not self._may_take():
            return False
        self._disarm()
        self._idle_since, self.headers_at = None, time.perf_counter()
        known, body = found
        if known.again is None:
            return self._taken(known.plan, "", body, keep_alive=True)
        return self._is_under_way(self.direct.repeat(self, known.plan, known.again, body))

    def _remember(self, data: bytes) -> None:
        """The head of a whole request that was taken."""
        assert self.direct is not None
        exchange: Exchange = self.cycle  # type: ignore[assignment]
        if exchange.keep_alive:
            self.direct.heads.remember(data, exchange.plan, exchange.size, exchange.job.again)

    def _may_take(self) -> bool:
        """Nothing of what comes while another answer is under way, or not read."""
        return not self.flow.write_paused and (self.cycle is None or self.cycle.response_complete)

    def on_message_begin(self) -> None:
        self._is_between, self._in_message, self._idle_since = False, True, None
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._in_headers, self._partial = True, 0

    def on_headers_complete(self) -> None:
        self._check(len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers))
        if self._refused:
            raise httptools.HttpParserError("headers refused")
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            return  # the parser stops here
        self._disarm()
        self._in_headers, self.headers_at = False, time.perf_counter()
        self._held = self._plan()
        if self._held is None:
            self._by_asgi()

    def _by_asgi(self) -> None:
        """Hand the headers on to uvicorn, whose message begins here."""
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers += headers  # the scope's own list
        super().on_headers_complete()

    def _plan(self) -> tuple[Plan, str] | None:
        """What service.api.direct may answer."""
        if self.direct is None or self.parser.get_http_version() != "1.1":
            return None
        if not self._may_take():
            return None
        self._keep_alive = self.parser.should_keep_alive()
        return self.direct.plan(self.parser.get_method(), self.url, self.headers)

    def on_body(self, body: bytes) -> None:
        if self._held is None:
            super().on_body(body)
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._in_headers:  # an upgrade's
            return
        self._in_message = False
        if self._held is not None and self._taken(*self._held, b"".join(self._parts), self._keep_alive):
            self._held, self._parts = None, []
            self._disarm()
            self._is_between = True
            return
        self._let_go()
        super().on_message_complete()

    def _taken(self, plan: Plan, asked_for: str, body: bytes, keep_alive: bool) -> bool:
        assert self.direct is not None
        return self._is_under_way(self.direct.take(self, plan, asked_for, body, keep_alive))

    def _is_under_way(self, exchange: Exchange | None) -> bool:
        if exchange is not None:
            self.cycle = exchange  # type: ignore[assignment]
        return exchange is not None

    def _let_go(self) -> None:
        """Hand the request on whose headers were held back, as far as it has come."""
        if self._held is None:
            return
        self._disarm()
        self._held, parts, self._parts = None, self._parts, []
        self._by_asgi()
        for part in parts:
            super().on_body(part)

    def shutdown(self) -> None:
        """Close the connection as soon as what has begun on it is answered."""
        self._let_go()
        super().shutdown()

    def on_response_complete(self) -> None:
        """As uvicorn's, but that the timer of an idle connection is not another one after each answer."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        if self._parting is not None:
            self._part(self._parting)
            return
        is_arriving = self._in_message and (self._in_headers or self._held is not None)  # another, which has timers
        self._idle_since = None if is_arriving else self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_later(self.timeout_keep_alive)

    def _unset_keepalive_if_required(self) -> None:
        """Bytes that arrive need not be those of a request: ``on_message_begin`` knows."""

    def _look_later(self, seconds: float) -> None:
        """Whether the connection has been idle for long."""
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """Close what has been idle for long; look again later at what has not; the next answer has it looked at."""
        self.timeout_keep_alive_task = None
        if self._idle_since is None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._look_later(left)
        else:
            super().timeout_keep_alive_handler()

    def answer(self, data: bytes, keep_alive: bool) -> None:
        """Write a whole answer, and close the connection after it or go on to the next request."""
        if self.transport.is_closing():
            return
        self._gathering.write_whole(data)
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()

    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """Those that uvicorn adds to every answer."""
        return self.server_state.default_headers

    def start(self, task: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine that uvicorn waits for when it stops."""
        started = self.loop.create_task(task)
        started.add_done_callback(self.tasks.discard)
        self.tasks.add(started)

    def _check(self, size: int) -> None:
        """Refuse headers that are too many, or whose ``size`` in bytes is too large."""
        if len(self.headers) > self.max_headers:
            self._refuse(431, f"more than {self.max_headers} header lines (setting max_headers)")
        elif size > self.max_header_bytes:
            self._refuse(431, f"more than {self.max_header_bytes} bytes of headers (setting max_header_bytes)")

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.header_timeout, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._refuse(408, f"the headers did not arrive within {self.header_timeout:g} s (setting header_timeout)")

    def _refuse(self, status: int, detail: str) -> None:
        """Answer, then close. Only once a connection, behind the answers that are due, and never into one.

        What has come of the request that is refused is dropped.
        """
        if self._refused:
            return
        self._refused = True
        self._disarm()
        get_logger().info("connection refused", status=status, detail=detail, client=self.client)
        cycle = self.cycle
        in_body = self._in_message and not self._in_headers
        is_its_own = in_body and cycle is not None and getattr(cycle, "more_body", False)  # by ASGI
        if is_its_own and self.pipeline:
            self.pipeline.popleft()
        elif is_its_own:
            cycle.disconnected = True
            cycle.message_event.set()
            self._part(b"" if cycle.response_started else _bytes(status, detail))
            return
        if self.pipeline or is_its_own or (cycle is not None and not cycle.response_complete):
            self._parting = _bytes(status, detail)
        else:
            self._part(_bytes(status, detail))

    def _part(self, last: bytes) -> None:
        """Write that, say that no more comes, drop what still arrives, close shortly.

        A socket closed on unread bytes is reset, and the caller would never read the answer.
        """
        self._parting = None
        self.flow.resume_reading()
        if self.transport.is_closing():
            return
        if last:
            self.transport.write(last)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_SECONDS, self.transport.close)


def _head(parser: httptools.HttpRequestParser, target: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
    """The bytes of a request's head, whose headers hold no line ends: the parser refuses folded ones."""
    lines = [b"%b %b HTTP/%b" % (parser.get_method(), target, parser.get_http_version().encode())]
    lines += [b"%b: %b" % pair for pair in headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def guarded_protocol(settings: Settings, direct: Direct | None = None) -> type[GuardedProtocol]:
    """The protocol class for ``uvicorn.Config(http=…)`` with the caps of ``settings`` and the app's direct way."""
    caps = {
        "direct": direct,
        "max_headers": settings.max_headers,
        "max_header_bytes": settings.max_header_bytes,
        "header_timeout": settings.header_timeout,
        "send_timeout": settings.send_timeout,
        "bodies": Bodies(0, 0) if direct is None else direct.bodies,
    }
    return type("ConfiguredProtocol", (GuardedProtocol,), caps)


def _send_at_once(transport: asyncio.Transport) -> None:
    """Set TCP_NODELAY, which event loops do only for sockets that they opened themselves.

    With Nagle's algorithm the second piece of an answer waits 40 ms for the acknowledgement of the first.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _bytes(status: int, detail: str) -> bytes:
    request_id = uuid.uuid4().hex
    body = bytes(problem(status, detail, request_id).body)
    lines = [
        f"content-type: {MEDIA_TYPE}",
        f"content-length: {len(body)}",
        f"x-request-id: {request_id}",
        "connection: close",
    ]
    return STATUS_LINE[status] + "\r\n".join(lines).encode() + b"\r\n\r\n" + body
