"""Request parameters and answers of the HTTP API, as pydantic models: they validate, and they are the documentation.

Parameters may stand in the query or, for JSON bodies, beside the data. Limits that are settings are checked by the
routes; what is bounded here is bounded for every deployment.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from service.bundle.input_rules import InputRule
from service.bundle.manifest import (
    Calibration,
    Estimator,
    Likelihood,
    Posterior,
    Prior,
    ScoreDefinition,
    Signature,
)
from service.calibration.conformal import GROUP_LENGTH
from service.repository.score_parameters import Group, Parameters, Strict
from service.scores.maps.anomaly_map import MapKind

Seed = Annotated[int, Field(ge=0, lt=2**32, description="of every random number: same seed, same bytes")]
Draw = Annotated[bool, Field(description="a draw x ~ p(x|z) instead of the mean E[x|z]")]
Nats = Annotated[float | None, Field(description="nats")]


class EncodeParameters(Parameters):
    """Parameters of encode."""

    samples: int = Field(default=0, ge=0, description="posterior samples z ~ q(z|x) for each row")
    seed: Seed = 0
    strict: Strict = False
    array: Literal["loc", "scale", "samples"] = Field(default="loc", description="which array an npy answer holds")


class DecodeParameters(Parameters):
    """Parameters of decode."""

    seed: Seed = 0
    draw: Draw = False


class ReconstructParameters(Parameters):
    """Parameters of reconstruct."""

    seed: Seed = 0
    strict: Strict = False


class SampleParameters(Parameters):
    """Parameters of sample."""

    n: int = Field(default=1, ge=1, description="rows to sample")
    temperature: float = Field(default=1.0, ge=0, le=10, description="scale of the prior's noise: 1 is the prior")
    seed: Seed = 0
    draw: Draw = False


class InterpolateParameters(Parameters):
    """Parameters of interpolate."""

    steps: int = Field(default=8, ge=2, description="rows from the first to the second, both included")
    mode: Literal["lerp", "slerp"] = "lerp"
    seed: Seed = 0
    draw: Draw = False
    strict: Strict = False


class DriftParameters(Parameters):
    """Parameters of drift."""

    score: str | None = Field(default=None, max_length=64, description="a calibrated score; default: the bundle's own")
    group: Group = Field(
        default=None, max_length=GROUP_LENGTH, description="rows held against this group; default: none"
    )


class Answer(BaseModel, defer_build=True):
    """Base of the answers: which model, in which version, computed it."""

    model: dict[str, str] = Field(description="name, version, digest")


class Encoded(Answer):
    """Posterior q(z|x) of N rows; the model's ``posterior`` says what loc and scale mean."""

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


class FurtherScore(BaseModel, defer_build=True):
    """One of the further scores of a row."""

    score: Nats = Field(description="higher is more anomalous, in its definition's unit")
    p_value: float | None
    q_value: float | None
    is_anomaly: bool | None


class TilesOfImage(BaseModel, defer_build=True):
    """The tiles that a model of tiles cut an image into, and the most anomalous of them."""

    n: int = Field(description="tiles")
    worst_y: int = Field(description="pixels from the upper edge to that tile")
    worst_x: int = Field(description="pixels from the left edge to that tile")
    worst_score: Nats = Field(description="of that tile alone, in the definition's unit")


class LatentDivergence(BaseModel, defer_build=True):
    """Contribution of one latent dimension to a row's rate."""

    index: int = Field(description="which dimension, from 0")
    nats: float = Field(description="KL(q(z_j|x) ‖ p(z_j)); under a flow or a mixture p(z_j) is estimated from draws")


class TopLatents(BaseModel, defer_build=True):
    """The rate by latent dimension: largest, others and joint add up to it."""

    largest: list[LatentDivergence] = Field(description="falling")
    others: float = Field(description="sum over all other dimensions, nats")
    joint: float = Field(
        description="rate − Σ_j KL, nats: what lies between the dimensions of posterior and prior, of either sign, and "
        "the rate's sampling error; only the latter where both are factorised"
    )


class ScoredRow(BaseModel, defer_build=True):
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
    q_value: float | None = Field(
        description="the smallest false_discovery_rate at which this row is a discovery; null where none was asked"
    )
    is_anomaly: bool | None = Field(
        description="p_value ≤ false_positive_rate, or q_value ≤ false_discovery_rate; null without them"
    )
    also: dict[str, FurtherScore] | None = Field(default=None, description="the further scores, by name")
    tiles: TilesOfImage | None = Field(
        default=None,
        description="of a model of tiles: score is then the aggregate that preprocessing.tiling names, and what is "
        "said of bounds, rate and distortion is the mean over the tiles",
    )
    latents: TopLatents | None = Field(default=None, description="with top_latents; of a model of tiles, their mean")
    map: list[list[float]] | list[float] | None = Field(
        default=None, description="[H, W] of an image, [D] of a vector, [T] of a signal; what it is, ``map`` above says"
    )


