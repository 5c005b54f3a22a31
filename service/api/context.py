"""The parts of one app, and one request to a verb of a model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import orjson
from fastapi import Depends, Request

from service.api.metrics import Metrics
from service.api.negotiation import negotiate
from service.bundle.input_rules import InputRule, Preprocessing
from service.calibration.drift_monitor import Drift
from service.errors import LimitExceeded
from service.formats.arrays import parse_json
from service.formats.codecs import Limits, Reader
from service.formats.images import ImageLimits
from service.formats.media_types import PICTURES, media_type
from service.inference.batcher import Batcher
from service.inference.model import Model
from service.inference.thread_pool import WorkerPool
from service.repository.model_repository import ModelRepository, Served
from service.settings import Settings

Content = tuple[bytes, str]
"""An answer's body and media type."""


@dataclass
class AppContext:
    """What the routes of one app share, from its start to its end."""

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
        """The limits on the images of one request."""
        settings = self.settings
        return Limits(
            settings.max_batch,
            ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            settings.max_batch_pixels,
            settings.max_numbers_in,
        )

    def reader(self, served: Served, strict: bool) -> Reader:
        """The reader of images for ``served``, a model of images; ``strict`` refuses images of another size."""
        key = served.model, strict
        if key not in self._readers:
            assert isinstance(served.manifest.preprocessing, Preprocessing)
            self._readers[key] = Reader(served.manifest.preprocessing, self.image_limits, strict)
        return self._readers[key]

    def limit(self, name: str, value: int, setting: str) -> None:
        """Raise LimitExceeded if ``value`` is above the setting of that name; ``name`` says what the value is of."""
        allowed = getattr(self.settings, setting)
        if value > allowed:
            raise LimitExceeded(f"{name} is {value}: at most {allowed} here (setting {setting})")

    def limit_numbers_out(self, rows: int, numbers: int) -> None:
        """Raise LimitExceeded for an answer of ``rows`` rows of ``numbers`` numbers above setting max_numbers_out."""
        self.limit(f"the count of numbers in the answer ({rows} rows of {numbers})", rows * numbers, "max_numbers_out")


async def get_context(request: Request) -> AppContext:
    """Dependency: the parts of the app."""
    context: AppContext = request.app.state.context
    return context


ContextDep = Annotated[AppContext, Depends(get_context)]


async def latest(request: Request, context: ContextDep, model: str) -> None:
    """Dependency of /v1/models/{model}/…: puts the latest version of the model into the request's state."""
    request.state.served = context.repository.get(model)


async def versioned(request: Request, context: ContextDep, model: str, version: str) -> None:
    """Dependency of /v1/models/{model}/versions/{version}/…: puts that version into the request's state."""
    request.state.served = context.repository.get(model, version)


async def default(request: Request, context: ContextDep) -> None:
    """Dependency of /v1/…: puts the default model into the request's state."""
    request.state.served = context.repository.get()


PREFIXES: dict[str, Callable[..., Awaitable[None]]] = {
    "/v1/models/{model}": latest,
    "/v1/models/{model}/versions/{version}": versioned,
    "/v1": default,
}
"""The addresses of a model, and the dependency that looks the model up."""


@dataclass
class Call:
    """One request to a verb of a model: its headers and its body.

    ``content_type`` and ``accept`` are the headers of these names, "" if absent.
    """

    context: AppContext
    served: Served
    content_type: str
    accept: str
    body: bytes = b""

    @cached_property
    def media_type(self) -> str:
        """The Content-Type without its parameters, in lower case."""
        return media_type(self.content_type)

    @property
    def rule(self) -> InputRule:
        """How the model's rows come about: shape, kind, resizing."""
        return self.served.manifest.preprocessing

    @cached_property
    def document(self) -> Any:
        """The JSON body, parsed once. Raises as arrays.parse_json does."""
        return parse_json(self.body)

    def forget_body(self) -> None:
        """Drop the body and the document parsed from it: a request that waits keeps only the arrays made of them."""
        self.body = b""
        self.__dict__.pop("document", None)

    def with_body(self, body: bytes) -> Call:
        """A call with the same headers and another body."""
        return Call(self.context, self.served, self.content_type, self.accept, body)

    def negotiate(self, offers: tuple[str, ...]) -> str:
        """The media type among ``offers`` that Accept prefers; pictures are offered of images only.

        Raises:
            NotAcceptable: Accept names none of them.
        """
        if self.rule.kind != "image":
            offers = tuple(offer for offer in offers if offer not in PICTURES)
        return negotiate(self.accept, offers)


def dump(content: dict[str, Any]) -> bytes:
    """JSON with arrays as nested lists; NaN and infinities become null, which is how orjson writes them."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
