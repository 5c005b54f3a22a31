"""From images to verdicts: which scores are meant, what they are, and what the calibration says of them.

The HTTP route and ``vaeserve score`` both end here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from service.api.schemas import MapPicture, ScoreParameters
from service.bundle.capabilities import refusals
from service.bundle.manifest import Manifest, ScoreDefinition
from service.calibration.conformal import SEPARATOR, calibration_key, p_values_of
from service.calibration.drift_monitor import Name, Place
from service.calibration.false_discovery import benjamini_hochberg, least_discoveries, q_values
from service.errors import InvalidInput, UnsupportedVerb
from service.formats.rendering import encode_heat_maps, encode_overlays
from service.inference.model import Model, Scores
from service.inference.tiled import TiledScores
from service.repository.model_repository import Served
from service.scores.corruption import HIGH, LOW
from service.scores.corruption import UNIT as UNIT_OF_CORRUPTION
from service.scores.maps.anomaly_map import UNIT, MapKind, Scale

EVERY = "all"
MOST_KNOWN = 256

Rows = np.ndarray | Sequence[np.ndarray]
"""float32 [N,C,H,W], images in [0, 1]; for a model of tiles images [C,h,w] of any sizes, uint8 or float32."""


@dataclass(frozen=True)
class Chosen:
    """A score to compute; ``name`` is None when it is none of the bundle's definitions."""

    name: str | None
    definition: ScoreDefinition


@dataclass(frozen=True)
class Judged:
    """One score's p-values (float64 [N]), its ``threshold`` and the ``n`` they rest on, or the ``reason`` for none.

    ``counts``: of each score, how many of the calibration are greater, and at least as great (int64 [N] twice).
    ``q_values`` and ``discoveries`` are there where a false-discovery rate was asked for.
    """

    rate: float
    p_values: np.ndarray | None
    threshold: float | None
    n: int | None
    reason: str | None
    q_values: np.ndarray | None = None
    discoveries: np.ndarray | None = None
    counts: tuple[np.ndarray, np.ndarray] | None = None

    def is_anomaly(self, count: int) -> Sequence[bool | None]:
        """A discovery at the asked false-discovery rate, else p ≤ the false-positive rate; None without a p-value."""
        if self.p_values is None or (self.threshold is None and self.discoveries is None):
            return [None] * count
        if self.discoveries is not None:
            return [bool(found) for found in self.discoveries]
        return [bool(p <= self.rate) for p in self.p_values]


@dataclass(frozen=True, eq=False)
class Asked:
    """What parameters ask of a model: the chosen score, the further ones by name, and what verdicts will rest on.

    ``key``: of jobs that compute the same. ``places``: where rows of each calibrated one are noted for the drift tests.
    """

    parameters: ScoreParameters
    chosen: Chosen
    also: dict[str, ScoreDefinition]
    plan: Judged
    plans: dict[str, Judged]
    key: Hashable
    places: dict[str, Place]

    @property
    def beside(self) -> tuple[bool, dict[str, ScoreDefinition], MapKind | None, bool]:
        """What is wanted beside the chosen score, as models take it."""
        return self.parameters.map, self.also, self.parameters.map_kind, self.parameters.top_latents > 0


@dataclass(frozen=True)
class Verdicts:
    """Scores of N images and what the calibration says of them; ``also``: of the further scores, by name."""

    chosen: Chosen
    scores: Scores | TiledScores
    judged: Judged
    also: dict[str, Judged]

    @property
    def is_anomaly(self) -> Sequence[bool | None]:
        """The verdict on each image, by the chosen score."""
        return self.judged.is_anomaly(len(self.scores.score))


