"""Resolving a request: which scores of a model its parameters mean, and what their verdicts will rest on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from service.bundle.capabilities import refusals
from service.bundle.manifest import Manifest, ScoreDefinition
from service.calibration.conformal import SEPARATOR, calibration_key
from service.calibration.drift_monitor import MonitorKey, MonitorName
from service.errors import InvalidInput, UnsupportedVerb
from service.repository.model_repository import Served
from service.repository.score_parameters import ScoreParameters
from service.scores.maps.anomaly_map import MapKind

ALL = "all"
"""The name among ``also`` that stands for every score of the bundle."""
MAX_REMEMBERED = 256
"""Resolved requests that are kept for each served model."""


@dataclass(frozen=True)
class ChosenScore:
    """A score to compute; ``name`` is None when it is none of the bundle's definitions."""

    name: str | None
    definition: ScoreDefinition


@dataclass(frozen=True)
class VerdictBasis:
    """Basis of the verdicts of one score, before there are p-values.

    ``rate``: the false-positive rate. ``n``: how many calibration scores there are, None where the score is not
    calibrated. ``threshold``: scores from here on are anomalies at that rate, None where a false-discovery rate
    decides, or where n is too small for the rate. ``reason``: why there will be no verdict, None where there will be.
    """

    rate: float
    threshold: float | None
    n: int | None
    reason: str | None


@dataclass(frozen=True, eq=False)
class ResolvedScoreRequest:
    """Meaning of a request's parameters for one model.

    ``chosen``: the score to judge by; ``also``: the further ones, by name. ``basis`` and ``further_bases`` (by name):
    what the verdicts of these rest on. ``key`` is the same for requests that compute the same. ``monitor_keys``: by
    name of a calibrated score, the drift monitor that records its rows.
    """

    parameters: ScoreParameters
    chosen: ChosenScore
    also: dict[str, ScoreDefinition]
    basis: VerdictBasis
    further_bases: dict[str, VerdictBasis]
    key: Hashable
    monitor_keys: dict[str, MonitorKey]

    @property
    def options(self) -> tuple[bool, dict[str, ScoreDefinition], MapKind | None, bool]:
        """The arguments of Model.score and TiledModel.score after the definition: maps, also, map_kind, latents."""
        return self.parameters.map, self.also, self.parameters.map_kind, self.parameters.top_latents > 0


def resolve_scores(served: Served, parameters: ScoreParameters, default_rate: float) -> ResolvedScoreRequest:
    """Resolve the parameters of a request for that model; remembered for the next request with the same ones.

    ``default_rate``: the false-positive rate where the parameters name none.

    Raises:
        InvalidInput: unknown score or group, both rates at once, or too few calibration scores for the asked
            false-positive rate.
        UnsupportedVerb: a model of this kind cannot have such a score.
    """
    remembered = served.resolved_scores.get((parameters, default_rate))
    if remembered is not None:
        return remembered
    if parameters.false_positive_rate is not None and parameters.false_discovery_rate is not None:
        raise InvalidInput(
            "false_positive_rate and false_discovery_rate: a verdict is by one or the other, ask for one"
        )
    resolved = _resolve(served, parameters, default_rate)
    if len(served.resolved_scores) >= MAX_REMEMBERED:
        served.resolved_scores.clear()
    served.resolved_scores[parameters, default_rate] = resolved
    return resolved


def _resolve(served: Served, parameters: ScoreParameters, default_rate: float) -> ResolvedScoreRequest:
    chosen, also = choose_score(served.manifest, parameters), further_scores(served.manifest, parameters)
    further_bases = {
        name: _basis(served, ChosenScore(name, definition), parameters, default_rate)
        for name, definition in also.items()
    }
    basis = _basis(served, chosen, parameters, default_rate)
    recipe = (chosen.name, *_recipe(chosen.definition))
    key = ("score", served.model, recipe, tuple(also), parameters.map, parameters.map_kind, parameters.top_latents > 0)
    calibrated = [
        name for name, of_score in ((chosen.name, basis), *further_bases.items()) if name and of_score.n is not None
    ]
    monitor_keys = {name: monitor_key(served, name, parameters.group) for name in calibrated}
    return ResolvedScoreRequest(parameters, chosen, also, basis, further_bases, key, monitor_keys)


