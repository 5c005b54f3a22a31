"""drift: have the inputs moved away from the calibration set?"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.api.context import ContextDep
from service.api.schemas import (
    DriftAnswer,
    DriftParameters,
    KolmogorovSmirnov,
    MartingaleValue,
    Problem,
    PValueShares,
)
from service.calibration.drift_monitor import DriftWatch, Finding, Summary, log10_alarm
from service.errors import InvalidInput, UnsupportedVerb
from service.repository.model_repository import Served
from service.repository.resolving import drift_place

router = APIRouter(tags=["scoring"])


@router.get("/drift", responses={"4XX": {"model": Problem, "description": "problem"}})
async def drift(request: Request, context: ContextDep, query: Annotated[DriftParameters, Query()]) -> DriftAnswer:
    """Recent conformal p-values compared with uniformity, by a Kolmogorov–Smirnov test and a conformal test martingale.

    Of the whole service: where several processes serve the model, one of them watches the rows of all.
    Rows that were scored with a group are held against that group, and shown where that group is asked for.
    An alarm says that the scored rows are not exchangeable with the calibration images. 409 where the bundle or the
    asked score has no calibration.
    """
    served: Served = request.state.served
    score, scores = query.score or served.manifest.default_score, served.manifest.scores
    if score not in scores:
        raise InvalidInput(f"score {score!r} is not defined by this bundle: {', '.join(sorted(scores))}")
    if not served.calibrator.names:
        raise UnsupportedVerb("no drift to tell: this bundle carries no calibration, so its scores have no p-values")
    summary = await context.drift.summary(drift_place(served, score, query.group))
    return _answer(context.drift, served, score, query.group, summary)


def _answer(drift: DriftWatch, served: Served, score: str, group: str | None, seen: Summary) -> DriftAnswer:
    finding = seen.finding
    return DriftAnswer(
        model=served.identity,
        score=score,
        group=group,
        n=seen.n,
        seen=seen.seen,
        in_window=seen.in_window,
        window=drift.window,
        level=drift.level,
        drifting=None if finding is None else finding.drifting,
        verdict=_in_words(score, seen, finding, drift.level),
        kolmogorov_smirnov=None if finding is None else _kolmogorov_smirnov(finding),
        martingale=None if finding is None else _martingale(seen, finding),
        shares=None if finding is None else _shares(seen),
        histogram=seen.histogram,
    )


def _kolmogorov_smirnov(finding: Finding) -> KolmogorovSmirnov:
    return KolmogorovSmirnov(statistic=finding.ks_statistic, p_value=finding.ks_p_value, alarm=finding.ks_alarm)


def _martingale(seen: Summary, finding: Finding) -> MartingaleValue:
    return MartingaleValue(log10=seen.log10_value, log10_maximum=seen.log10_maximum, alarm=finding.martingale_alarm)


def _shares(seen: Summary) -> PValueShares:
    return PValueShares(up_to_1_percent=seen.up_to_1_percent, up_to_5_percent=seen.up_to_5_percent)


def _in_words(score: str, seen: Summary, finding: Finding | None, level: float) -> str:
    if finding is None:
        return f"nothing to compare: no row has been scored by {score} here yet"
    if not finding.drifting:
        return f"no drift seen at level {level:g}"
    reasons = []
    if finding.ks_alarm:
        reasons.append(f"Kolmogorov–Smirnov p-value {finding.ks_p_value:.2g} ≤ {level / 2:g}")
    if finding.martingale_alarm:
        reasons.append(f"log10 of the martingale {seen.log10_value:.1f} ≥ {log10_alarm(level):.1f}")
    return f"the inputs are not like the calibration images: {' and '.join(reasons)}"
