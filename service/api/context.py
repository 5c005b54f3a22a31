"""What every route needs: the app's parts, the addressed model, the body, a worker, a negotiated answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request
from fastapi.responses import Response
from starlette.types import Receive

from service.api.headers import header
from service.api.metrics import Metrics
from service.api.negotiation import negotiate
from service.api.schemas import Parameters
from service.bundle.manifest import InputRule, Preprocessing
from service.calibration.drift_monitor import Drift
from service.errors import LimitExceeded
from service.formats.arrays import parse_json
from service.formats.codecs import Limits, Reader, media_type
from service.formats.images import ImageLimits
from service.inference.batcher import Batcher
from service.inference.jobs import Work
from service.inference.model import Model
from service.inference.thread_pool import WorkerPool
from service.repository.model_repository import ModelRepository, Served
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
    drift: Drift
    draining: bool = field(default=False)
    _readers: dict[tuple[Model, bool], Reader] = field(default_factory=dict, repr=False)

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

    def reader(self, served: Served, strict: bool) -> Reader:
        """What reads the images of a model of images; made once."""
        key = served.model, strict
        if key not in self._readers:
            assert isinstance(served.manifest.preprocessing, Preprocessing)
            self._readers[key] = Reader(served.manifest.preprocessing, self.image_limits, strict)
        return self._readers[key]

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

    ``content_type`` and ``accept`` are the headers of these names, "" if absent, ``media_type`` the former without its
    parameters; ``receive`` is what else comes of the connection, where somebody may wait for that.
    """

    house: House
    served: Served
    content_type: str
    media_type: str
    accept: str
    body: bytes = b""
    receive: Receive | None = None

    @classmethod
    def of(cls, request: Request, house: House, served: Served, body: bytes = b"") -> Call:
        """The call of an ASGI request."""
        content_type = header(request.scope, b"content-type")
        accept = header(request.scope, b"accept")
        return cls(house, served, content_type, media_type(content_type), accept, body, request.receive)

    @property
    def rule(self) -> InputRule:
        """What a row of the model is."""
        return self.served.manifest.preprocessing

    @cached_property
    def document(self) -> Any:
        """The JSON body, parsed once. Raises as arrays.parse_json does."""
        return parse_json(self.body)

    def forget_body(self) -> None:
        """It has been read: neither it nor what was parsed of it is kept for as long as the request waits."""
        self.body = b""
        self.__dict__.pop("document", None)

    def negotiate(self, offers: tuple[str, ...]) -> str:
        """The offered media type that Accept prefers; only of images there are pictures.

        Raises:
            NotAcceptable: none of them.
        """
        if self.rule.kind != "image":
            offers = tuple(offer for offer in offers if offer not in PICTURES)
        return negotiate(self.accept, offers)

    async def answer(self, work: Callable[[], Content]) -> Response:
        """Run ``work`` on a worker thread; it gives the answer's body and media type."""
        content, media_type = await self.answered(work)
        return Response(content, media_type=media_type)

    async def answered(self, work: Callable[[], Content]) -> Content:
        """What ``work`` gives, from a worker thread. Raises as WorkerPool.run does."""
        return await self.house.pool.run(work, self.gone)

    async def gone(self) -> None:
        """Returns when the client has left."""
        assert self.receive is not None
        while (await self.receive())["type"] != "http.disconnect":
            pass


@dataclass(frozen=True)
class Verb:
    """What a request of …/``name`` by ``method`` does: ``work`` of a call and its ``query``.

    ``rows`` tells how many the query asks for, of a verb whose requests have no body; ``several``: its work has more
    than one job.
    """

    name: str
    query: type[Parameters]
    work: Callable[[Call, Any], Work[Content]]
    method: str = "POST"
    rows: Callable[[Any], int] | None = None
    several: bool = False


async def get_call(request: Request, house: HouseDep) -> Call:
    """Dependency: the call with its whole body (the middleware caps it)."""
    chunks = [chunk async for chunk in request.stream()]
    return Call.of(request, house, request.state.served, b"".join(chunks))


CallDep = Annotated[Call, Depends(get_call)]


def dump(content: dict[str, Any]) -> bytes:
    """JSON with arrays as nested lists; orjson writes NaN and infinities as null."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