def choose(manifest: Manifest, asked: ScoreParameters) -> Chosen:
    """The definition that the parameters mean.

    Raises:
        InvalidInput: the bundle has no score of the asked name.
        UnsupportedVerb: nor can a model of its kind have one.
    """
    base = _defined(manifest, asked.score or manifest.default_score)
    changes = {field: getattr(asked, field) for field in ("estimator", "k", "seed")}
    changes = {field: value for field, value in changes.items() if value is not None}
    if changes.get("estimator", base.estimator) != base.estimator:
        changes |= {"of": [], "method": None}
    wanted = base.model_copy(update=changes)
    names = [name for name, known in manifest.scores.items() if _recipe(known) == _recipe(wanted)]
    preferred = [name for name in names if name == (asked.score or manifest.default_score)]
    name = next(iter(preferred + names), None)
    return Chosen(name, wanted if name is None else manifest.scores[name])


def further(manifest: Manifest, asked: ScoreParameters) -> dict[str, ScoreDefinition]:
    """The definitions that ``also`` names, in its order. Raises as ``choose``."""
    if not asked.also:
        return {}
    names = [name.strip() for name in asked.also.split(",")]
    if EVERY in names:
        names = [*manifest.scores, *(name for name in names if name != EVERY)]
    return {name: _defined(manifest, name) for name in names}


def _defined(manifest: Manifest, name: str) -> ScoreDefinition:
    if name in manifest.scores:
        return manifest.scores[name]
    refused = refusals(manifest)
    if f"score.{name}" in refused:
        raise UnsupportedVerb(f"{manifest.name} does not answer score {name!r}: {refused[f'score.{name}']}")
    raise InvalidInput(f"score {name!r} is not defined by this bundle: {', '.join(sorted(manifest.scores))}")


def judge(served: Served, x: Rows, asked: ScoreParameters, default_rate: float) -> Verdicts:
    """Score ``x`` and compare with the calibration.

    Raises:
        InvalidInput: unknown score or group, both rates at once, or too few calibration scores for the asked
            false-positive rate.
    """
    # The thresholds come first: a rate that the calibration cannot answer must not cost a computation.
    meant = meaning(served, asked, default_rate)
    return verdicts_of(served, meant, scorer(served, meant)(x))


def scorer(served: Served, meant: Asked) -> Callable[[Any], Scores | TiledScores]:
    """The scores that are meant, as a function of rows; of whole images, for a model of tiles."""
    score: Callable[..., Scores | TiledScores] = (served.tiled or served.model).score
    definition, beside = meant.chosen.definition, meant.beside
    return lambda rows: score(rows, definition, *beside)


def verdicts_of(served: Served, meant: Asked, scores: Scores | TiledScores) -> Verdicts:
    """What the calibration says of them."""
    name, asked = meant.chosen.name, meant.parameters
    judged = _judged(served, name, scores.score, meant.plan, asked)
    also = {name: _judged(served, name, scores.also[name], plan, asked) for name, plan in meant.plans.items()}
    return Verdicts(meant.chosen, scores, judged, also)


def meaning(served: Served, asked: ScoreParameters, default_rate: float) -> Asked:
    """What the parameters mean for that model, remembered. Raises as ``judge`` and ``choose``."""
    known: Asked | None = served.known.get((asked, default_rate))
    if known is not None:
        return known
    if asked.false_positive_rate is not None and asked.false_discovery_rate is not None:
        raise InvalidInput(
            "false_positive_rate and false_discovery_rate: a verdict is by one or the other, ask for one"
        )
    found = _meaning(served, asked, default_rate)
    if len(served.known) >= MOST_KNOWN:
        served.known.clear()
    served.known[asked, default_rate] = found
    return found


def _meaning(served: Served, asked: ScoreParameters, default_rate: float) -> Asked:
    chosen, also = choose(served.manifest, asked), further(served.manifest, asked)
    plans = {name: _plan(served, Chosen(name, each), asked, default_rate) for name, each in also.items()}
    plan = _plan(served, chosen, asked, default_rate)
    recipe = (chosen.name, *_recipe(chosen.definition))
    key = ("score", served.model, recipe, tuple(also), asked.map, asked.map_kind, asked.top_latents > 0)
    calibrated = [name for name, each in ((chosen.name, plan), *plans.items()) if name and each.n is not None]
    places = {name: drift_place(served, name, asked.group) for name in calibrated}
    return Asked(asked, chosen, also, plan, plans, key, places)


