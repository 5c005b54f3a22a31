"""Make the ASGI app with its middleware and routes; the one table from errors to HTTP statuses stands here, too."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request, params
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from fastapi.telemetry import TelemetryConfig
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from service import __version__, errors
from service.api.context import PREFIXES, AppContext
from service.api.endpoint import ResolvedRequests, RouteResolver
from service.api.metrics import Metrics
from service.api.middleware import BodyBudget, BodyLimits, RequestContext
from service.api.problems import problem
from service.api.routes import drift as drift_route
from service.api.routes import health, latents, models, scoring
from service.api.schemas import Problem
from service.calibration.drift_monitor import Drift
from service.inference.batcher import Batcher
from service.inference.thread_pool import WorkerPool
from service.logs import get_logger
from service.repository.model_repository import ModelRepository, load_repository
from service.settings import Settings

STATUS: dict[type[Exception], int] = {
    errors.BundleError: 500,
    errors.DeviceUnavailable: 500,
    errors.ConfigurationError: 500,
    errors.ModelNotFound: 404,
    errors.UnsupportedVerb: 409,
    errors.InvalidInput: 422,
    errors.UnsupportedMediaType: 415,
    errors.NotAcceptable: 406,
    errors.LimitExceeded: 422,
    errors.PayloadTooLarge: 413,
    errors.Overloaded: 429,
    errors.DeadlineExceeded: 503,
    errors.ClientDisconnected: 400,
    ClientDisconnect: 400,
}
"""HTTP statuses of errors; an error has that of its nearest ancestor in this table."""


def create_app(
    settings: Settings,
    repository: ModelRepository | None = None,
    metrics: Metrics | None = None,
    drift: Drift | None = None,
    dependencies: Sequence[params.Depends] = (),
) -> FastAPI:
    """Make the ASGI app. Models are loaded at its startup, unless a loaded ``repository`` is given.

    Args:
        metrics, drift: those of a worker among several; by default new ones, for a process that serves alone.
        dependencies: FastAPI resolves them before every route; with any of them no request is remembered
            (service.api.endpoint).

    Raises (at startup):
        BundleError, ConfigurationError, DeviceUnavailable: see ModelRepository.load and Runtime.
    """
    documented: dict[str, Any] = {"redoc_url": None} if settings.docs else {"docs_url": None, "openapi_url": None}
    app = (FastAPIOffline if settings.docs else FastAPI)(
        **documented,
        title="vaeserve",
        version=__version__,
        description="Latents, samples and calibrated anomaly scores of latent variable models.",
        lifespan=_lifespan(settings, repository, drift),
        redirect_slashes=False,  # its Location would be built from the caller's Host header
        responses={"4XX": {"model": Problem, "description": "problem"}},
        telemetry=_telemetry(),
        dependencies=dependencies,
    )
    app.state.draining = False  # true once the service is about to stop
    app.state.metrics = metrics or Metrics()
    app.state.budget = BodyBudget(settings.max_body_bytes, settings.max_buffered_bytes)
    app.state.remembered = ResolvedRequests()
    app.state.remembers = not _telemetry()["tracing"]  # whose spans are named by FastAPI's router
    app.add_middleware(RouteResolver, remembered=app.state.remembered)
    app.add_middleware(BodyLimits, budget=app.state.budget)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, **_cross_origin(settings))
    app.add_middleware(RequestContext, metrics=app.state.metrics, root_path=settings.root_path)
    _include_routes(app, settings)
    _handle_errors(app)
    return app


def _cross_origin(settings: Settings) -> dict[str, Any]:
    """Return the arguments of starlette's CORSMiddleware: no cookies, and what a page must be able to send and read."""
    return {
        "allow_origins": [origin.strip() for origin in settings.cors_origins.split(",")],
        "allow_methods": ["GET", "HEAD", "POST"],
        "allow_headers": ["*"],
        "expose_headers": ["x-request-id", "retry-after"],
    }


