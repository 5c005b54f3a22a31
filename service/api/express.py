"""The short way for small requests of most verbs (SHORT of service.api.routes) without FastAPI's machinery.

FastAPI finds the route, resolves dependencies, validates the query and sends work to a thread in three times the time
that a small model computes for. Here path and query, once looked at, are remembered with what they ask
(service.api.asked), and the work runs where it arrives, together with what else has arrived
(service.inference.batcher). It stands behind all other middleware, so caps, deadlines, request ids, log and metrics are
the same; work, answers and errors are the routes' own. A place or a query that it does not know for certain it hands to
FastAPI unread: what is refused there is refused there. A request that is not light for certain is read, computed and
answered on a worker thread, alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.asked import Addresses, Asked
from service.api.context import Call, Content
from service.api.light import is_light
from service.errors import VaeserveError
from service.inference.jobs import Work, finish

OnError = Callable[[Request, Exception], Awaitable[Response]]


class Express:
    """ASGI middleware, the innermost. ``app`` has the routes of ``addresses``, ``on_error`` its answers to errors."""

    def __init__(self, app: ASGIApp, addresses: Addresses, on_error: OnError) -> None:
        self._app, self._addresses, self._on_error = app, addresses, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = self._asked(scope)
        if asked is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = asked.route
        call = Call.of(Request(scope, receive), self._addresses.house, asked.served)
        try:
            call.body = await _body(receive)
            content, media_type = await _answer(call, asked)
        except (VaeserveError, ClientDisconnect) as error:
            response = await self._on_error(Request(scope, receive), error)
            await response(scope, receive, send)
            return
        headers = [(b"content-length", b"%d" % len(content)), (b"content-type", media_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _asked(self, scope: Scope) -> Asked | None:
        if scope["type"] != "http" or scope.get("root_path"):
            return None
        return self._addresses.find(scope["method"], scope["path"], scope["query_string"])


async def _body(receive: Receive) -> bytes:
    """The whole body, which service.api.middleware caps. Raises ClientDisconnect."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _answer(call: Call, asked: Asked) -> Content:
    """The work's answer; of small requests the jobs are computed with those of others."""
    work, pool = asked.verb.work(call, asked.query), call.house.pool
    if asked.much or not is_light(call, asked.numbers, asked.rows):
        return await call.answered(lambda: finish(work))
    if not asked.verb.several:
        return await _computed(call, work)
    try:
        async with asyncio.timeout(pool.timeout):  # of all its jobs
            return await _computed(call, work)
    except TimeoutError as error:
        raise pool.late() from error


async def _computed(call: Call, work: Work[Content]) -> Content:
    """The work's answer, its jobs computed with those of others."""
    try:
        job = next(work)
        while True:
            job = work.send(await call.house.batcher.run(job, call.gone))
    except StopIteration as done:
        content: Content = done.value
        return content
