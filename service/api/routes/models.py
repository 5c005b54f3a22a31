"""The routes of /v1/models, which describe the models that are served."""

from __future__ import annotations

from fastapi import APIRouter

from service.api.context import ContextDep
from service.api.schemas import ModelCard, ModelList, ModelSummary
from service.repository.model_repository import ModelRepository, Served

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("")
async def list_models(context: ContextDep) -> ModelList:
    """List every model in its latest version."""
    repository = context.repository
    return ModelList(
        default_model=repository.default_name,
        models=[_summary(repository, served) for served in repository.latest()],
    )


@router.get("/{model}")
async def describe(context: ContextDep, model: str) -> ModelCard:
    """Describe the latest version of a model: signature, likelihood, scores, calibration, provenance, digest."""
    return _card(context.repository, context.repository.get(model))


@router.get("/{model}/versions/{version}")
async def describe_version(context: ContextDep, model: str, version: str) -> ModelCard:
    """Describe one version of a model."""
    return _card(context.repository, context.repository.get(model, version))


def _summary(repository: ModelRepository, served: Served) -> ModelSummary:
    manifest = served.manifest
    return ModelSummary(
        name=manifest.name,
        version=manifest.version,
        versions=repository.versions(manifest.name),
        default=manifest.name == repository.default_name,
        family=manifest.family,
        description=manifest.description,
        kind=manifest.preprocessing.kind,
        shape=list(manifest.preprocessing.natural),
        latent_dim=manifest.signature.latent_dim,
        evidence=manifest.evidence,
        prior=manifest.prior,
        posterior=manifest.posterior,
        refused=served.model.refused,
        digest=served.model.digest,
    )


def _card(repository: ModelRepository, served: Served) -> ModelCard:
    manifest = served.manifest
    return ModelCard(
        **_summary(repository, served).model_dump(),
        signature=manifest.signature,
        preprocessing=manifest.preprocessing,
        likelihood=manifest.likelihood,
        scores=manifest.scores,
        default_score=manifest.default_score,
        calibration=manifest.calibration,
        metrics=manifest.provenance.metrics,
        max_abs_error=manifest.reference.max_abs_error,
        provenance=manifest.provenance.model_dump(exclude={"metrics"}),
    )
