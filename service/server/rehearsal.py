"""A worker's app in this process, asked over ASGI: all that a request costs, but for sockets and their parser."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI

from service.api.app import create_app
from service.bundle.manifest import REFERENCE
from service.errors import MeasurementFailed
from service.repository.model_repository import Served, load_repository
from service.server.draining import spare_collections
from service.settings import Settings

VERBS = ("encode", "score")
BATCH = 64
TOO_MUCH = (413, 422)  # the settings allow no such batch


class Asked(NamedTuple):
    """A request of ``rows`` rows, to be sent again and again."""

    path: str
    body: bytes
    rows: int


@asynccontextmanager
async def rehearsal(settings: Settings) -> AsyncIterator[FastAPI]:
    """The app with all its bundles loaded, ready to be asked. Raises as load_repository does."""
    app = create_app(settings, load_repository(settings))
    spare_collections()
    async with app.router.lifespan_context(app):
        yield app


async def requests_for(app: FastAPI, models: Sequence[str]) -> dict[str, Asked]:
    """Encode and score of each of these models, of one row and of a batch, as far as they are answered here.

    Each has been answered once: what is made at first use is made.
    """
    found: dict[str, Asked] = {}
    for served in app.state.context.repository.latest():
        if served.manifest.name not in models:
            continue
        for verb in VERBS:
            for rows in (1, BATCH):
                asked = await _answered(app, served, verb, rows)
                if asked is not None:
                    found[f"{served.manifest.name} {verb} {asked.rows}"] = asked
    return found


async def _answered(app: FastAPI, served: Served, verb: str, rows: int) -> Asked | None:
    """A request of so many rows, or as many of them as are allowed; None if it is refused."""
    while rows:
        asked = Asked(f"/v1/models/{served.manifest.name}/{verb}", _npy(typical_rows(served, rows)), rows)
        status, text = await ask(app, asked)
        if status == 200:
            return asked
        if status >= 500:
            raise MeasurementFailed(f"{asked.path} answers {status}: {text[:500].decode(errors='replace')}")
        rows = rows // 2 if status in TOO_MUCH else 0
    return None


def typical_rows(served: Served, rows: int) -> np.ndarray:
    """Random pixels, uint8, or the reference's rows over and over, in units of their own; in the shape that is sent."""
    rule = served.manifest.preprocessing
    if rule.kind == "image":
        return np.random.RandomState(0).randint(0, 256, (rows, *rule.natural)).astype(np.uint8)
    known = served.model.bundle.arrays(REFERENCE)["x"]
    return known[np.arange(rows) % len(known)].reshape(rows, *rule.natural)


def _npy(rows: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


async def ask(app: FastAPI, asked: Asked) -> tuple[int, bytes]:
    """Status and body of the answer."""
    started: dict[str, Any] = {}
    parts: list[bytes] = []
    waiting: list[dict[str, Any]] = [{"type": "http.request", "body": asked.body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        return await asyncio.get_running_loop().create_future()  # this caller does not hang up

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
        else:
            parts.append(message.get("body", b""))

    await app(_scope(asked), receive, send)
    return started["status"], b"".join(parts)


def _scope(asked: Asked) -> dict[str, Any]:
    headers = [(b"content-type", b"application/x-npy"), (b"content-length", b"%d" % len(asked.body))]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), *headers],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }


async def repeat(app: FastAPI, asked: Asked, connections: int, until: float) -> tuple[list[float], float]:
    """Ask over so many connections, each at least once, until that time; seconds of each answer, when the last came.

    Raises:
        MeasurementFailed: an answer is another than before.
    """
    latencies: list[float] = []

    async def connection() -> None:
        asked_once = False
        while not asked_once or time.monotonic() < until:
            start = time.monotonic()
            status, _ = await ask(app, asked)
            if status != 200:
                raise MeasurementFailed(f"{asked.path} answers {status} under load")
            latencies.append(time.monotonic() - start)
            asked_once = True

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(connections):
                group.create_task(connection())
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return latencies, time.monotonic()