def drift_place(served: Served, score: str, group: str | None = None) -> Place:
    """Where rows of that score of that bundle are noted.

    Raises UnsupportedVerb for a score that is not calibrated, InvalidInput for an unknown group.
    """
    n = served.calibrator.n(score, group)
    written = calibration_key(score, group).removeprefix(score).removeprefix(SEPARATOR)  # one spelling of an accent
    return Place(Name(served.manifest.name, served.manifest.version, score, written), served.model.digest, n)


def no_verdicts(served: Served, asked: ScoreParameters, default_rate: float) -> list[str]:
    """Why the chosen score will have no verdict, or a further one no p-value, whatever is scored. Raises as judge."""
    meant = meaning(served, asked, default_rate)
    reasons = [meant.plan.reason, *(each.reason for each in meant.plans.values() if each.n is None)]
    return list(dict.fromkeys(reason for reason in reasons if reason))


def _plan(served: Served, chosen: Chosen, asked: ScoreParameters, default_rate: float) -> Judged:
    """What a verdict will rest on, before there are p-values."""
    rate = default_rate if asked.false_positive_rate is None else asked.false_positive_rate
    reason = _no_verdict(served, chosen)
    if chosen.name is None or reason:
        return Judged(rate, None, None, None, reason)
    calibrator = served.calibrator
    n = calibrator.n(chosen.name, asked.group)
    if asked.false_discovery_rate is not None:
        return Judged(rate, None, None, n, None)
    try:
        return Judged(rate, None, calibrator.threshold(chosen.name, rate, asked.group), n, None)
    except InvalidInput as error:
        if asked.false_positive_rate is not None:
            raise
        return Judged(rate, None, None, n, f"no is_anomaly: {error}")


def _judged(served: Served, name: str | None, scores: np.ndarray, plan: Judged, asked: ScoreParameters) -> Judged:
    """The plan with the p-values of ``scores``."""
    if name is None or plan.n is None:
        return plan
    counts = served.calibrator.counts(name, scores, asked.group)
    p_values, rate = p_values_of(counts[1], plan.n), asked.false_discovery_rate
    if rate is None:
        return Judged(plan.rate, p_values, plan.threshold, plan.n, plan.reason, counts=counts)
    found, least = benjamini_hochberg(p_values, rate), least_discoveries(plan.n, len(scores), rate)
    reason = (
        None
        if least == 1
        else (
            f"a single anomaly among {len(scores)} rows cannot be found at a false-discovery rate of {rate:g} with "
            f"{plan.n} calibration scores: at least {least} rows would have to lie above all of them"
        )
    )
    return Judged(plan.rate, p_values, plan.threshold, plan.n, reason, q_values(p_values), found, counts)


@dataclass(frozen=True)
class UsedMap:
    """The kind of a map, the unit of its numbers, its colours' scale, None where none was fitted, and whose that is."""

    kind: MapKind
    unit: str
    scale: Scale | None
    origin: Literal["calibration", "fixed", "of these maps"]


def used_map(model: Model, kind: MapKind | None) -> UsedMap:
    """What a map of that kind is, or of the kind that ``model`` gives unasked."""
    kind = kind or model.default_map
    if kind == "corruption":
        return UsedMap(kind, UNIT_OF_CORRUPTION, Scale(LOW, HIGH), "fixed")
    unit = UNIT if kind == "anomaly" else _unit_of_distortion(model.manifest)
    if model.anomaly_map is None:
        return UsedMap(kind, unit, None, "of these maps")
    return UsedMap(kind, unit, model.anomaly_map.scale(kind), "calibration")


