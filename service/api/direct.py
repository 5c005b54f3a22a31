"""The shortest way: a small request that has arrived whole goes from HTTP's parser to the batcher and back, past ASGI.

ASGI's messages, its task and the middleware around the routes cost a small model's request more than its computation.
Taken are requests of the verbs that service.api.express knows, too, with plain headers and a light body. Those whose
jobs are known to be short are answered in the next turn of the event loop; others have a deadline, and are not computed
if their client has left by then. Everything else goes by ASGI, unread. Work, errors, limits, headers, log and metrics
are the same.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import httptools
from fastapi import FastAPI, Request
from fastapi.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from service.api.asked import Addresses, Asked
from service.api.context import Call, Content
from service.api.heads import Heads
from service.api.light import MOST_BYTES, is_light
from service.api.metrics import Metrics
from service.api.middleware import ANSWER_HEADERS, Bodies, asked_id, report
from service.api.problems import problem
from service.errors import ClientGone, Overloaded, VaeserveError
from service.formats.codecs import media_type
from service.inference.jobs import Again, Job, Work
from service.inference.thread_pool import GONE, WorkerPool
from service.logs import get_logger

OnError = Callable[[Request, Exception], Awaitable[Response]]
Headers = list[tuple[bytes, bytes]]
PlanKey = tuple[bytes, bytes, bytes, bytes]
"""Method, target, Content-Type and Accept."""

MOST_KNOWN = 512
MOST_KEY_BYTES = 512  # of target, Content-Type and Accept
REFUSED_HEADERS = (b"content-encoding", b"transfer-encoding", b"expect", b"upgrade")
HEAD = b"%b%bcontent-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b\r\n"
CLOSE = b"connection: close\r\n"


@dataclass
class Plan:
    """What a target with a Content-Type and an Accept asks for."""

    asked: Asked
    content_type: str
    media_type: str
    accept: str
    path: str


class Connection(Protocol):
    """What is asked of the protocol that a request came by.

    ``headers_at``: when the headers of its last request were complete, by time.perf_counter.
    """

    headers_at: float

    def answer(self, data: bytes, keep_alive: bool) -> None:
        """Write a whole answer, and close the connection after it or go on to the next request."""

    def default_headers(self) -> Headers:
        """Those that the server adds to every answer."""

    def start(self, task: Any) -> None:
        """Run a coroutine that the server waits for when it stops."""


class Direct:
    """The way of one app, for all connections of its event loop. ``on_error`` gives its answers to errors.

    ``metrics`` are those of the app.
    """

    def __init__(self, addresses: Addresses, bodies: Bodies, metrics: Metrics, on_error: OnError) -> None:
        self._addresses, self.bodies, self.metrics, self.on_error = addresses, bodies, metrics, on_error
        self._plans: OrderedDict[PlanKey, Plan] = OrderedDict()
        self.heads: Heads[Plan] = Heads()
        self._most_bytes = min(MOST_BYTES, bodies.most)
        self._server_headers: Headers | None = None
        self._common = b""

    @property
    def fastapi(self) -> FastAPI:
        """The app."""
        return self._addresses.fastapi

    def common(self, server: Headers) -> bytes:
        """The header lines of every answer: those of the ``server``, whose list is another every second, and ours."""
        if server is not self._server_headers:
            self._server_headers, self._common = server, b"".join(map(header_line, [*server, *ANSWER_HEADERS]))
        return self._common

    def plan(self, method: bytes, target: bytes, headers: Headers) -> tuple[Plan, str] | None:
        """What a request with these headers (names in lower case) asks for, and the id it brings; None: by ASGI."""
        named = dict(headers)
        if len(named) < len(headers) or any(name in named for name in REFUSED_HEADERS):
            return None
        if not self._is_small(method, named.get(b"content-length", b"")):
            return None
        key = method, target, named.get(b"content-type", b""), named.get(b"accept", b"")
        found = self._plans.get(key)
        if found is not None:
            self._plans.move_to_end(key)
        else:
            found = self._make(key)
        return None if found is None else (found, named.get(b"x-request-id", b"").decode("latin-1"))

    def _is_small(self, method: bytes, length: bytes) -> bool:
        """A POST with a body, or a GET without one."""
        if method == b"GET":
            return length in (b"", b"0")
        return method == b"POST" and length.isdigit() and 0 < int(length[:20]) <= self._most_bytes

    def _make(self, key: PlanKey) -> Plan | None:
        method, target, content_type, accept = key
        if sum(map(len, key)) > MOST_KEY_BYTES or b"%" in target or not self._addresses.is_open:
            return None
        url = httptools.parse_url(target)
        path = url.path.decode("ascii")
        asked = self._addresses.find(method.decode("ascii"), path, url.query or b"")
        if asked is None or asked.much or asked.verb.several:
            return None
        text = content_type.decode("latin-1")
        plan = Plan(asked, text, media_type(text), accept.decode("latin-1"), path)
        self._plans[key] = plan
        if len(self._plans) > MOST_KNOWN:
            self._plans.popitem(last=False)
        return plan

    def take(
        self, connection: Connection, plan: Plan, asked_for: str, body: bytes, keep_alive: bool
    ) -> Exchange | None:
        """The exchange that answers this request, which asked for that id, under way; None: it is to go by ASGI."""
        house, asked = self._addresses.house, plan.asked
        call = Call(house, asked.served, plan.content_type, plan.media_type, plan.accept, body)
        try:
            if not is_light(call, asked.numbers, asked.rows):
                return None
            work = asked.verb.work(call, asked.query)
            job = next(work)
        except Exception:  # noqa: BLE001 - refused there in the same words, or found to be a fault of ours
            return None
        return self._enter(
            connection, plan, asked_id(asked_for), keep_alive, job, partial(_content_of, work), len(body)
        )

    def repeat(self, connection: Connection, plan: Plan, again: Again, body: bytes) -> Exchange | None:
        """As ``take``, of a request with the head of one that was taken, and a body as long, on a kept connection."""
        try:
            rows = again.read(body)
        except Exception:  # noqa: BLE001 - refused there in the same words, or found to be a fault of ours
            return None
        if rows is None:
            return None
        job = Job(again.key, rows, again.run)
        return self._enter(connection, plan, asked_id(""), True, job, again.answer, len(body))

    def _enter(
        self,
        connection: Connection,
        plan: Plan,
        request_id: str,
        keep_alive: bool,
        job: Job,
        make: Callable[[Any], Content],
        size: int,
    ) -> Exchange | None:
        house = self._addresses.house
        if self.bodies.held + size > self.bodies.most_together:
            return None
        exchange = Exchange(self, connection, plan, request_id, keep_alive, job, make, size, connection.headers_at)
        try:
            is_short = house.batcher.take(exchange)
        except Overloaded:  # refused there in the same words
            return None
        exchange.enter(None if is_short else house.pool)
        return exchange


def _content_of(work: Work[Content], result: Any) -> Content:
    """What the work makes of its only job's result."""
    try:
        work.send(result)
    except StopIteration as done:
        content: Content = done.value
        return content
    raise RuntimeError("work with a second job was taken")


