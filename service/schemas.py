"""Request parameters and answers of the HTTP API, as pydantic models: they validate, and they are the documentation.

Parameters may stand in the query or, for JSON bodies, beside the data. Limits that are settings are checked by the
routes; what is bounded here is bounded for every deployment.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.bundle import Calibration, Estimator, InputRule, Likelihood, Posterior, Prior, ScoreDefinition, Signature

Seed = Annotated[int, Field(ge=0, lt=2**32, description="of every random number: same seed, same bytes")]
Strict = Annotated[bool, Field(description="refuse images of another size instead of resizing them")]
Draw = Annotated[bool, Field(description="a draw x ~ p(x|z) instead of the mean E[x|z]")]
Nats = Annotated[float | None, Field(description="nats")]


class Parameters(BaseModel):
    """Base of all parameters: an unknown name is an error, not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class EncodeParameters(Parameters):
    """Of encode."""

    samples: int = Field(default=0, ge=0, description="posterior samples z ~ q(z|x) for each row")
    seed: Seed = 0
    strict: Strict = False
    array: Literal["loc", "scale", "samples"] = Field(default="loc", description="which array an npy answer holds")


class DecodeParameters(Parameters):
    """Of decode."""

    seed: Seed = 0
    draw: Draw = False


class ReconstructParameters(Parameters):
    """Of reconstruct."""

    seed: Seed = 0
    strict: Strict = False


class SampleParameters(Parameters):
    """Of sample."""

    n: int = Field(default=1, ge=1, description="rows to sample")
    temperature: float = Field(default=1.0, ge=0, le=10, description="scale of the prior's noise: 1 is the prior")
    seed: Seed = 0
    draw: Draw = False


class InterpolateParameters(Parameters):
    """Of interpolate."""

    steps: int = Field(default=8, ge=2, description="rows from the first to the second, both included")
    mode: Literal["lerp", "slerp"] = "lerp"
    seed: Seed = 0
    draw: Draw = False
    strict: Strict = False


class ScoreParameters(Parameters):
    """Of score. Without any of score, estimator, k and seed: the bundle's calibrated default score."""

    score: str | None = Field(default=None, max_length=64, description="one of the bundle's score definitions")
    estimator: Estimator | None = None
    k: int | None = Field(default=None, ge=1, description="posterior samples a row")
    seed: Annotated[int | None, Field(ge=0, lt=2**32)] = None
    false_positive_rate: float | None = Field(
        default=None, gt=0, lt=1, description="share of inliers that may be called anomalous; default: a setting"
    )
    map: bool = Field(
        default=False, description="also the map −E[log p(x|z)] by pixel (feature, step), summed over channels"
    )
    strict: Strict = False


class Answer(BaseModel):
    """Base of the answers: which model, in which version, computed it."""

    model: dict[str, str] = Field(description="name, version, digest")


class Encoded(Answer):
    """Posterior q(z|x) of N rows. What loc and scale are of it, the model's ``posterior`` says."""

    loc: list[list[float]] = Field(description="[N, L]")
    scale: list[list[float]] = Field(description="[N, L]")
    samples: list[list[list[float]]] | None = Field(default=None, description="[N, samples, L]")


class Rows(Answer):
    """Images with pixels in [0, 1], or vectors or signals in their own units."""

    images: list[list[list[list[float]]]] = Field(default=[], description="[N, C, H, W], of a model of images")
    rows: list[list[float]] | list[list[list[float]]] = Field(
        default=[], description="[N, D] or [N, C, T], of a model of vectors or signals"
    )


class LatentRows(Rows):
    """Rows and the latents they were decoded from."""

    latents: list[list[float]] = Field(description="[N, L]")


class ScoredRow(BaseModel):
    """One row. Numbers that are not finite, or that the model does not have, are null."""

    score: Nats = Field(description="higher is more anomalous, in the definition's unit")
    elbo: Nats = Field(description="mean of log w over k samples, nats; higher is better; null without a likelihood")
    log_likelihood: Nats = Field(
        description="log-mean-exp of log w over k samples, nats: a lower bound on log p(x), or log p(x) itself where "
        "the evidence is exact; null without a likelihood"
    )
    k: int = Field(description="posterior samples")
    rate: Nats = Field(
        description="E[log q(z|x) − log p(z)], nats; null where the encoder is deterministic, or without a likelihood"
    )
    distortion: Nats = Field(description="−E[log p(x|z)], in the definition's unit; null where x and z are one to one")
    bits_per_dim: float | None = Field(
        description="score/(C·H·W ln 2), and 8 more where p(x) is a density; null for numbers that are no pixels"
    )
    standard_error: Nats = Field(description="Monte-Carlo standard error of score, in its unit; null for k = 1")
    p_value: float | None = Field(description="conformal: (1 + calibration scores at least as high) / (n + 1)")
    is_anomaly: bool | None = Field(description="p_value ≤ false_positive_rate; null without p_value")
    map: list[list[float]] | list[float] | None = Field(
        default=None, description="[H, W] of an image, [D] of a vector, [T] of a signal; sums to distortion"
    )


class UsedDefinition(BaseModel):
    """The score that was computed. ``name`` is null when it is none of the bundle's definitions."""

    name: str | None
    estimator: Estimator
    unit: str = Field(description="of score, distortion and threshold")
    k: int
    seed: int


class UsedCalibration(BaseModel):
    """What the verdict rests on."""

    n: int = Field(description="held-out inliers")
    smallest_p_value: float = Field(description="1 / (n + 1)")
    false_positive_rate: float
    threshold: float = Field(description="scores from here on are anomalies")


class Scored(Answer):
    """Answer of score. ``verdict`` says why p_value and is_anomaly are null, where they are."""

    definition: UsedDefinition
    calibration: UsedCalibration | None
    verdict: str | None
    results: list[ScoredRow]


class ModelSummary(BaseModel):
    """One line of /v1/models."""

    name: str
    version: str
    versions: list[str]
    default: bool
    family: str
    description: str
    kind: Literal["image", "vector", "signal"]
    shape: list[int] = Field(description="(C, H, W) of an image, (D) of a vector, (C, T) of a signal")
    latent_dim: int
    evidence: Literal["bound", "exact", "none"]
    prior: Prior
    posterior: Posterior
    refused: dict[str, str] = Field(
        description="verb, verb.parameter or score.estimator -> why the model cannot answer it (409)"
    )
    digest: str


class ModelList(BaseModel):
    """Answer of /v1/models."""

    default_model: str | None
    models: list[ModelSummary]


class ModelCard(ModelSummary):
    """Answer of /v1/models/{model}: what it is, what it was trained on, how well it does."""

    signature: Signature
    preprocessing: InputRule
    likelihood: Likelihood
    scores: dict[str, ScoreDefinition]
    default_score: str
    calibration: Calibration | None
    metrics: dict[str, dict[str, float]]
    max_abs_error: dict[str, float]
    provenance: dict[str, Any]


class Health(BaseModel):
    """Answer of /livez and /readyz."""

    status: Literal["live", "ready", "not ready"]
    models: list[str] = []
    skipped: dict[str, str] = Field(default={}, description="bundle -> why it is not served")


class Problem(BaseModel):
    """Every error, as application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    error: str = Field(description="the same text as detail")
    request_id: str
    errors: list[dict[str, str]] | None = Field(default=None, description="single fields of a failed validation")