class UsedDefinition(BaseModel, defer_build=True):
    """The score that was computed. ``name`` is null when it is none of the bundle's definitions."""

    name: str | None
    estimator: Estimator
    unit: str = Field(description="of score, distortion and threshold")
    k: int
    seed: int
    of: list[str] = Field(description="the scores that a combination is of")
    method: str | None = Field(description="of path only")


class UsedCalibration(BaseModel, defer_build=True):
    """Calibration that the verdict rests on."""

    n: int = Field(description="held-out inliers")
    smallest_p_value: float = Field(description="1 / (n + 1)")
    false_positive_rate: float | None = Field(description="null where a false-discovery rate was asked for")
    false_discovery_rate: float | None
    threshold: float | None = Field(
        description="scores from here on are anomalies; null at a false-discovery rate, where it depends on the other "
        "rows, and where the calibration is too small for the rate"
    )


class FurtherUsed(BaseModel, defer_build=True):
    """Definition of a further score, and the calibration that its verdicts rest on."""

    definition: UsedDefinition
    calibration: UsedCalibration | None
    verdict: str | None


class UsedMap(BaseModel, defer_build=True):
    """Kind and unit of the maps, and the scale of their colours.

    The scale is null where the bundle has none: then the first colour is the least number, and the last the largest.
    """

    kind: MapKind
    unit: str
    low: float | None = Field(description="the first colour: the median place of held-out inliers; of corruption -5")
    high: float | None = Field(description="the last: what 90% of held-out inliers nowhere exceed; of corruption 5")


class Scored(Answer):
    """Answer of score. ``verdict`` says why p_value and is_anomaly are null, where they are."""

    definition: UsedDefinition
    calibration: UsedCalibration | None
    verdict: str | None
    also: dict[str, FurtherUsed] = Field(default={}, description="the further scores that were asked for")
    map: UsedMap | None = Field(default=None, description="with map=true")
    results: list[ScoredRow]


class KolmogorovSmirnov(BaseModel, defer_build=True):
    """Two-sided, two-sample test of the window against the calibration scores."""

    statistic: float = Field(description="largest difference of the two distribution functions")
    p_value: float = Field(description="of one look, from Kolmogorov's limit: the finite calibration set is in it")
    alarm: bool = Field(description="p_value ≤ level / 2")


class MartingaleValue(BaseModel, defer_build=True):
    """Conformal test martingale over everything seen: the wealth of a gambler who bets against exchangeability."""

    log10: float = Field(description="log10 M, 0 at the start")
    log10_maximum: float = Field(description="under exchangeability it ever reaches log10(1/α) with probability ≤ α")
    alarm: bool = Field(description="M ≥ 2 / level now")


class PValueShares(BaseModel, defer_build=True):
    """Shares of the window's p-values; of exchangeable rows each is about its rate, or the next smaller k/(n + 1)."""

    up_to_1_percent: float
    up_to_5_percent: float


class DriftAnswer(Answer):
    """Answer of drift. What the tests say is null before the first scored row."""

    score: str = Field(description="whose p-values these are")
    group: str | None = Field(description="of the calibration, null: all its images")
    worker: int | None = Field(description="number of the worker whose rows these are, null where one process serves")
    n: int = Field(description="held-out inliers of the calibration")
    seen: int = Field(description="p-values since the start of this worker")
    in_window: int = Field(description="how many of them are compared: the most recent ones")
    window: int = Field(description="the most that are compared (setting drift_window)")
    level: float = Field(
        description="probability of a false alarm of this worker at one look: the setting drift_level over the number "
        "of workers, so that drift_level bounds the false alarms of all of them (union bound)"
    )
    drifting: bool | None = Field(description="one of the two tests alarms, each at half the level")
    verdict: str = Field(description="the same in words")
    kolmogorov_smirnov: KolmogorovSmirnov | None
    martingale: MartingaleValue | None
    shares: PValueShares | None
    histogram: list[int] = Field(description="p-values of the window in (0, 0.1], (0.1, 0.2], … (0.9, 1]")


class ModelSummary(BaseModel, defer_build=True):
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


class ModelList(BaseModel, defer_build=True):
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


class Health(BaseModel, defer_build=True):
    """Answer of /livez and /readyz."""

    status: Literal["live", "ready", "not ready"]
    models: list[str] = []
    skipped: dict[str, str] = Field(default={}, description="NAME/VERSION of a bundle -> why it is not served")


class Problem(BaseModel, defer_build=True):
    """Every error, as application/problem+json."""

    type: str
    title: str
    status: int
    detail: str
    error: str = Field(description="the same text as detail")
    request_id: str
    errors: list[dict[str, str]] | None = Field(default=None, description="single fields of a failed validation")
