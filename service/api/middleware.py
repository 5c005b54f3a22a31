"""Pure ASGI middleware: request ids, the access log, limits on bodies, security headers.

Starlette's ``BaseHTTPMiddleware`` is not used, since it hides the client's disconnection from the routes.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.headers import header, list_header
from service.api.metrics import Metrics
from service.api.problems import problem
from service.errors import Overloaded, PayloadTooLarge, UnsupportedMediaType
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
_STORE_ASSET = (b"cache-control", b"public, max-age=3600")  # 1.5 MB of script, which only another release changes
LINGER_SECONDS = 0.5  # in which the rest of a refused body is received and dropped
MAX_LENGTH_DIGITS = 18  # of a Content-Length; no body is as long as a number with more of them


class RequestContext:
    """Middleware that gives each request an id, logs and counts its answer, and adds the security headers.

    It is the outermost of ours, so that answers of other middleware are logged as well. Paths may come with the prefix
    ``root_path`` or, from a proxy that strips it, without.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, root_path: str = "") -> None:
        self.app = app
        self.metrics = metrics
        self.root_path = root_path
        self.log = get_logger()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        if self.root_path:
            _add_prefix(scope, self.root_path)
        status, started = 0, time.perf_counter()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, request_id, scope["path"].removeprefix(self.root_path))
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
        """Count and log the answered request, under the template of its route."""
        method, path, route = scope["method"], scope["path"], route_template(scope)
        self.metrics.answered(method, route, status, seconds)
        log_request(
            request_id=scope["state"]["request_id"],
            client=(scope.get("client") or ("",))[0],
            method=method,
            route=route,
            path=path[:200],
            status=status,
            milliseconds=round(seconds * 1e3, 3),
        )


@dataclass
class BodyBudget:
    """The bytes of request bodies that an app holds, ``held``, with their limits.

    ``max_body`` limits one body, ``max_held`` all together. Answers that their clients do not read are counted, too
    (service.server.limits).
    """

    max_body: int
    max_held: int
    held: int = 0


class BodyLimits:
    """Middleware that limits the bytes of a body, and of all bodies together.

    The declared length only serves to refuse early: the bytes that arrive are counted. Errors are raised from
    ``receive``, inside the route, so that the one table of service.api.app answers them.
    """

    def __init__(self, app: ASGIApp, budget: BodyBudget) -> None:
        self.app = app
        self.budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(self.budget, scope, receive)
        try:
            await self.app(scope, body.receive, send)
        finally:
            self.budget.held -= body.size


class _Body:
    """The receive channel of one request, which counts the bytes of its body."""

    def __init__(self, budget: BodyBudget, scope: Scope, receive: Receive) -> None:
        self.budget = budget
        self.scope = scope
        self.upstream = receive
        self.size = 0
        self.started = self.complete = False

    async def receive(self) -> Message:
        """Receive the next message of the request. Raises PayloadTooLarge, UnsupportedMediaType, Overloaded."""
        if self.complete:
            return await self.upstream()
        if not self.started:
            await self._check_headers()
        message = await self.upstream()
        if message["type"] == "http.request":
            self.complete = not message.get("more_body", False)
            await self._account(len(message.get("body", b"")))
        return message

    async def _check_headers(self) -> None:
        """Refuse an encoded body, and one that is declared to be too long."""
        self.started = True
        encodings = list_header(self.scope, b"content-encoding").lower().split(",")
        if any(encoding.strip() not in ("", "identity") for encoding in encodings):
            await self._refuse(UnsupportedMediaType("a Content-Encoding is not read: send the body uncompressed"))
        length = header(self.scope, b"content-length").lstrip("0")
        if length.isdecimal() and (len(length) > MAX_LENGTH_DIGITS or int(length) > self.budget.max_body):
            await self._refuse(self._too_large())

    async def _account(self, size: int) -> None:
        """Count so many bytes more; refuse the body if it, or all bodies together, are too long."""
        budget = self.budget
        self.size += size
        budget.held += size
        if self.size > budget.max_body:
            await self._refuse(self._too_large())
        if budget.held > budget.max_held:
            await self._refuse(Overloaded("the bodies of other requests fill the memory set aside: try again later"))

    def _too_large(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self.budget.max_body} bytes (setting max_body_bytes)")

    async def _refuse(self, error: Exception) -> None:
        """Drop what the client is still sending, for LINGER_SECONDS at most, then raise the error.

        A connection that is closed on unread bytes is reset, and the client would never read the answer.
        """
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while not self.complete:
                    message = await self.upstream()
                    self.complete = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            pass  # the client is slower than we are patient: the answer goes out all the same
        self.complete = True
        raise error


def _add_prefix(scope: Scope, prefix: str) -> None:
    """Have routes, links of the documentation and static files know the prefix, which the path may lack."""
    scope["root_path"] = prefix
    if scope["path"] != prefix and not scope["path"].startswith(f"{prefix}/"):
        scope["path"] = prefix + scope["path"]


def route_template(scope: Scope) -> str:
    """Return the path template of the matched route, else "unmatched": callers must not make up labels of metrics."""
    return getattr(scope.get("route"), "path", "unmatched")


def request_id_of(scope: Scope) -> str:
    """Return the id that a request keeps in its state: the caller's X-Request-ID if it is harmless, else a new one."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        given = header(scope, b"x-request-id")
        state["request_id"] = given if given and _REQUEST_ID.fullmatch(given) else new_request_id()
    request_id: str = state["request_id"]
    return request_id


def new_request_id() -> str:
    """Return 32 random hexadecimal digits."""
    return f"{random.getrandbits(128):032x}"


def _add_headers(start: Message, request_id: str, path: str) -> None:
    """Add the request id and the security headers to an answer, which may have set a Cache-Control itself."""
    headers = list(start.get("headers", ()))
    headers.append((b"x-request-id", request_id.encode()))
    headers.extend(_DOCS_HEADERS if path.startswith("/docs") else _API_HEADERS)
    if b"cache-control" not in dict(headers):
        is_asset = path.startswith("/static-offline-docs/") and start["status"] in (200, 304)
        headers.append(_STORE_ASSET if is_asset else _NO_STORE)
    start["headers"] = headers
