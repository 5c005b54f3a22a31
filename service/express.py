"""The short way for small requests: POST …/encode, /decode, /reconstruct and /score without FastAPI's machinery.

FastAPI finds the route, resolves dependencies, validates the query and sends work to a thread in three times the time
that a small model computes for. Here path and query, once looked at, are remembered with what they ask, and the work
runs where it arrives, together with what else has arrived (service.batching). It stands behind all other middleware,
so caps, deadlines, request ids, log and metrics are the same; work, answers and errors are the routes' own. A
place or a query that it does not know for certain it hands to FastAPI unread: what is refused there is refused there. A
request that is not light for certain is read, computed and answered on a worker thread, alone.
"""

from __future__ import annotations

import math
import re
import struct
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

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
MOST_ROWS, MOST_NUMBERS = 64, 2**16
MOST_CHUNKS = 64
MOST_KNOWN = 512
MOST_QUERY_BYTES = 256
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
PNG_START = 8 + 12 + 13  # where the second chunk begins
PNG_CHUNKS = frozenset(
    {b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"sBIT", b"bKGD", b"tIME", b"IDAT", b"IEND"}
)
NPY_HEAD = 256
NPY_SHAPE = re.compile(rb"'shape': \(([0-9, ]{1,60})\)")

VERSIONED = "/v1/models/{model}/versions/{version}"

OnError = Callable[[Request, Exception], Awaitable[Response]]


class Asked(NamedTuple):
    """A place and a query that are known: of which model which verb with which parameters.

    ``route`` is what FastAPI would have found; ``much`` whether the parameters alone ask for more than a moment's work;
    ``numbers`` how many a row of the model has.
    """

    served: Served
    verb: Verb
    query: Parameters
    route: APIRoute
    much: bool
    numbers: int


class Express:
    """ASGI middleware, the innermost. ``app`` has the routes whose ``verbs`` it may answer, ``on_error`` its answers to
    errors."""

    def __init__(self, app: ASGIApp, fastapi: FastAPI, verbs: Iterable[Verb], on_error: OnError) -> None:
        self._app, self._fastapi, self._on_error = app, fastapi, on_error
        self._verbs = {verb.name: verb for verb in verbs}
        self._routes: Mapping[str, APIRoute] = {}
        self._known: OrderedDict[tuple[str, bytes], Asked] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = self._asked(scope)
        if asked is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = asked.route
        call = Call(Request(scope, receive), self._house, asked.served)
        try:
            call.body = await _body(receive)
            content, media_type = await _answer(call, asked)
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

    def _asked(self, scope: Scope) -> Asked | None:
        """What is asked, remembered by path and query; None where FastAPI is to answer, or to refuse."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope.get("root_path"):
            return None
        key = scope["path"], scope["query_string"]
        known = self._known.get(key)
        if known is not None:
            return known
        found = self._find(*key)
        if found is not None:
            self._known[key] = found
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return found

    def _find(self, path: str, text: bytes) -> Asked | None:
        *place, name = path.split("/")
        verb = self._verbs.get(name)
        query = None if verb is None else _query(verb, text)
        if verb is None or query is None:
            return None
        repository = self._house.repository
        try:
            match place:
                case ["", "v1", "models", model]:
                    served, template = repository.get(model), f"/v1/models/{{model}}/{name}"
                case ["", "v1", "models", model, "versions", version]:
                    served, template = repository.get(model, version), f"{VERSIONED}/{name}"
                case ["", "v1"]:
                    served, template = repository.get(), f"/v1/{name}"
                case _:
                    return None
        except VaeserveError:
            return None  # FastAPI finds the same, and says so
        return Asked(
            served,
            verb,
            query,
            self._route(template),
            _asks_for_much(served, query),
            math.prod(served.manifest.preprocessing.shape),
        )

    def _route(self, template: str) -> APIRoute:
        """The route that FastAPI would have found: service.middleware names it in metrics and log."""
        if not self._routes:
            routes = [route for route in self._fastapi.routes if isinstance(route, APIRoute)]
            self._routes = {route.path: route for route in routes if "POST" in (route.methods or ())}
        return self._routes[template]


def _query(verb: Verb, text: bytes) -> Parameters | None:
    """The query's parameters; None for those that FastAPI is to look at."""
    items = QueryParams(text).multi_items()
    if len(text) > MOST_QUERY_BYTES or len(dict(items)) < len(items):
        return None
    try:
        return verb.query.model_validate(dict(items))
    except ValidationError:
        return None


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


