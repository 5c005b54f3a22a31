"""Pure ASGI middleware: context of a request, the access log, caps of the body, security headers.

``BaseHTTPMiddleware`` is not used: it hides the client's disconnection from the routes.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Coroutine, Generator
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.headers import header
from service.api.metrics import Metrics
from service.api.problems import problem
from service.errors import Overloaded, PayloadTooLarge, ReceiveTimeout, UnsupportedMediaType
from service.logs import get_logger, log_request

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"
_DOCS_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'"
)
_SECURITY = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_API_HEADERS = (*_SECURITY, (b"content-security-policy", _API_POLICY.encode()))
_DOCS_HEADERS = (*_SECURITY, (b"content-security-policy", _DOCS_POLICY.encode()))
_NO_STORE = (b"cache-control", b"no-store")
ANSWER_HEADERS = (*_API_HEADERS, _NO_STORE)
"""What every answer of the API carries beside its request id."""
_LINGER_SECONDS = 0.5


class RequestContext:
    """Gives each request an id (the caller's X-Request-ID if it is harmless), logs and counts its answer.

    Outermost of all, so that answers of other middleware are logged as well. Adds the security headers.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics
        self.log = get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = asked_id(header(scope, b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status, started = 0, time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, request_id, scope["path"])
            await send(message)

        self.metrics.begun()
        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:
            self.log.exception("unexpected error", request_id=request_id)
            if status == 0:
                text = "an unexpected error, which the log explains under this request id"
                await problem(500, text, request_id)(scope, receive, send_with_headers)
        finally:
            self._report(scope, status, time.perf_counter() - started)

    def _report(self, scope: Scope, status: int, seconds: float) -> None:
        request_id = scope["state"]["request_id"]
        report(self.metrics, request_id, scope["method"], route_template(scope), scope["path"], status, seconds)


def report(metrics: Metrics, request_id: str, method: str, route: str, path: str, status: int, seconds: float) -> None:
    """Count and log an answered request; ``route`` is its template."""
    metrics.answered(method, route, status, seconds)
    log_request(
        request_id=request_id,
        method=method,
        route=route,
        path=path[:200],
        status=status,
        milliseconds=round(seconds * 1e3, 3),
    )


@dataclass
class Bodies:
    """The bodies of an app's requests: ``most`` bytes of one, ``most_together`` of all that are ``held`` at once."""

    most: int
    most_together: int
    held: int = 0


class BodyGuard:
    """Caps a body's bytes and the time in which it must arrive, and the bytes of all bodies held at once.

    The declared length is only used to refuse early; what counts is what arrives. Errors are raised from ``receive``,
    inside the route, and so end in the one table of app.py.
    """

    def __init__(self, app: ASGIApp, bodies: Bodies, timeout: float) -> None:
        self.app = app
        self.bodies = bodies
        self.timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(self, scope, receive)
        try:
            await self.app(scope, body.receive, send)
        finally:
            self.bodies.held -= body.size


class _Body:
    """The receive side of one request."""

    def __init__(self, guard: BodyGuard, scope: Scope, receive: Receive) -> None:
        self.guard = guard
        self.upstream = receive
        self.encoding = header(scope, b"content-encoding").strip().lower()
        self.declared = header(scope, b"content-length")
        self.size = 0
        self.complete = False
        self.deadline = asyncio.get_running_loop().time() + guard.timeout

    async def receive(self) -> Message:
        if self.complete:
            return await self.upstream()
        await self._check_declared()
        message = await self._next()
        if message["type"] == "http.request":
            self.complete = not message.get("more_body", False)
            await self._account(len(message.get("body", b"")))
        return message

    async def _next(self) -> Message:
        arriving: Any = self.upstream()
        try:
            waits_for = arriving.send(None)
        except StopIteration as arrived:  # it lay ready, as a small body does: nothing to time
            message: Message = arrived.value
            return message
        try:
            async with asyncio.timeout_at(self.deadline):
                return await _Rest(arriving, waits_for)
        except TimeoutError as error:
            raise ReceiveTimeout(
                f"the body did not arrive within {self.guard.timeout:g} s (setting receive_timeout)"
            ) from error

    async def _check_declared(self) -> None:
        if self.encoding not in ("", "identity"):
            await self._refuse(UnsupportedMediaType("a Content-Encoding is not read: send the body uncompressed"))
        if self.declared.isdecimal() and int(self.declared[:20]) > self.guard.bodies.most:
            await self._refuse(self._too_large())

    async def _account(self, size: int) -> None:
        self.size += size
        self.guard.bodies.held += size
        if self.size > self.guard.bodies.most:
            await self._refuse(self._too_large())
        if self.guard.bodies.held > self.guard.bodies.most_together:
            await self._refuse(Overloaded("the bodies of other requests fill the memory set aside: try again later"))

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self.guard.bodies.most} bytes (setting max_body_bytes)")

    async def _refuse(self, error: Exception) -> None:
        """Raise, but first drop what the caller is still sending, for a moment.

        A connection closed on unread bytes is reset, and the caller would never read the answer.
        """
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while not self.complete:
                    message = await self.upstream()
                    self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            pass  # the caller is slower than we are patient: the answer goes out all the same
        self.complete = True
        raise error


class _Rest:
    """What is left of a coroutine that was started by hand and waits for ``waits_for``, to be awaited once."""

    def __init__(self, started: Coroutine[Any, Any, Message], waits_for: Any) -> None:
        self._started, self._waits_for = started, waits_for

    def __await__(self) -> Generator[Any, Any, Message]:
        waits_for = self._waits_for
        try:
            while True:
                try:
                    sent = yield waits_for
                except BaseException as error:  # noqa: BLE001 - a cancellation, say: it is for the coroutine
                    waits_for = self._started.throw(error)
                else:
                    waits_for = self._started.send(sent)
        except StopIteration as done:
            message: Message = done.value
            return message


def route_template(scope: Scope) -> str:
    """Path template of the matched route; "unmatched" otherwise, so that labels cannot be made up by callers."""
    return getattr(scope.get("route"), "path", "unmatched")


def asked_id(asked: str) -> str:
    """The request id that was asked for if it is harmless, else a new one."""
    return asked if asked and _REQUEST_ID.fullmatch(asked) else f"{random.getrandbits(128):032x}"


def _add_headers(start: Message, request_id: str, path: str) -> None:
    """To those of the answer, which sets none of these itself but for a cache-control."""
    headers = list(start.get("headers", ()))
    headers.append((b"x-request-id", request_id.encode()))
    headers.extend(_DOCS_HEADERS if path.startswith("/docs") else _API_HEADERS)
    if b"cache-control" not in dict(headers):
        headers.append(_NO_STORE)
    start["headers"] = headers
