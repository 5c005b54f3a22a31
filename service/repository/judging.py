"""Judging: scores of rows, their p-values, and the verdicts on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.calibration.conformal import p_values_from_counts
from service.calibration.false_discovery import benjamini_hochberg, min_discoveries, q_values
from service.inference.model import Scores
from service.repository.model_repository import Served
from service.repository.resolving import ChosenScore, ResolvedScoreRequest, VerdictBasis, resolve_scores
from service.repository.score_parameters import ScoreParameters

InputRows = np.ndarray | Sequence[np.ndarray]
"""float32 [N,C,H,W], images in [0, 1]; for a model of tiles images [C,h,w] of any sizes, uint8 or float32."""


@dataclass(frozen=True)
class CalibratedScore:
    """One score's p-values of N rows and the verdicts they allow, on the ``basis`` that was resolved beforehand.

    ``p_values``: float64 [N], None where the score is not calibrated. ``reason``: why there is no verdict, or none on a
    single row. ``q_values`` (float64 [N]) and ``discoveries`` (bool [N]) are there where a false-discovery rate was
    asked for. ``counts``: of each row, how many calibration scores are greater, and at least as great (int64 [N]
    twice).
    """

    basis: VerdictBasis
    p_values: np.ndarray | None
    reason: str | None
    q_values: np.ndarray | None = None
    discoveries: np.ndarray | None = None
    counts: tuple[np.ndarray, np.ndarray] | None = None

    def is_anomaly(self, count: int) -> Sequence[bool | None]:
        """True for a discovery at the asked false-discovery rate, else where p ≤ the false-positive rate.

        One verdict for each of ``count`` rows; None for all of them without p-values, or without a threshold.
        """
        if self.p_values is None or (self.basis.threshold is None and self.discoveries is None):
            return [None] * count
        if self.discoveries is not None:
            return [bool(is_discovery) for is_discovery in self.discoveries]
        return [bool(p <= self.basis.rate) for p in self.p_values]


@dataclass(frozen=True)
class Verdicts:
    """Scores of N rows and what the calibration says of them; ``also``: of the further scores, by name."""

    chosen: ChosenScore
    scores: Scores
    calibrated: CalibratedScore
    also: dict[str, CalibratedScore]

    @property
    def is_anomaly(self) -> Sequence[bool | None]:
        """The verdict on each row, by the chosen score."""
        return self.calibrated.is_anomaly(len(self.scores.score))


def judge(served: Served, x: InputRows, parameters: ScoreParameters, default_rate: float) -> Verdicts:
    """Score ``x`` and compare the scores with the calibration.

    ``default_rate``: the false-positive rate where the parameters name none.

    Raises:
        InvalidInput: unknown score or group, both rates at once, or too few calibration scores for the asked
            false-positive rate.
        UnsupportedVerb: a score or a map that the model does not have.
    """
    # The thresholds come first: a rate that the calibration cannot answer must not cost a computation.
    resolved = resolve_scores(served, parameters, default_rate)
    return judge_scores(served, resolved, scorer(served, resolved)(x))


def scorer(served: Served, resolved: ResolvedScoreRequest) -> Callable[[Any], Scores]:
    """The function of rows that computes the resolved scores; of whole images, for a model of tiles."""
    score: Callable[..., Scores] = (served.tiled or served.model).score
    definition, options = resolved.chosen.definition, resolved.options
    return lambda rows: score(rows, definition, *options)


def judge_scores(served: Served, resolved: ResolvedScoreRequest, scores: Scores) -> Verdicts:
    """Verdicts on ``scores``, which ``scorer`` computed, by the bundle's calibration."""
    parameters = resolved.parameters
    calibrated = _calibrate(served, resolved.chosen.name, scores.score, resolved.basis, parameters)
    also = {
        name: _calibrate(served, name, scores.also[name], basis, parameters)
        for name, basis in resolved.further_bases.items()
    }
    return Verdicts(resolved.chosen, scores, calibrated, also)


def _calibrate(
    served: Served, name: str | None, scores: np.ndarray, basis: VerdictBasis, parameters: ScoreParameters
) -> CalibratedScore:
    """``scores``, float64 [N], of the score of that name, with their p-values and what the asked rate needs."""
    if name is None or basis.n is None:
        return CalibratedScore(basis, None, basis.reason)
    counts = served.calibrator.counts(name, scores, parameters.group)
    p_values, rate = p_values_from_counts(counts[1], basis.n), parameters.false_discovery_rate
    if rate is None:
        return CalibratedScore(basis, p_values, basis.reason, counts=counts)
    discoveries, least = benjamini_hochberg(p_values, rate), min_discoveries(basis.n, len(scores), rate)
    reason = (
        None
        if least == 1
        else (
            f"a single anomaly among {len(scores)} rows cannot be found at a false-discovery rate of {rate:g} with "
            f"{basis.n} calibration scores: at least {least} rows would have to lie above all of them"
        )
    )
    return CalibratedScore(basis, p_values, reason, q_values(p_values), discoveries, counts)
