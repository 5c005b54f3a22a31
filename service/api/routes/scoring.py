"""score: how unlikely is each row, and is that unusual at the asked false-positive rate?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from service.api.context import Call, Content, dump
from service.api.endpoint import Verb, respond
from service.api.inputs import data_names, parameters, read_images, read_x, repeatable, x_reader
from service.api.openapi import DATA_BODY, answers
from service.api.schemas import Scored
from service.bundle.manifest import ScoreDefinition
from service.errors import InvalidInput
from service.formats import codecs
from service.formats.media_types import JSON, NPY, PNG
from service.inference.jobs import Job, Work
from service.inference.model import Scores
from service.inference.tiled import TiledScores
from service.repository.judging import InputRows, Verdicts, judge_scores, scorer
from service.repository.presenting import MapDescription, describe_map, draw_maps, result_rows, top_latents
from service.repository.resolving import ChosenScore, ResolvedScoreRequest, VerdictBasis, resolve_scores
from service.repository.score_parameters import ScoreParameters
from service.scores.maps.anomaly_map import PASSES

router = APIRouter(tags=["scoring"])


@router.post("/score", openapi_extra=DATA_BODY, responses=answers(Scored, JSON, NPY, PNG))
async def score(request: Request, query: Annotated[ScoreParameters, Query()]) -> Response:
    """Score, bounds on log p(x), conformal p-value and verdict for each image (vector, signal).

    As npy: the maps [N, H, W] with map=true ([N, D] of vectors, [N, T] of signals), else the scores [N]. As PNG
    (map=true): the maps of images, as heat maps or laid over the images. Their colours are fixed by the calibration and
    do not depend on the request: from the median place of inliers (black) to what 90% of inliers nowhere exceed (the
    last, light colour, which all above it has, too), and of map_kind=corruption from -5 to 5 nats; the text entries
    minimum, maximum, kind, unit and scale say so. A model of tiles takes images of any size that holds a tile.
    """
    return respond(request, SCORE, query)


def _score(call: Call, query: ScoreParameters) -> Work[Content]:
    asked = parameters(call, query, *data_names(call.rule))
    media_type = call.negotiate((JSON, NPY, PNG) if asked.map else (JSON, NPY))
    resolved = resolve_scores(call.served, asked, call.context.settings.false_positive_rate)
    chosen, also = resolved.chosen, resolved.also
    for definition in (chosen.definition, *also.values()):
        call.served.model.require(f"score.{definition.estimator}")
    used = _required(call, asked)
    call.context.limit("k", chosen.definition.k, "max_k")
    x = read_x(call, asked.strict) if call.served.tiled is None else read_images(call)
    passes = _passes([chosen.definition, *also.values()]) + (PASSES if asked.map and used.kind != "distortion" else 0)
    _limit_work(call, x, passes, asked)
    if asked.map and media_type != JSON:
        _check_one_size(x)
    # Maps are drawn over what was sent; nothing else is asked of it any more.
    answer = partial(_answer, resolved, used, media_type, x if asked.map else ())
    run = scorer(call.served, resolved)
    if call.served.tiled is not None:
        return answer(call, run(x))
    assert isinstance(x, np.ndarray)
    return answer(call, (yield repeatable(call, Job(resolved.key, x, run), answer, x_reader(call, asked.strict, x))))


def _answer(
    resolved: ResolvedScoreRequest,
    used: MapDescription,
    media_type: str,
    x: InputRows,
    call: Call,
    scores: Scores | TiledScores,
) -> Content:
    """``x``: what was scored, if there are maps of it."""
    verdicts = judge_scores(call.served, resolved, scores)
    _count(call, verdicts)
    _watch(call, verdicts, resolved)
    if media_type == JSON:
        return dump(_content(call, verdicts, resolved, used)), JSON
    if media_type == PNG:
        assert verdicts.scores.map is not None
        return draw_maps(x, verdicts.scores.map, used, resolved.parameters.map_picture), PNG
    maps = _maps(call, verdicts)
    return codecs.encode_npy(verdicts.scores.score if maps is None else np.stack(list(maps))), NPY


def _required(call: Call, asked: ScoreParameters) -> MapDescription:
    """The map that the request means.

    Raises UnsupportedVerb for what the model lacks, InvalidInput for options of a map without one.
    """
    model = call.served.model
    for name in ("map_kind", "map_picture"):
        if not asked.map and getattr(asked, name) is not None:
            raise InvalidInput(f"{name} without map=true")
    used = describe_map(model, asked.map_kind)
    if asked.map:
        model.require_map(used.kind)
    if asked.top_latents:
        model.require("score.top_latents")
    return used


def _limit_work(call: Call, x: InputRows, passes: int, asked: ScoreParameters) -> None:
    """Refuse what takes too long, or too many maps. Raises LimitExceeded."""
    name, rows, each = data_names(call.rule)[0], len(x), x[0].size
    pixels = rows * math.prod(call.served.manifest.signature.shape[1:])
    if call.served.tiled is not None:
        name, rows, each = "tiles", sum(len(call.served.tiled.plan(image)) for image in x), math.prod(call.rule.shape)
        pixels = sum(math.prod(image.shape[1:]) for image in x)
    call.context.limit(f"{rows} {name} × k={passes} × {each} numbers", rows * each * passes, "max_evaluated_pixels")
    if asked.map:
        call.context.limit("the count of numbers in the maps", pixels, "max_numbers_out")
    if asked.top_latents:
        each = min(asked.top_latents, call.served.manifest.signature.latent_dim)
        call.context.limit("the count of latents in the answer", len(x) * each, "max_numbers_out")


def _check_one_size(images: InputRows) -> None:
    """Raise InvalidInput for images of different sizes, whose maps make no one array or picture."""
    sizes = sorted({image.shape[1:] for image in images})
    if len(sizes) > 1:
        raise InvalidInput(f"maps of {sizes[0]} and of {sizes[1]} make no one array: ask for JSON, or one at a time")


def _maps(call: Call, verdicts: Verdicts) -> np.ndarray | list[np.ndarray] | None:
    """[N,H,W], and of vectors and signals, which have no height, [N,W]; of a model of tiles one [h,w] an image."""
    maps = verdicts.scores.map
    if isinstance(maps, list):
        return maps
    return maps if maps is None or call.rule.kind == "image" else maps[:, 0]


def _content(call: Call, verdicts: Verdicts, resolved: ResolvedScoreRequest, used: MapDescription) -> dict[str, Any]:
    asked, results = resolved.parameters, result_rows(verdicts)
    if asked.top_latents:
        for result, latents in zip(results, top_latents(verdicts, asked.top_latents), strict=True):
            result["latents"] = latents
    maps = _maps(call, verdicts)
    if maps is not None:
        for result, single in zip(results, maps, strict=True):
            result["map"] = single
    return {
        "model": call.served.identity,
        **_basis(resolved.chosen, resolved.basis, asked),
        "verdict": verdicts.calibrated.reason,
        "also": {
            name: {
                **_basis(ChosenScore(name, each), resolved.further_bases[name], asked),
                "verdict": verdicts.also[name].reason,
            }
            for name, each in resolved.also.items()
        },
        "map": _map_in_words(used) if asked.map else None,
        "results": results,
    }


def _map_in_words(used: MapDescription) -> dict[str, Any]:
    low, high = (None, None) if used.scale is None else used.scale
    return {"kind": used.kind, "unit": used.unit, "low": low, "high": high}


def _passes(definitions: Iterable[ScoreDefinition]) -> int:
    """Posterior samples a row that the definitions need together, the contrast-stretched ones counted."""
    needed: dict[tuple[int, bool], int] = {}
    for definition in definitions:
        key = (definition.seed, definition.estimator == "debiased")
        needed[key] = max(needed.get(key, 0), definition.k)
    return sum(needed.values())


def _basis(chosen: ChosenScore, plan: VerdictBasis, asked: ScoreParameters) -> dict[str, Any]:
    """What a score is, and what its verdicts rest on."""
    fields = ("estimator", "k", "seed", "unit", "of", "method")
    definition = {"name": chosen.name, **{field: getattr(chosen.definition, field) for field in fields}}
    if plan.n is None:
        return {"definition": definition, "calibration": None}
    calibration = {
        "n": plan.n,
        "smallest_p_value": 1 / (plan.n + 1),
        "false_positive_rate": plan.rate if asked.false_discovery_rate is None else None,
        "false_discovery_rate": asked.false_discovery_rate,
        "threshold": plan.threshold,
    }
    return {"definition": definition, "calibration": calibration}


def _count(call: Call, verdicts: Verdicts) -> None:
    p_values = verdicts.calibrated.p_values
    metrics, n = call.context.metrics, len(verdicts.scores.score)
    metrics.rows("score", n)
    metrics.scored(call.served.manifest.name, [] if p_values is None else p_values.tolist(), n)


def _watch(call: Call, verdicts: Verdicts, resolved: ResolvedScoreRequest) -> None:
    """Hand every score that has a p-value, the chosen one and the further ones, to the drift tests: each once."""
    judged = (
        verdicts.also if resolved.chosen.name is None else {**verdicts.also, resolved.chosen.name: verdicts.calibrated}
    )
    for name, place in resolved.drift_places.items():
        counts = judged[name].counts
        assert counts is not None
        call.context.drift.note(place, *counts)


SCORE = Verb(_score)
