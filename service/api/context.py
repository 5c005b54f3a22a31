"""What the routes of an app share, and what a request to a verb of a model consists of."""

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
from service.errors import InvalidInput, LimitExceeded
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
    """The parts of an app that its routes share, from its startup to its end."""

    settings: Settings
    repository: ModelRepository
    pool: WorkerPool
    batcher: Batcher
    metrics: Metrics
    drift: Drift
    _readers: dict[tuple[Model, bool], Reader] = field(default_factory=dict, repr=False)

    @cached_property
    def image_limits(self) -> Limits:
        """Limits on the images of one request."""
        settings = self.settings
        return Limits(
            settings.max_batch,
            ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            settings.max_batch_pixels,
            settings.max_numbers_in,
        )

    def reader(self, served: Served, strict: bool) -> Reader:
        """Return the reader of images for ``served``, a model of images; ``strict`` refuses those of another size."""
        key = served.model, strict
        if key not in self._readers:
            assert isinstance(served.manifest.preprocessing, Preprocessing)
            self._readers[key] = Reader(served.manifest.preprocessing, self.image_limits, strict)
        return self._readers[key]

    def limit(self, name: str, value: int, setting: str) -> None:
        """Raise LimitExceeded if ``value``, which the error's text calls ``name``, is above the setting."""
        allowed = getattr(self.settings, setting)
        if value > allowed:
            raise LimitExceeded(f"{name} is {value}: at most {allowed} here (setting {setting})")

    def limit_numbers_out(self, rows: int, numbers: int) -> None:
        """Raise LimitExceeded if ``rows`` rows of ``numbers`` numbers each are above the setting max_numbers_out."""
        self.limit(f"the count of numbers in the answer ({rows} rows of {numbers})", rows * numbers, "max_numbers_out")

    def limit_seconds(self, model: Model, rows: int, samples: int, work: str) -> None:
        """Raise LimitExceeded if ``work``, of ``rows`` rows with ``samples`` samples each, would take too long here."""
        seconds, allowed = model.estimated_seconds(rows, samples), self.settings.max_request_seconds
        if seconds > allowed:
            raise LimitExceeded(
                f"{work} would take some {seconds:.2g} s here, as this model was measured: at most {allowed:g} s "
                "(setting max_request_seconds); send fewer rows at once, or ask for fewer samples"
            )


async def get_context(request: Request) -> AppContext:
    """Return the context of the request's app, as a dependency of routes."""
    context: AppContext = request.app.state.context
    return context


ContextDep = Annotated[AppContext, Depends(get_context)]


def _refuse_repeated(request: Request) -> None:
    """Raise InvalidInput for a parameter that the query says twice: no parameter is a list, and one would be lost."""
    names = [name for name, _ in request.query_params.multi_items()]
    if len(names) > len(request.query_params):
        name = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(f"{name[:80]!r} stands {names.count(name)} times in the query: once is expected")


async def find_latest(request: Request, context: ContextDep, model: str) -> None:
    """Put the latest version of a model into the request's state, as the dependency of /v1/models/{model}/…"""
    _refuse_repeated(request)
    request.state.served = context.repository.get(model)


async def find_version(request: Request, context: ContextDep, model: str, version: str) -> None:
    """Put one version into the request's state, as the dependency of /v1/models/{model}/versions/{version}/…"""
    _refuse_repeated(request)
    request.state.served = context.repository.get(model, version)


async def find_default(request: Request, context: ContextDep) -> None:
    """Put the default model into the request's state, as the dependency of /v1/…"""
    _refuse_repeated(request)
    request.state.served = context.repository.get()


PREFIXES: dict[str, Callable[..., Awaitable[None]]] = {
    "/v1/models/{model}": find_latest,
    "/v1/models/{model}/versions/{version}": find_version,
    "/v1": find_default,
}
"""Path prefixes by which a model is addressed, and the dependency that looks the model up for each."""


@dataclass
class Call:
    """A request to a verb of a model: the model, the body, and the headers Content-Type and Accept, "" if absent."""

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
        """The rule by which data become rows of the model: their kind, shape and resizing."""
        return self.served.manifest.preprocessing

    @cached_property
    def document(self) -> Any:
        """The body parsed as JSON, once. Raises as arrays.parse_json does."""
        return parse_json(self.body)

    def forget_body(self) -> None:
        """Drop the body and the document parsed from it: a request that waits keeps only the arrays made of them."""
        self.body = b""
        self.__dict__.pop("document", None)

    def with_body(self, body: bytes) -> Call:
        """Return a call with the same headers and another body."""
        return Call(self.context, self.served, self.content_type, self.accept, body)

    def negotiate(self, offers: tuple[str, ...]) -> str:
        """Return the media type among ``offers`` that Accept prefers; pictures are offered of images only.

        Raises:
            NotAcceptable: Accept names none of them.
        """
        if self.rule.kind != "image":
            offers = tuple(offer for offer in offers if offer not in PICTURES)
        return negotiate(self.accept, offers)


def dump(content: dict[str, Any]) -> bytes:
    """Write JSON with arrays as nested lists; orjson writes NaN and infinities as null."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
