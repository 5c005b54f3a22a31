"""The routes /livez, /readyz and /metrics, which answer however busy the worker threads are."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from service.api.context import ContextDep
from service.api.schemas import Health

router, metrics_router = APIRouter(tags=["health"]), APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> Health:
    """Answer 200 as long as the process answers at all, also with a full queue or without a model."""
    return Health(status="live")


@router.get("/readyz", responses={503: {"model": Health}}, response_model=Health)
async def readyz(request: Request, context: ContextDep) -> JSONResponse:
    """Answer 200 if at least one model is loaded, verified and warm, and the service is not about to stop, else 503."""
    repository = context.repository
    ready = repository.ready and not request.app.state.draining
    health = Health(
        status="ready" if ready else "not ready",
        models=[f"{served.manifest.name}/{served.manifest.version}" for served in repository],
        skipped={"/".join(Path(path).parts[-2:]): "failed verification, see the log" for path in repository.skipped},
    )
    return JSONResponse(health.model_dump(), status_code=200 if ready else 503)


@metrics_router.get("/metrics", response_class=Response)
async def metrics(context: ContextDep) -> Response:
    """Answer with the metrics in Prometheus' exposition format; where several workers serve, those of all of them."""
    return Response(context.metrics.render(context.drift), media_type="text/plain; version=0.0.4; charset=utf-8")
