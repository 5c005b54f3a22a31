"""What every route needs: the app's parts, the addressed model, the body, a worker, a negotiated answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request
from fastapi.responses import Response

from service.arrays import parse_json
from service.batching import Batcher
from service.bundle import InputRule
from service.codecs import Limits, media_type
from service.drift import DriftWatch
from service.errors import LimitExceeded
from service.headers import header
from service.images import ImageLimits
from service.jobs import Work
from service.metrics import Metrics
from service.negotiation import negotiate
from service.pool import WorkerPool
from service.repository import ModelRepository, Served
from service.schemas import Parameters
from service.settings import Settings

JSON, NPY, PNG, GIF, WEBP = "application/json", "application/x-npy", "image/png", "image/gif", "image/webp"
PICTURES = (PNG, GIF, WEBP)

Content = tuple[bytes, str]
"""An answer's body and media type."""


@dataclass
class House:
    """The parts of one app."""

    settings: Settings
    repository: ModelRepository
    pool: WorkerPool
    batcher: Batcher
    metrics: Metrics
    drift: DriftWatch
    draining: bool = field(default=False)

    @cached_property
    def image_limits(self) -> Limits:
        """What one request's images may take."""
        settings = self.settings
        return Limits(
            settings.max_batch,
            ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            settings.max_batch_pixels,
            settings.max_numbers_in,
        )

    def limit(self, name: str, asked: int, setting: str) -> None:
        """Refuse ``asked`` above the setting of that name.

        Raises:
            LimitExceeded: with the name, what was asked and what is allowed.
        """
        allowed = getattr(self.settings, setting)
        if asked > allowed:
            raise LimitExceeded(f"{name} is {asked}: at most {allowed} here (setting {setting})")

    def limit_numbers_out(self, rows: int, each: int) -> None:
        """Refuse an answer of so many rows with ``each`` numbers above the setting max_numbers_out."""
        self.limit(f"the count of numbers in the answer ({rows} rows of {each})", rows * each, "max_numbers_out")


async def get_house(request: Request) -> House:
    """Dependency: the parts of the app."""
    house: House = request.app.state.house
    return house


HouseDep = Annotated[House, Depends(get_house)]


async def latest(request: Request, house: HouseDep, model: str) -> None:
    """Dependency of /v1/models/{model}/…: the latest version."""
    request.state.served = house.repository.get(model)


async def versioned(request: Request, house: HouseDep, model: str, version: str) -> None:
    """Dependency of /v1/models/{model}/versions/{version}/…"""
    request.state.served = house.repository.get(model, version)


async def default(request: Request, house: HouseDep) -> None:
    """Dependency of /v1/…: the default model."""
    request.state.served = house.repository.get()


@dataclass
class Call:
    """One request to a verb of a model, once its headers are read.

    ``rule`` is what a row of that model is, ``content_type`` the header of that name, "" if absent, ``media_type`` that
    without its parameters.
    """

    request: Request
    house: House
    served: Served
    body: bytes = b""
    rule: InputRule = field(init=False)
    content_type: str = field(init=False)
    media_type: str = field(init=False)

    def __post_init__(self) -> None:
        self.rule = self.served.manifest.preprocessing
        self.content_type = header(self.request.scope, b"content-type")
        self.media_type = media_type(self.content_type)

    @cached_property
    def document(self) -> Any:
        """The JSON body, parsed once. Raises as arrays.parse_json does."""
        return parse_json(self.body)

    def negotiate(self, offers: Sequence[str]) -> str:
        """The offered media type that Accept prefers; only of images there are pictures.

        Raises:
            NotAcceptable: none of them.
        """
        if self.rule.kind != "image":
            offers = [offer for offer in offers if offer not in PICTURES]
        return negotiate(header(self.request.scope, b"accept"), offers)

    async def answer(self, work: Callable[[], Content]) -> Response:
        """Run ``work`` on a worker thread; it gives the answer's body and media type."""
        content, media_type = await self.answered(work)
        return Response(content, media_type=media_type)

    async def answered(self, work: Callable[[], Content]) -> Content:
        """What ``work`` gives, from a worker thread. Raises as WorkerPool.run does."""
        return await self.house.pool.run(work, self.gone)

    async def gone(self) -> None:
        """Returns when the client has left."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


@dataclass(frozen=True)
class Verb:
    """What POST …/``name`` does: ``work`` of a call and its ``query``."""

    name: str
    query: type[Parameters]
    work: Callable[[Call, Any], Work[Content]]


async def get_call(request: Request, house: HouseDep) -> Call:
    """Dependency: the call with its whole body (the middleware caps it)."""
    chunks = [chunk async for chunk in request.stream()]
    return Call(request, house, request.state.served, b"".join(chunks))


CallDep = Annotated[Call, Depends(get_call)]


def dump(content: dict[str, Any]) -> bytes:
    """JSON with arrays as nested lists; orjson writes NaN and infinities as null."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