def draw_maps(x: Rows, maps: Sequence[np.ndarray] | np.ndarray, used: UsedMap, picture: MapPicture | None) -> bytes:
    """One PNG of the maps of ``x``, of one size, as heat maps unless ``picture`` says otherwise.

    Its text entries say ``kind``, ``unit`` and ``scale``.
    """
    text = {"kind": used.kind, "unit": used.unit, "scale": used.origin}
    if picture == "overlay":
        return encode_overlays(list(x), list(maps), used.scale, text)
    return encode_heat_maps(list(maps), used.scale, text)


def top_latents(verdicts: Verdicts, count: int) -> list[dict[str, Any]]:
    """Of each row the ``count`` latent dimensions that add most to the rate, the others' sum, and what is joint."""
    scores = verdicts.scores
    assert scores.latents is not None
    return [_top(row, float(rate), count) for row, rate in zip(scores.latents, scores.rate, strict=True)]


def _top(nats: np.ndarray, rate: float, count: int) -> dict[str, Any]:
    order = np.argsort(-nats, kind="stable")
    largest = [{"index": int(j), "nats": float(nats[j])} for j in order[:count]]
    return {"largest": largest, "others": float(nats[order[count:]].sum()), "joint": rate - float(nats[order].sum())}


def _unit_of_distortion(manifest: Manifest) -> str:
    """Nats, or the unit in which a model without a likelihood gives its error."""
    if manifest.evidence != "none":
        return "nats"
    errors = [each.unit for each in manifest.scores.values() if each.estimator == "reconstruction"]
    return next(iter(errors), "reconstruction error")


def rows(verdicts: Verdicts) -> list[dict[str, Any]]:
    """One dictionary an image, in the field names of the API (maps left out); non-finite numbers are None."""
    scores = verdicts.scores
    columns: dict[str, list[Any]] = {
        field: _numbers(getattr(scores, field))
        for field in ("score", "elbo", "log_likelihood", "rate", "distortion", "bits_per_dim", "standard_error")
    }
    n = len(scores.score)
    columns["k"] = [scores.k] * n
    columns |= _verdict_columns(verdicts.judged, n)
    if isinstance(scores, TiledScores):
        columns["tiles"] = [tiles._asdict() for tiles in scores.tiles]
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if verdicts.also:
        for index, row in enumerate(found):
            row["also"] = {name: each[index] for name, each in _further_rows(verdicts).items()}
    return found


def _further_rows(verdicts: Verdicts) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for name, judged in verdicts.also.items():
        scores = verdicts.scores.also[name]
        columns = {"score": _numbers(scores)} | _verdict_columns(judged, len(scores))
        found[name] = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return found


def _verdict_columns(judged: Judged, n: int) -> dict[str, list[Any]]:
    return {
        "p_value": [None] * n if judged.p_values is None else _numbers(judged.p_values),
        "q_value": [None] * n if judged.q_values is None else _numbers(judged.q_values),
        "is_anomaly": list(judged.is_anomaly(n)),
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _recipe(definition: ScoreDefinition) -> tuple[object, ...]:
    return (
        definition.estimator,
        definition.k,
        definition.seed,
        tuple(definition.of),
        definition.method,
    )


def _no_verdict(served: Served, chosen: Chosen) -> str | None:
    if chosen.name in served.calibrator.names:
        return None
    if not served.calibrator.names:
        return "no p_value and no is_anomaly: this bundle carries no calibration"
    used, scores = chosen.definition, served.manifest.scores
    known = "; ".join(f"{name}: {_in_words(scores[name])}" for name in served.calibrator.names)
    return f"no p_value and no is_anomaly: {_in_words(used)} is not calibrated (calibrated are {known})"


def _in_words(definition: ScoreDefinition) -> str:
    return f"{definition.estimator} with k={definition.k} and seed={definition.seed}"