async def _answer(call: Call, asked: Asked) -> Content:
    """The work's answer; of small requests the jobs are computed with those of others."""
    work = asked.verb.work(call, asked.query)
    if asked.much or not _is_light(call, asked.numbers):
        return await call.answered(lambda: finish(work))
    try:
        job = next(work)
        while True:
            job = work.send(await call.house.batcher.run(job, call.gone))
    except StopIteration as done:
        content: Content = done.value
        return content


def _is_light(call: Call, numbers: int) -> bool:
    """Whether all but the jobs takes a moment, for sure: it will run on the event loop.

    Few rows of the model's own size that need no decoder but a plain PNG's.
    """
    if len(call.body) > MOST_BYTES:
        return False
    rows = _plain_rows(call, numbers)
    return rows is not None and rows <= MOST_ROWS and rows * numbers <= MOST_NUMBERS


def _asks_for_much(served: Served, query: Parameters) -> bool:
    """Whole images, or an answer of many numbers."""
    asked = (getattr(query, name, 0) for name in ("samples", "map", "top_latents"))
    return served.tiled is not None or any(asked)


def _plain_rows(call: Call, numbers: int) -> int | None:
    """How many rows the body holds; None where that is not to be seen at once, or where they are to be resized."""
    if call.media_type == OCTETS:
        return len(call.body) // numbers
    if call.media_type == NPY:
        return _npy_rows(call)
    if call.media_type == JSON:
        return _json_rows(call)
    if call.media_type == PNG and _is_plain_png(call.body):
        return 1
    return None


def _npy_rows(call: Call) -> int | None:
    """By the header: latents [M,L], or rows that end in the model's own height and width."""
    found = NPY_SHAPE.search(call.body[:NPY_HEAD])
    shape = [int(side) for side in found[1].split(b",") if side.strip()] if found else []
    natural = list(call.rule.natural)
    width = call.served.manifest.signature.latent_dim
    if len(shape) == 2 and shape[1] == width:
        return shape[0]
    if shape[-len(natural) :] == natural or (call.rule.kind == "image" and shape[-2:] == natural[:2]):
        return math.prod(shape) // math.prod(natural) if math.prod(natural) else None
    return None


def _json_rows(call: Call) -> int | None:
    """Nested lists of numbers alone; parameters beside them may ask for much, strings may hold pictures."""
    document = call.document
    if not isinstance(document, dict) or not document.keys() <= {"images", "dtype", "rows", "latents"}:
        return None
    rows = document.get("images", document.get("rows", document.get("latents")))
    if not isinstance(rows, list) or len(rows) > MOST_ROWS or not all(isinstance(row, list) for row in rows):
        return None
    return len(rows)


def _is_plain_png(body: bytes) -> bool:
    """A PNG of few pixels and chunks, none of which could be large inflated but the pixels themselves."""
    if not body.startswith(PNG_HEAD) or len(body) < PNG_START:
        return False
    width, height = struct.unpack_from(">II", body, len(PNG_HEAD))
    if width * height > MOST_PIXELS:
        return False
    at = PNG_START
    for _ in range(MOST_CHUNKS):
        if at + 8 > len(body):
            return True  # cut short: refused in a moment
        size, kind = struct.unpack_from(">I4s", body, at)
        if kind not in PNG_CHUNKS:
            return False
        at += 12 + size
    return False
