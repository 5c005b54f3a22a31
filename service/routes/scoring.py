"""score: how unlikely is each row, and is that unusual at the asked false-positive rate?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from fastapi.responses import Response

from service import codecs
from service.bundle import ScoreDefinition
from service.errors import InvalidInput
from service.jobs import Work, finish
from service.maps import PASSES
from service.routes.documents import DATA_BODY, answers
from service.routes.house import JSON, NPY, PNG, Call, CallDep, Content, Verb, dump
from service.routes.inputs import data_names, parameters, read_images, read_x
from service.schemas import Scored, ScoreParameters
from service.scoring import (
    Judged,
    Rows,
    UsedMap,
    Verdicts,
    draw_maps,
    judging,
    meaning,
    rows,
    top_latents,
    used_map,
)

router = APIRouter(tags=["scoring"])


@router.post("/score", openapi_extra=DATA_BODY, responses=answers(Scored, JSON, NPY, PNG))
async def score(call: CallDep, query: Annotated[ScoreParameters, Query()]) -> Response:
    """Score, bounds on log p(x), conformal p-value and verdict for each image (vector, signal).

    As npy: the maps [N, H, W] with map=true ([N, D] of vectors, [N, T] of signals), else the scores [N]. As PNG
    (map=true): the maps of images, as heat maps or laid over the images. Their colours are fixed by the calibration and
    do not depend on the request: from the median place of inliers (black) to what 90% of inliers nowhere exceed (the
    last, light colour, which all above it has, too), and of map_kind=corruption from -5 to 5 nats; the text entries
    minimum, maximum, kind, unit and scale say so. A model of tiles takes images of any size that holds a tile.
    """
    return await call.answer(lambda: finish(_score(call, query)))


def _score(call: Call, query: ScoreParameters) -> Work[Content]:
    asked = parameters(call, query, *data_names(call.rule))
    media_type = call.negotiate((JSON, NPY, PNG) if asked.map else (JSON, NPY))
    meant = meaning(call.served, asked, call.house.settings.false_positive_rate)
    chosen, also = meant.chosen, meant.also
    for definition in (chosen.definition, *also.values()):
        call.served.model.require(f"score.{definition.estimator}")
    used = _required(call, asked)
    call.house.limit("k", chosen.definition.k, "max_k")
    x = read_x(call, asked.strict) if call.served.tiled is None else read_images(call)
    passes = _passes([chosen.definition, *also.values()]) + (PASSES if asked.map and used.kind != "distortion" else 0)
    _limit_work(call, x, passes, asked)
    if asked.map and media_type != JSON:
        _check_one_size(x)
    verdicts = yield from judging(call.served, x, asked, call.house.settings.false_positive_rate)
    _count(call, verdicts)
    _watch(call, verdicts, asked.group)
    if media_type == JSON:
        return dump(_content(call, verdicts, asked, used)), JSON
    if media_type == PNG:
        assert verdicts.scores.map is not None
        return draw_maps(x, verdicts.scores.map, used, asked.map_picture), PNG
    maps = _maps(call, verdicts)
    return codecs.encode_npy(verdicts.scores.score if maps is None else np.stack(list(maps))), NPY


def _required(call: Call, asked: ScoreParameters) -> UsedMap:
    """The map that is meant. Raises UnsupportedVerb for what the model lacks, InvalidInput for options without one."""
    model = call.served.model
    for name in ("map_kind", "map_picture"):
        if not asked.map and getattr(asked, name) is not None:
            raise InvalidInput(f"{name} without map=true")
    used = used_map(model, asked.map_kind)
    if asked.map:
        model.require_map(used.kind)
    if asked.top_latents:
        model.require("score.top_latents")
    return used


def _limit_work(call: Call, x: Rows, passes: int, asked: ScoreParameters) -> None:
    """Refuse what takes too long, or too many maps. Raises LimitExceeded."""
    name, rows, each = data_names(call.rule)[0], len(x), x[0].size
    pixels = rows * math.prod(call.served.manifest.signature.shape[1:])
    if call.served.tiled is not None:
        name, rows, each = "tiles", sum(len(call.served.tiled.plan(image)) for image in x), math.prod(call.rule.shape)
        pixels = sum(math.prod(image.shape[1:]) for image in x)
    call.house.limit(f"{rows} {name} × k={passes} × {each} numbers", rows * each * passes, "max_evaluated_pixels")
    if asked.map:
        call.house.limit("the count of numbers in the maps", pixels, "max_numbers_out")
    if asked.top_latents:
        each = min(asked.top_latents, call.served.manifest.signature.latent_dim)
        call.house.limit("the count of latents in the answer", len(x) * each, "max_numbers_out")


def _check_one_size(images: Rows) -> None:
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


def _content(call: Call, verdicts: Verdicts, asked: ScoreParameters, used: UsedMap) -> dict[str, Any]:
    results = rows(verdicts)
    if asked.top_latents:
        for result, latents in zip(results, top_latents(verdicts, asked.top_latents), strict=True):
            result["latents"] = latents
    maps = _maps(call, verdicts)
    if maps is not None:
        for result, single in zip(results, maps, strict=True):
            result["map"] = single
    return {
        "model": call.served.identity,
        "definition": {
            "name": verdicts.chosen.name,
            **_used(verdicts.chosen.definition),
        },
        "calibration": _calibration(verdicts.judged, asked),
        "verdict": verdicts.judged.reason,
        "also": {
            name: {
                "definition": {"name": name, **_used(call.served.manifest.scores[name])},
                "calibration": _calibration(judged, asked),
                "verdict": judged.reason,
            }
            for name, judged in verdicts.also.items()
        },
        "map": _map_in_words(used) if asked.map else None,
        "results": results,
    }


def _map_in_words(used: UsedMap) -> dict[str, Any]:
    low, high = (None, None) if used.scale is None else used.scale
    return {"kind": used.kind, "unit": used.unit, "low": low, "high": high}


def _used(definition: ScoreDefinition) -> dict[str, Any]:
    return {name: getattr(definition, name) for name in ("estimator", "k", "seed", "unit", "of", "method")}


def _passes(definitions: Iterable[ScoreDefinition]) -> int:
    """Posterior samples a row that the definitions need together, the contrast-stretched ones counted."""
    needed: dict[tuple[int, bool], int] = {}
    for definition in definitions:
        key = (definition.seed, definition.estimator == "debiased")
        needed[key] = max(needed.get(key, 0), definition.k)
    return sum(needed.values())


def _calibration(judged: Judged, asked: ScoreParameters) -> dict[str, Any] | None:
    if judged.n is None:
        return None
    return {
        "n": judged.n,
        "smallest_p_value": 1 / (judged.n + 1),
        "false_positive_rate": judged.rate if asked.false_discovery_rate is None else None,
        "false_discovery_rate": asked.false_discovery_rate,
        "threshold": judged.threshold,
    }


def _count(call: Call, verdicts: Verdicts) -> None:
    p_values = verdicts.judged.p_values
    metrics, n = call.house.metrics, len(verdicts.scores.score)
    metrics.rows("score", n)
    metrics.scored(call.served.manifest.name, [] if p_values is None else p_values, n)


def _watch(call: Call, verdicts: Verdicts, group: str | None) -> None:
    """Hand every score that has a p-value, the chosen one and the further ones, to the drift tests: each once."""
    found = {name: (judged, verdicts.scores.also[name]) for name, judged in verdicts.also.items()}
    if verdicts.chosen.name is not None:
        found[verdicts.chosen.name] = verdicts.judged, verdicts.scores.score
    for name, (judged, scores) in found.items():
        if judged.p_values is not None:
            call.house.drift.record(call.served, name, scores, group)


SHORT = (Verb("score", ScoreParameters, _score),)
"""Verbs that service.express may answer."""
