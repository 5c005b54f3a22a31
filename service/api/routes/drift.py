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
from service.calibration.drift_monitor import Drift, Finding, Seen, log10_alarm
from service.errors import InvalidInput, UnsupportedVerb
from service.repository.model_repository import Served
from service.repository.resolving import drift_place

router = APIRouter(tags=["scoring"])


@router.get("/drift", responses={"4XX": {"model": Problem, "description": "problem"}})
async def drift(request: Request, context: ContextDep, query: Annotated[DriftParameters, Query()]) -> DriftAnswer:
    """Recent conformal p-values compared with uniformity, by a Kolmogorov–Smirnov test and a conformal test martingale.

    Where several workers serve, this is of the rows that the answering one has scored: `worker` is its number. Each of
    them tests at the setting drift_level over the number of workers, so that drift_level bounds the false alarms of all
    together. The largest values of all workers are among the metrics.
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
    seen = context.drift.seen(drift_place(served, score, query.group))
    return _answer(context.drift, served, score, query.group, seen)


def _answer(drift: Drift, served: Served, score: str, group: str | None, seen: Seen) -> DriftAnswer:
    finding = seen.judge(drift.level)
    return DriftAnswer(
        model=served.identity,
        score=score,
        group=group,
        worker=drift.worker,
        n=seen.n,
        seen=seen.seen,
        in_window=len(seen.ranks),
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


def _martingale(seen: Seen, finding: Finding) -> MartingaleValue:
    return MartingaleValue(log10=seen.log10_value, log10_maximum=seen.log10_maximum, alarm=finding.martingale_alarm)


def _shares(seen: Seen) -> PValueShares:
    return PValueShares(up_to_1_percent=seen.share_up_to(0.01), up_to_5_percent=seen.share_up_to(0.05))


def _in_words(score: str, seen: Seen, finding: Finding | None, level: float) -> str:
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