def _telemetry() -> TelemetryConfig:
    """Enable OpenTelemetry if its environment is set; otherwise FastAPI would look for it with every request."""
    enabled = any(name.startswith("OTEL_") for name in os.environ)
    return {"tracing": enabled, "metrics": enabled, "logs": enabled}


def _lifespan(settings: Settings, repository: ModelRepository | None, drift: Drift | None) -> Any:
    """Return the app's lifespan, which makes its AppContext at startup, and waits for work in progress at the end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loaded = await asyncio.to_thread(load_repository, settings) if repository is None else repository
        pool = WorkerPool(settings.concurrency, settings.queue, settings.request_timeout)
        metrics: Metrics = app.state.metrics
        for served in loaded:
            metrics.models.labels(*served.identity.values()).set(1)
        metrics.workers.set(1)
        metrics.worker_starts.inc()
        monitors = drift or Drift(settings.drift_window, settings.drift_level)
        batcher = Batcher(pool, settings.max_concurrent_batches, metrics.ran)
        app.state.context = AppContext(settings, loaded, pool, batcher, metrics, monitors)
        app.state.remembered.clear()
        following = asyncio.create_task(metrics.follow(monitors))
        yield
        following.cancel()
        await asyncio.to_thread(pool.close)

    return lifespan


def _include_routes(app: FastAPI, settings: Settings) -> None:
    app.include_router(health.router)
    if settings.metrics:
        app.include_router(health.metrics_router)
    app.include_router(models.router)
    for router in (latents.router, scoring.router, *([drift_route.router] if settings.drift else [])):
        for route in router.routes:
            assert isinstance(route, APIRoute)
            for prefix, find_model in PREFIXES.items():
                _add_verb(app, prefix, find_model, route)


def _add_verb(app: FastAPI, prefix: str, find_model: Callable[..., Awaitable[None]], route: APIRoute) -> None:
    """Add a route under a prefix. With FastAPI's include_router the scope's route would lack its prefix."""
    app.add_api_route(
        prefix + route.path,
        route.endpoint,
        methods=sorted(route.methods or ()),
        dependencies=[*route.dependencies, Depends(find_model)],
        tags=route.tags,
        responses=route.responses,
        openapi_extra=route.openapi_extra,
    )


def _handle_errors(app: FastAPI) -> None:
    app.add_exception_handler(errors.VaeserveError, _domain_error)
    app.add_exception_handler(ClientDisconnect, _domain_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)


async def _domain_error(request: Request, error: Exception) -> Response:
    """Answer a request that has ended in an error of the table; a status of 500 is explained in the log alone."""
    status = next(STATUS[ancestor] for ancestor in type(error).__mro__ if ancestor in STATUS)
    headers: dict[str, str] = {}
    if isinstance(error, errors.Overloaded):
        request.app.state.metrics.refused.inc()
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    elif status == 503:
        headers["retry-after"] = "1"
    elif status == 413:
        headers["connection"] = "close"  # the rest of the body is not wanted
    if status == 500:
        get_logger().error("cannot answer", request_id=request.state.request_id, error=str(error))
    errors.forget_frames(error)
    text = str(error) if status < 500 or status == 503 else "the service cannot answer; its log says why"
    return problem(status, text or "the client closed the connection", request.state.request_id, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = {404: "there is nothing at this path", 405: f"{request.method} is not answered at this path"}.get(
        error.status_code, str(error.detail)
    )
    return problem(error.status_code, detail, request.state.request_id, error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _validation_problem(error.errors(), request.state.request_id)


def _validation_problem(faults: Sequence[Any], request_id: str) -> Response:
    """Make a 422 with the location and the fault of each field, without the input: JSON has no NaN to repeat."""
    fields = [
        {"where": ".".join(map(str, fault["loc"]))[:200], "what": str(fault["msg"])[:200]} for fault in faults[:20]
    ]
    detail = "; ".join(f"{field['where']}: {field['what']}" for field in fields)
    return problem(422, detail, request_id, errors=fields)
