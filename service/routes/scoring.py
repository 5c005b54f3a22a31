"""score: how unlikely is each row, and is that unusual at the asked false-positive rate?"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from fastapi.responses import Response

from service import codecs
from service.routes.documents import DATA_BODY, answers
from service.routes.house import JSON, NPY, PNG, Call, CallDep, dump
from service.routes.inputs import data_names, parameters, read_x
from service.schemas import Scored, ScoreParameters
from service.scoring import Verdicts, choose, judge, rows

router = APIRouter(tags=["scoring"])


@router.post("/score", openapi_extra=DATA_BODY, responses=answers(Scored, JSON, NPY, PNG))
async def score(call: CallDep, query: Annotated[ScoreParameters, Query()]) -> Response:
    """Score, bounds on log p(x), conformal p-value and verdict for each image (vector, signal).

    As npy: the maps [N, H, W] with map=true ([N, D] of vectors, [N, T] of signals), else the scores [N]. As PNG
    (map=true): the maps as heat maps, of images.
    """
    return await call.answer(lambda: _score(call, query))


def _score(call: Call, query: ScoreParameters) -> tuple[bytes, str]:
    asked = parameters(call, query, *data_names(call.rule))
    media_type = call.negotiate([JSON, NPY, PNG] if asked.map else [JSON, NPY])
    chosen = choose(call.served.manifest, asked)
    call.served.model.require(f"score.{chosen.definition.estimator}")
    if asked.map:
        call.served.model.require("score.map")
    call.house.limit("k", chosen.definition.k, "max_k")
    x = read_x(call, asked.strict)
    work = f"{len(x)} {data_names(call.rule)[0]} × k={chosen.definition.k} × {x[0].size} numbers"
    call.house.limit(work, x.size * chosen.definition.k, "max_evaluated_pixels")
    if asked.map:
        _, height, width = call.served.manifest.signature.shape
        call.house.limit_numbers_out(len(x), height * width)
    verdicts = judge(call.served, x, asked, call.house.settings.false_positive_rate)
    _count(call, verdicts)
    if media_type == JSON:
        return dump(_content(call, verdicts)), JSON
    maps = _maps(call, verdicts)
    if maps is None:
        return codecs.encode_npy(verdicts.scores.score), NPY
    return (codecs.encode_npy if media_type == NPY else codecs.encode_heat_maps)(maps), media_type


def _maps(call: Call, verdicts: Verdicts) -> np.ndarray | None:
    """[N,H,W], and of vectors and signals, which have no height, [N,W]."""
    maps = verdicts.scores.map
    return maps if maps is None or call.rule.kind == "image" else maps[:, 0]


def _content(call: Call, verdicts: Verdicts) -> dict[str, Any]:
    results = rows(verdicts)
    maps = _maps(call, verdicts)
    if maps is not None:
        for result, single in zip(results, maps, strict=True):
            result["map"] = single
    return {
        "model": call.served.identity,
        "definition": {
            "name": verdicts.chosen.name,
            **verdicts.chosen.definition.model_dump(include={"estimator", "k", "seed", "unit"}),
        },
        "calibration": _calibration(verdicts),
        "verdict": verdicts.reason,
        "results": results,
    }


def _calibration(verdicts: Verdicts) -> dict[str, Any] | None:
    if verdicts.n is None:
        return None
    return {
        "n": verdicts.n,
        "smallest_p_value": 1 / (verdicts.n + 1),
        "false_positive_rate": verdicts.rate,
        "threshold": verdicts.threshold,
    }


def _count(call: Call, verdicts: Verdicts) -> None:
    metrics, n = call.house.metrics, len(verdicts.scores.score)
    metrics.batch.labels("score").observe(n)
    metrics.scored(call.served.manifest.name, [] if verdicts.p_values is None else verdicts.p_values, n)
