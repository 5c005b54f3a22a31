"""The endpoint of every verb: it reads the body, has the job computed, and writes the answer.

A verb is an ordinary route of the FastAPI app. FastAPI looks the model up, validates the query and resolves
dependencies; the path function then returns a response that calls a ``ResolvedRequest``, the ASGI application that does
the rest. ``RouteResolver``, the innermost middleware, remembers that application by method, path and query, so that the
next such request is not validated again. All other middleware stands before it, and no request is remembered whose
route depends on anything else, so that neither is ever skipped.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.context import PREFIXES, AppContext, Call, Content
from service.api.headers import header, list_header
from service.api.small_requests import fits_event_loop
from service.errors import InvalidInput
from service.formats.media_types import PNG
from service.inference.jobs import Job, RequestReader, Work, finish
from service.repository.model_repository import Served
from service.repository.score_parameters import Parameters

MAX_RESOLVED, MAX_READERS = 512, 32  # resolved requests of an app; readers of each, which take some 2 kB
MAX_KEY_CHARACTERS = 512  # of what a request is remembered by

T = TypeVar("T")


@dataclass(frozen=True)
class Verb:
    """A verb of a model: ``work`` answers a call with its validated parameters.

    ``rows`` is given for a verb whose requests need no body, and returns how many rows the parameters ask for; a body,
    which may ask for more, is then read on a worker thread. ``asks_for_much`` is True of parameters, for a model of so
    many numbers a row, that alone ask for work which the event loop must not do. ``several``: it has more than one job.
    """

    work: Callable[[Call, Any], Work[Content]]
    rows: Callable[[Any], int] | None = None
    asks_for_much: Callable[[Any, int], bool] = lambda parameters, numbers: False
    several: bool = False


class ResolvedRequest:
    """An ASGI application that answers requests of one method, path and query, which are resolved already.

    Requests that also share their headers and length are read by the same ``RequestReader``, which is remembered.
    """

    def __init__(self, context: AppContext, served: Served, verb: Verb, query: Parameters, route: APIRoute) -> None:
        self.route = route
        self.scope: dict[str, Any] = {}  # what FastAPI's router adds to the scope of such requests
        self._context, self._served, self._verb, self._query = context, served, verb, query
        self._numbers = math.prod(served.manifest.preprocessing.shape)
        self._rows = None if verb.rows is None else verb.rows(query)
        self._needs_thread = served.tiled is not None or verb.asks_for_much(query, self._numbers)
        self._readers: OrderedDict[Hashable, RequestReader] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content_type, accept = header(scope, b"content-type"), list_header(scope, b"accept")
        body = await read_body(receive)
        key = content_type, accept, 0 if content_type == PNG else len(body)  # a PNG says itself how large it is
        reader, rows = self._read_again(key, body)
        disconnected = partial(wait_for_disconnect, receive)
        if reader is not None and rows is not None:
            del body
            job = Job(reader.key, rows, reader.run)
            content, media_type = reader.answer(await self._context.batcher.run(job, disconnected))
        else:
            call = Call(self._context, self._served, content_type, accept, body)
            del body
            content, media_type = await self._answer(call, key, disconnected)
        headers = [(b"content-length", b"%d" % len(content)), (b"content-type", media_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _read_again(self, key: Hashable, body: bytes) -> tuple[RequestReader | None, np.ndarray | None]:
        """Read the rows of a body by the reader that is remembered for its headers and length, if there is one."""
        reader = self._readers.get(key)
        try:
            return reader, None if reader is None else reader.read(body)
        except InvalidInput:  # raised anew, with the row's name, when the body is read as any other
            return None, None

    async def _answer(self, call: Call, key: Hashable, disconnected: Callable[[], Any]) -> Content:
        """Answer a call: on the event loop if it is small, its jobs batched with those of others, else on a thread."""
        work, pool = self._verb.work(call, self._query), self._context.pool
        if self._needs_thread or not fits_event_loop(call, self._numbers, self._rows):
            return await pool.run(lambda: finish(work), disconnected)
        if not self._verb.several:
            return await self._compute(work, key, disconnected)
        try:
            async with asyncio.timeout(pool.timeout):  # of all its jobs
                return await self._compute(work, key, disconnected)
        except TimeoutError as error:
            raise pool.deadline_error() from error

    async def _compute(self, work: Work[Content], key: Hashable, disconnected: Callable[[], Any]) -> Content:
        """Run the work on the event loop, its jobs in the batcher, and remember its reader."""
        try:
            job = next(work)
            if job.reader is not None:
                _remember(self._readers, key, job.reader, MAX_READERS)
            while True:
                job = work.send(await self._context.batcher.run(job, disconnected))
        except StopIteration as done:
            content: Content = done.value
            return content


ResolvedRequests = OrderedDict[Hashable, ResolvedRequest]
"""Resolved requests of an app by method, path and query; its next lifespan begins without any."""


class RouteResolver:
    """Middleware that answers a request by its ResolvedRequest, if one of its method, path and query is remembered.

    HEAD is answered as GET is; the server leaves the body out.
    """

    def __init__(self, app: ASGIApp, remembered: ResolvedRequests) -> None:
        self.app, self._remembered = app, remembered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            as_get = {**scope, "method": "GET"}
            await self(as_get, receive, send)
            scope["route"] = as_get.get("route")
            return
        key = _key(scope) if scope["type"] == "http" else None
        resolved = self._remembered.get(key)
        if resolved is None or scope["app"].dependency_overrides:
            await self.app(scope, receive, send)
            return
        self._remembered.move_to_end(key)
        scope.update(resolved.scope)
        try:
            await resolved(scope, receive, send)
        except Exception as error:
            handlers = scope["app"].exception_handlers
            handler = next((handlers[kind] for kind in type(error).__mro__[:-2] if kind in handlers), None)
            if handler is None:
                raise
            request = Request(scope, receive)
            is_async = iscoroutinefunction(handler)
            response = await (handler(request, error) if is_async else run_in_threadpool(handler, request, error))
            await response(scope, receive, send)


class _ResolvedResponse(Response):
    """The response of a path function, which FastAPI calls: it hands the request on to a ResolvedRequest."""

    def __init__(self, endpoint: ResolvedRequest) -> None:
        super().__init__()
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


def respond(request: Request, verb: Verb, query: Parameters) -> Response:
    """Return the response of a path function, whose ``query`` is validated; the model is in the request's state."""
    state, scope = request.app.state, request.scope
    resolved = ResolvedRequest(state.context, request.state.served, verb, query, scope["route"])
    if state.remembers and _depends_on_address_only(resolved.route):
        resolved.scope = {name: scope[name] for name in ("route", "endpoint", "path_params")}
        _remember(state.remembered, _key(scope), resolved, MAX_RESOLVED)
    return _ResolvedResponse(resolved)


def _depends_on_address_only(route: APIRoute) -> bool:
    """True if FastAPI reads nothing but path and query for the route, so that remembering it skips nothing."""
    dependant = route.dependant
    if dependant.header_params or dependant.cookie_params or dependant.body_params:
        return False
    return {dependency.call for dependency in dependant.dependencies} <= set(PREFIXES.values())


async def read_body(receive: Receive) -> bytes:
    """Receive the whole body, which the middleware limits. Raises starlette's ClientDisconnect."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _remember(remembered: OrderedDict[Hashable, T], key: Hashable, value: T, max_count: int) -> None:
    """Add a value to those that are remembered, unless its key is long; forget the oldest of over ``max_count``."""
    if len(str(key)) <= MAX_KEY_CHARACTERS:
        remembered[key] = value
        if len(remembered) > max_count:
            remembered.popitem(last=False)


def _key(scope: Scope) -> Hashable:
    """Return what a resolved request is remembered by."""
    return scope["method"], scope.get("root_path", ""), scope["path"], scope["query_string"]
