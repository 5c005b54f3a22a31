"""The route of drift: it tells whether the inputs have moved away from the calibration set."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.context import ContextDep
from service.api.schemas import (
    DriftAnswer,
    DriftParameters,
    KolmogorovSmirnov,
    MartingaleValue,
    PValueShares,
)
from service.calibration.drift_monitor import Drift, Finding, MonitorState, log10_alarm
from service.errors import InvalidInput, UnsupportedVerb
from service.repository.model_repository import Served
from service.repository.resolving import monitor_key

router = APIRouter(tags=["scoring"])


@router.get("/drift")
async def drift(request: Request, context: ContextDep, query: Annotated[DriftParameters, Query()]) -> DriftAnswer:
    """Compare recent conformal p-values with uniformity, by a Kolmogorov–Smirnov test and a conformal test martingale.

    Where several workers serve, this is of the rows that the answering one has scored: `worker` is its number.
    Each of them tests at the setting drift_level over the number of workers, so that drift_level bounds the false
    alarms of all together. The largest values of all workers are among the metrics.
    Rows that were scored with a group are compared with that group, and shown if that group is asked for.
    An alarm says that the scored rows are not exchangeable with the calibration images. 409 if the bundle or the score
    has no calibration.
    """
    served: Served = request.state.served
    score, scores = query.score or served.manifest.default_score, served.manifest.scores
    if score not in scores:
        raise InvalidInput(f"score {score!r} is not defined by this bundle: {', '.join(sorted(scores))}")
    if not served.calibrator.names:
        raise UnsupportedVerb("no drift to tell: this bundle carries no calibration, so its scores have no p-values")
    state = context.drift.state(monitor_key(served, score, query.group))
    return _answer(context.drift, served, score, query.group, state)


def _answer(drift: Drift, served: Served, score: str, group: str | None, state: MonitorState) -> DriftAnswer:
    finding = state.judge(drift.level)
    return DriftAnswer(
        model=served.identity,
        score=score,
        group=group,
        worker=drift.worker,
        n=state.n,
        seen=state.count,
        in_window=len(state.ranks),
        window=drift.window,
        level=drift.level,
        drifting=None if finding is None else finding.drifting,
        verdict=_in_words(score, state, finding, drift.level),
        kolmogorov_smirnov=None if finding is None else _kolmogorov_smirnov(finding),
        martingale=None if finding is None else _martingale(state, finding),
        shares=None if finding is None else _shares(state),
        histogram=state.histogram,
    )


def _kolmogorov_smirnov(finding: Finding) -> KolmogorovSmirnov:
    return KolmogorovSmirnov(statistic=finding.ks_statistic, p_value=finding.ks_p_value, alarm=finding.ks_alarm)


def _martingale(state: MonitorState, finding: Finding) -> MartingaleValue:
    return MartingaleValue(log10=state.log10_value, log10_maximum=state.log10_maximum, alarm=finding.martingale_alarm)


def _shares(state: MonitorState) -> PValueShares:
    return PValueShares(up_to_1_percent=state.share_up_to(0.01), up_to_5_percent=state.share_up_to(0.05))


def _in_words(score: str, state: MonitorState, finding: Finding | None, level: float) -> str:
    """Say in a sentence what the tests have found."""
    if finding is None:
        return f"nothing to compare: no row has been scored by {score} here yet"
    if not finding.drifting:
        return f"no drift seen at level {level:g}"
    reasons = []
    if finding.ks_alarm:
        reasons.append(f"Kolmogorov–Smirnov p-value {finding.ks_p_value:.2g} ≤ {level / 2:g}")
    if finding.martingale_alarm:
        reasons.append(f"log10 of the martingale {state.log10_value:.1f} ≥ {log10_alarm(level):.1f}")
    return f"the inputs are not like the calibration images: {' and '.join(reasons)}"
