"""The short way for small requests: POST …/encode, /decode, /reconstruct and /score without FastAPI's machinery.

FastAPI finds the route, resolves dependencies, validates the query and sends work to a thread in three times the time
that a small model computes for. Here a table finds the verb, a validated query is remembered by its text, and the work
runs where it arrives, together with what else has arrived (service.batching). It stands behind all other middleware,
so caps, deadlines, request ids, log and metrics are the same; work, answers and errors are the routes' own. What it
does not know for certain to be small and sound it hands to FastAPI unread: what is refused there is refused there.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import VaeserveError
from service.jobs import finish
from service.repository import Served
from service.routes.house import JSON, NPY, PNG, Call, Content, House, Verb
from service.schemas import Parameters

OCTETS = "application/octet-stream"
MOST_BYTES = 2**16  # of a body: what is read and answered on the event loop, where all other connections wait
MOST_PIXELS = 2**16  # of a PNG, by its header: few bytes may hold many
KNOWN_QUERIES = 512
MOST_QUERY_BYTES = 256
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"

VERSIONED = "/v1/models/{model}/versions/{version}"

OnError = Callable[[Request, Exception], Awaitable[Response]]


class Express:
    """ASGI middleware, the innermost. ``app`` has the routes whose ``verbs`` it may answer, ``on_error`` its answers to
    errors."""

    def __init__(self, app: ASGIApp, fastapi: FastAPI, verbs: Iterable[Verb], on_error: OnError) -> None:
        self._app, self._fastapi, self._on_error = app, fastapi, on_error
        self._verbs = {verb.name: verb for verb in verbs}
        self._routes: Mapping[str, APIRoute] = {}
        self._queries: OrderedDict[tuple[str, bytes], Parameters] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._find(scope)
        if found is None:
            await self._app(scope, receive, send)
            return
        served, verb, query, template = found
        scope["route"] = self._route(template)
        call = Call(Request(scope, receive), self._house, served)
        try:
            call.body = await _body(receive)
            content, media_type = await _answer(call, verb, query)
        except (VaeserveError, ClientDisconnect) as error:
            response = await self._on_error(call.request, error)
            await response(scope, receive, send)
            return
        headers = [(b"content-length", b"%d" % len(content)), (b"content-type", media_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    @property
    def _house(self) -> House:
        house: House = self._fastapi.state.house
        return house

    def _find(self, scope: Scope) -> tuple[Served, Verb, Parameters, str] | None:
        """What is asked, and the template of its path; None where FastAPI is to answer, or to refuse."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope.get("root_path"):
            return None
        *place, name = scope["path"].split("/")
        verb = self._verbs.get(name)
        query = None if verb is None else self._query(verb, scope["query_string"])
        if verb is None or query is None:
            return None
        repository = self._house.repository
        try:
            match place:
                case ["", "v1", "models", model]:
                    return repository.get(model), verb, query, f"/v1/models/{{model}}/{name}"
                case ["", "v1", "models", model, "versions", version]:
                    return repository.get(model, version), verb, query, f"{VERSIONED}/{name}"
                case ["", "v1"]:
                    return repository.get(), verb, query, f"/v1/{name}"
        except VaeserveError:
            pass  # FastAPI finds the same, and says so
        return None

    def _query(self, verb: Verb, text: bytes) -> Parameters | None:
        """The query's parameters, remembered by their text; None for those that FastAPI is to look at."""
        key = (verb.name, text)
        if key in self._queries:
            return self._queries[key]
        items = QueryParams(text).multi_items()
        if len(text) > MOST_QUERY_BYTES or len(dict(items)) < len(items):
            return None
        try:
            found = verb.query.model_validate(dict(items))
        except ValidationError:
            return None
        self._queries[key] = found
        if len(self._queries) > KNOWN_QUERIES:
            self._queries.popitem(last=False)
        return found

    def _route(self, template: str) -> APIRoute:
        """The route that FastAPI would have found: service.middleware names it in metrics and log."""
        if not self._routes:
            routes = [route for route in self._fastapi.routes if isinstance(route, APIRoute)]
            self._routes = {route.path: route for route in routes if "POST" in (route.methods or ())}
        return self._routes[template]


async def _body(receive: Receive) -> bytes:
    """The whole body, which service.middleware caps. Raises ClientDisconnect."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _answer(call: Call, verb: Verb, query: Parameters) -> Content:
    """The work's answer; of small requests the jobs are computed with those of others."""
    work = verb.work(call, query)
    if not _is_light(call):
        return await call.answered(lambda: finish(work))
    try:
        job = next(work)
        while True:
            job = work.send(await call.house.batcher.run(job, call.gone))
    except StopIteration as done:
        content: Content = done.value
        return content


def _is_light(call: Call) -> bool:
    """Whether all but the jobs takes a moment, for sure: it will run on the event loop."""
    if len(call.body) > MOST_BYTES or call.served.tiled is not None:
        return False
    if call.media_type == PNG:
        return _png_pixels(call.body) <= MOST_PIXELS
    return call.media_type in (OCTETS, NPY, JSON)


def _png_pixels(body: bytes) -> int:
    """Width times height by a PNG's header, 0 of what is none: to be refused in a moment."""
    if not body.startswith(PNG_HEAD) or len(body) < len(PNG_HEAD) + 8:
        return 0
    width, height = struct.unpack_from(">II", body, len(PNG_HEAD))
    return int(width * height)