def header_line(pair: tuple[bytes, bytes]) -> bytes:
    """One header as it goes out."""
    return b"%b: %b\r\n" % pair


class _Event:
    """In the place of an asyncio.Event that nobody waits for."""

    def set(self) -> None: ...


NOBODY = _Event()


@dataclass(slots=True, eq=False)
class Exchange:
    """A request that was taken: a ticket of the batcher, and in the eyes of uvicorn's protocol a cycle."""

    direct: Direct
    connection: Connection
    plan: Plan
    request_id: str
    keep_alive: bool
    job: Job
    make: Callable[[Any], Content]
    size: int
    started: float
    disconnected: bool = False
    response_started: bool = False
    response_complete: bool = False
    message_event: _Event = NOBODY
    settled: bool = False
    deadline: asyncio.TimerHandle | None = None

    def enter(self, pool: WorkerPool | None) -> None:
        """Count it as under way, until the timeout of the ``pool`` that computes it."""
        self.direct.bodies.held += self.size
        self.direct.metrics.begun()
        if pool is not None:
            late = partial(self._end, pool.late)
            self.deadline = asyncio.get_running_loop().call_later(pool.timeout, late)

    @property
    def abandoned(self) -> bool:
        """The client has left, or the deadline has passed."""
        return self.disconnected or self.settled

    def drop(self) -> None:
        """As if the client had waited for the news that it has left: it is logged and counted."""
        del self.job
        self._end(lambda: ClientGone(GONE))

    def _end(self, error: Callable[[], VaeserveError]) -> None:
        """Answer with an error, unless there has been an answer."""
        if not self._is_settled():
            self.connection.start(self._refuse(error()))

    def _is_settled(self) -> bool:
        """Whether it has been settled; from now on it is."""
        settled, self.settled = self.settled, True
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
        return settled

    def settle(self, result: Any) -> None:
        """Answer with what the work makes of its job's result, or of the exception that is the result."""
        del self.job  # the body with it: an idle connection keeps its last exchange
        if self._is_settled():
            return
        try:
            self._answer(200, *self._content(result))
        except VaeserveError as error:
            self.connection.start(self._refuse(error))
        except Exception:  # noqa: BLE001 - whatever it is, it must not stop the answers of others
            get_logger().exception("unexpected error", request_id=self.request_id)
            if not self.response_complete:
                self.connection.start(self._fail())

    def _content(self, result: Any) -> Content:
        if isinstance(result, Exception):
            raise result
        if self.disconnected:
            raise ClientGone(GONE)
        return self.make(result)

    async def _fail(self) -> None:
        text = "an unexpected error, which the log explains under this request id"
        self._respond(problem(500, text, self.request_id))

    async def _refuse(self, error: VaeserveError) -> None:
        scope = {"type": "http", "app": self.direct.fastapi, "headers": [], "state": {"request_id": self.request_id}}
        self._respond(await self.direct.on_error(Request(scope), error))

    def _respond(self, response: Response) -> None:
        kind = response.headers["content-type"]
        more = [pair for pair in response.raw_headers if pair[0] not in (b"content-type", b"content-length")]
        self._answer(response.status_code, bytes(response.body), kind, b"".join(map(header_line, more)))

    def _answer(self, status: int, content: bytes, kind: str, more: bytes = b"") -> None:
        plan, direct = self.plan, self.direct
        common = direct.common(self.connection.default_headers())
        more += b"" if self.keep_alive else CLOSE
        head = HEAD % (STATUS_LINE[status], common, kind.encode(), len(content), self.request_id.encode(), more)
        self.response_started = self.response_complete = True
        direct.bodies.held -= self.size
        del self.make
        if not self.disconnected:
            self.connection.answer(head + content, self.keep_alive)
        seconds = time.perf_counter() - self.started
        asked = plan.asked
        report(direct.metrics, self.request_id, asked.verb.method, asked.route.path, plan.path, status, seconds)
