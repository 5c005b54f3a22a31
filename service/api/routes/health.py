"""/livez, /readyz and /metrics: they never wait for a worker."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from service.api.context import ContextDep
from service.api.schemas import Health

router = APIRouter(tags=["health"])


@router.get("/livez")
async def livez() -> Health:
    """200 as long as the process answers at all; a full queue or a missing model does not change it."""
    return Health(status="live")


@router.get("/readyz", responses={503: {"model": Health}}, response_model=Health)
async def readyz(context: ContextDep) -> JSONResponse:
    """200 when at least one model is loaded, verified and warm, and the service is not about to stop."""
    ready = context.repository.ready and not context.draining
    health = Health(
        status="ready" if ready else "not ready",
        models=[f"{served.manifest.name}/{served.manifest.version}" for served in context.repository],
        skipped=dict.fromkeys(context.repository.skipped, "failed verification, see the log"),
    )
    return JSONResponse(health.model_dump(), status_code=200 if ready else 503)


@router.get("/metrics", response_class=Response)
async def metrics(context: ContextDep) -> Response:
    """Prometheus exposition format: of all workers, where several serve."""
    return Response(context.metrics.render(context.drift), media_type="text/plain; version=0.0.4; charset=utf-8")