def choose_score(manifest: Manifest, parameters: ScoreParameters) -> ChosenScore:
    """Choose the score that the parameters mean: one of the bundle's definitions where they match, else a variant.

    Raises:
        InvalidInput: the bundle has no score of the asked name.
        UnsupportedVerb: nor can a model of its kind have one.
    """
    preferred = parameters.score or manifest.default_score
    base = _definition(manifest, preferred)
    changes = {field: getattr(parameters, field) for field in ("estimator", "k", "seed")}
    changes = {field: value for field, value in changes.items() if value is not None}
    if changes.get("estimator", base.estimator) != base.estimator:
        changes |= {"of": [], "method": None}
    variant = base.model_copy(update=changes)
    names = [name for name, definition in manifest.scores.items() if _recipe(definition) == _recipe(variant)]
    if not names:
        return ChosenScore(None, variant)
    name = preferred if preferred in names else names[0]
    return ChosenScore(name, manifest.scores[name])


def further_scores(manifest: Manifest, parameters: ScoreParameters) -> dict[str, ScoreDefinition]:
    """The definitions that the parameter ``also`` names, by name and in its order. Raises as ``choose_score``."""
    if not parameters.also:
        return {}
    names = [name.strip() for name in parameters.also.split(",")]
    if ALL in names:
        names = [*manifest.scores, *(name for name in names if name != ALL)]
    return {name: _definition(manifest, name) for name in names}


def missing_verdicts(served: Served, parameters: ScoreParameters, default_rate: float) -> list[str]:
    """List the reasons why the chosen score will have no verdict, or a further one no p-value, whatever is scored.

    Raises as ``resolve_scores``.
    """
    resolved = resolve_scores(served, parameters, default_rate)
    uncalibrated = [basis for basis in resolved.further_bases.values() if basis.n is None]
    return list(dict.fromkeys(basis.reason for basis in (resolved.basis, *uncalibrated) if basis.reason))


def monitor_key(served: Served, score: str, group: str | None = None) -> MonitorKey:
    """Return the key of the drift monitor that records a score of that bundle, compared with that group.

    Raises UnsupportedVerb for a score that is not calibrated, InvalidInput for an unknown group.
    """
    n = served.calibrator.n(score, group)
    # The group as calibration.npz spells it: an accent may be typed in two ways.
    written = calibration_key(score, group).removeprefix(score).removeprefix(SEPARATOR)
    name = MonitorName(served.manifest.name, served.manifest.version, score, written)
    return MonitorKey(name, n)


def _definition(manifest: Manifest, name: str) -> ScoreDefinition:
    """The bundle's score of that name. Raises as ``choose_score``."""
    if name in manifest.scores:
        return manifest.scores[name]
    refused = refusals(manifest)
    if f"score.{name}" in refused:
        raise UnsupportedVerb(f"{manifest.name} does not answer score {name!r}: {refused[f'score.{name}']}")
    raise InvalidInput(f"score {name!r} is not defined by this bundle: {', '.join(sorted(manifest.scores))}")


def _recipe(definition: ScoreDefinition) -> tuple[object, ...]:
    """The fields of a definition on which the numbers depend; its unit and its description do not count."""
    return (definition.estimator, definition.k, definition.seed, tuple(definition.of), definition.method)


def _basis(served: Served, chosen: ChosenScore, parameters: ScoreParameters, default_rate: float) -> VerdictBasis:
    """The basis of one score's verdicts at the asked rate. Raises as ``resolve_scores``."""
    rate = default_rate if parameters.false_positive_rate is None else parameters.false_positive_rate
    reason = _why_uncalibrated(served, chosen)
    if chosen.name is None or reason:
        return VerdictBasis(rate, None, None, reason)
    calibrator = served.calibrator
    n = calibrator.n(chosen.name, parameters.group)
    if parameters.false_discovery_rate is not None:
        return VerdictBasis(rate, None, n, None)
    try:
        return VerdictBasis(rate, calibrator.threshold(chosen.name, rate, parameters.group), n, None)
    except InvalidInput as error:
        if parameters.false_positive_rate is not None:
            raise
        return VerdictBasis(rate, None, n, f"no is_anomaly: {error}")


def _why_uncalibrated(served: Served, chosen: ChosenScore) -> str | None:
    """Why the bundle has no calibration of that score, None where it has one."""
    calibrated, scores = served.calibrator.names, served.manifest.scores
    if chosen.name in calibrated:
        return None
    if not calibrated:
        return "no p_value and no is_anomaly: this bundle carries no calibration"
    listed = "; ".join(f"{name}: {_in_words(scores[name])}" for name in calibrated)
    return f"no p_value and no is_anomaly: {_in_words(chosen.definition)} is not calibrated (calibrated are {listed})"


def _in_words(definition: ScoreDefinition) -> str:
    return f"{definition.estimator} with k={definition.k} and seed={definition.seed}"
