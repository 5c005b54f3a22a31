"""From images to verdicts: which score is meant, what it is, and what the calibration says of it.

The HTTP route and ``vaeserve score`` both end here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.bundle import Manifest, ScoreDefinition
from service.errors import InvalidInput
from service.model import Scores
from service.repository import Served
from service.schemas import ScoreParameters


@dataclass(frozen=True)
class Chosen:
    """The score to compute; ``name`` is None when it is none of the bundle's definitions."""

    name: str | None
    definition: ScoreDefinition


@dataclass(frozen=True)
class Verdicts:
    """Scores of N images beside their p-values (float64 [N]), or the reason why there are none."""

    chosen: Chosen
    scores: Scores
    rate: float
    p_values: np.ndarray | None
    threshold: float | None
    n: int | None
    reason: str | None

    @property
    def is_anomaly(self) -> Sequence[bool | None]:
        """p ≤ the asked false-positive rate, for each image; None without a p-value."""
        if self.p_values is None:
            return [None] * len(self.scores.score)
        return [bool(p <= self.rate) for p in self.p_values]


def choose(manifest: Manifest, asked: ScoreParameters) -> Chosen:
    """The definition that the parameters mean.

    Raises:
        InvalidInput: the bundle has no score of the asked name.
    """
    base = manifest.scores.get(asked.score or manifest.default_score)
    if base is None:
        raise InvalidInput(f"score {asked.score!r} is not defined by this bundle: {', '.join(sorted(manifest.scores))}")
    changes = {field: getattr(asked, field) for field in ("estimator", "k", "seed")}
    wanted = base.model_copy(update={field: value for field, value in changes.items() if value is not None})
    names = [name for name, known in manifest.scores.items() if _recipe(known) == _recipe(wanted)]
    preferred = [name for name in names if name == (asked.score or manifest.default_score)]
    return Chosen(next(iter(preferred + names), None), wanted)


def judge(served: Served, x: np.ndarray, asked: ScoreParameters, default_rate: float) -> Verdicts:
    """Score ``x`` (float32 [N,C,H,W] in [0,1]) and compare with the calibration.

    Raises:
        InvalidInput: unknown score, or too few calibration scores for the asked false-positive rate.
    """
    chosen = choose(served.manifest, asked)
    rate = default_rate if asked.false_positive_rate is None else asked.false_positive_rate
    reason = _no_verdict(served, chosen)
    if chosen.name is None or reason:
        return Verdicts(chosen, served.model.score(x, chosen.definition, asked.map), rate, None, None, None, reason)
    # The threshold comes first: a rate that the calibration cannot answer must not cost a computation.
    threshold = served.calibrator.threshold(chosen.name, rate)
    scores = served.model.score(x, chosen.definition, asked.map)
    p_values = served.calibrator.p_values(chosen.name, scores.score)
    return Verdicts(chosen, scores, rate, p_values, threshold, served.calibrator.n(chosen.name), None)


def rows(verdicts: Verdicts) -> list[dict[str, Any]]:
    """One dictionary an image, in the field names of the API (maps left out); non-finite numbers are None."""
    scores = verdicts.scores
    columns: dict[str, list[Any]] = {
        field: [_finite(value) for value in getattr(scores, field)]
        for field in ("score", "elbo", "log_likelihood", "rate", "distortion", "bits_per_dim", "standard_error")
    }
    n = len(scores.score)
    columns["k"] = [scores.k] * n
    columns["p_value"] = [None] * n if verdicts.p_values is None else [_finite(p) for p in verdicts.p_values]
    columns["is_anomaly"] = list(verdicts.is_anomaly)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _recipe(definition: ScoreDefinition) -> tuple[str, int, int]:
    return definition.estimator, definition.k, definition.seed


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


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
