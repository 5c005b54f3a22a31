"""The route of score: it tells how unlikely each row is, and whether that is unusual at a false-positive rate."""

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
from service.api.inputs import data_names, read_images, read_parameters, read_x, repeatable, x_reader
from service.api.openapi import DATA_BODY, answers
from service.api.schemas import Scored
from service.bundle.manifest import ScoreDefinition
from service.errors import InvalidInput
from service.formats import codecs
from service.formats.media_types import JSON, NPY, PNG
from service.inference.jobs import Job, Work
from service.inference.model import Scores
from service.repository.judging import InputRows, Verdicts, judge_scores, scorer
from service.repository.presenting import MapDescription, describe_map, draw_maps, result_rows, top_latents
from service.repository.resolving import ChosenScore, ResolvedScoreRequest, VerdictBasis, resolve_scores
from service.repository.score_parameters import ScoreParameters
from service.scores.maps.anomaly_map import PASSES

router = APIRouter(tags=["scoring"])


@router.post("/score", openapi_extra=DATA_BODY, responses=answers(Scored, JSON, NPY, PNG))
async def score(request: Request, query: Annotated[ScoreParameters, Query()]) -> Response:
    """Answer with a score, bounds on log p(x), a conformal p-value and a verdict for each image (vector, signal).

    As npy the answer is the maps [N, H, W] with map=true ([N, D] of vectors, [N, T] of signals), else the scores [N].
    As PNG (map=true) it is the maps of images, as heat maps or laid over the images. Their colours are fixed by the
    calibration and do not depend on the request: from the median place of inliers (black) to what 90% of inliers
    nowhere exceed (the last, light colour, which all above it has, too), and of map_kind=corruption from -5 to 5 nats;
    the text entries minimum, maximum, kind, unit and scale say so. A model of tiles takes images of any size that
    holds a tile.
    """
    return respond(request, SCORE, query)


def _score(call: Call, query: ScoreParameters) -> Work[Content]:
    parameters = read_parameters(call, query, *data_names(call.rule))
    media_type = call.negotiate((JSON, NPY, PNG) if parameters.map else (JSON, NPY))
    resolved = resolve_scores(call.served, parameters, call.context.settings.false_positive_rate)
    chosen, also = resolved.chosen, resolved.also
    for definition in (chosen.definition, *also.values()):
        call.served.model.require(f"score.{definition.estimator}")
    description = _require_maps(call, parameters)
    call.context.limit("k", chosen.definition.k, "max_k")
    x = read_x(call, parameters.strict) if call.served.tiled is None else read_images(call)
    samples = _samples([chosen.definition, *also.values()])
    if parameters.map and description.kind != "distortion":
        samples += PASSES
    _limit_work(call, x, samples, parameters)
    if parameters.map and media_type != JSON:
        _check_one_size(x)
    # An answer with maps may draw them over x; any other needs x no more.
    answer = partial(_answer, resolved, description, media_type, x if parameters.map else ())
    run = scorer(call.served, resolved)
    if call.served.tiled is not None:
        return answer(call, run(x))
    assert isinstance(x, np.ndarray)
    job = Job(resolved.key, x, run)
    return answer(call, (yield repeatable(call, job, answer, x_reader(call, parameters.strict, x))))


def _answer(
    resolved: ResolvedScoreRequest,
    description: MapDescription,
    media_type: str,
    x: InputRows,
    call: Call,
    scores: Scores,
) -> Content:
    """Write the answer to a request whose scores are computed; ``x`` are the rows, of an answer with maps only."""
    verdicts = judge_scores(call.served, resolved, scores)
    _count(call, verdicts)
    if call.context.settings.drift:
        _record_drift(call, verdicts, resolved)
    if media_type == JSON:
        return dump(_content(call, verdicts, resolved, description)), JSON
    if media_type == PNG:
        assert verdicts.scores.map is not None
        return draw_maps(x, verdicts.scores.map, description, resolved.parameters.map_picture), PNG
    maps = _maps(call, verdicts)
    return codecs.encode_npy(verdicts.scores.score if maps is None else np.stack(list(maps))), NPY


def _require_maps(call: Call, parameters: ScoreParameters) -> MapDescription:
    """Check that the model has the maps and latents that are asked for, and describe the maps.

    Raises UnsupportedVerb for what the model lacks, InvalidInput for options of a map without one.
    """
    model = call.served.model
    for name in ("map_kind", "map_picture"):
        if not parameters.map and getattr(parameters, name) is not None:
            raise InvalidInput(f"{name} without map=true")
    description = describe_map(model, parameters.map_kind)
    if parameters.map:
        model.require_map(description.kind)
    if parameters.top_latents:
        model.require("score.top_latents")
    return description


def _limit_work(call: Call, x: InputRows, samples: int, parameters: ScoreParameters) -> None:
    """Raise LimitExceeded for rows that take too long with ``samples`` posterior samples, or have too large maps."""
    name, rows, numbers = data_names(call.rule)[0], len(x), x[0].size
    pixels = rows * math.prod(call.served.manifest.signature.shape[1:])
    if call.served.tiled is not None:
        name, rows = "tiles", sum(len(call.served.tiled.plan(image)) for image in x)
        numbers, pixels = math.prod(call.rule.shape), sum(math.prod(image.shape[1:]) for image in x)
    work = f"{rows} {name} × k={samples} × {numbers} numbers"
    call.context.limit(work, rows * numbers * samples, "max_evaluated_pixels")
    call.context.limit_seconds(call.served.model, rows, samples, f"{rows} {name} × k={samples}")
    if parameters.map:
        call.context.limit("the count of numbers in the maps", pixels, "max_numbers_out")
    if parameters.top_latents:
        latents = min(parameters.top_latents, call.served.manifest.signature.latent_dim)
        call.context.limit("the count of latents in the answer", len(x) * latents, "max_numbers_out")


def _check_one_size(images: InputRows) -> None:
    """Raise InvalidInput for images of different sizes, whose maps make no one array or picture."""
    sizes = sorted({image.shape[1:] for image in images})
    if len(sizes) > 1:
        raise InvalidInput(f"maps of {sizes[0]} and of {sizes[1]} make no one array: ask for JSON, or one at a time")


def _maps(call: Call, verdicts: Verdicts) -> np.ndarray | list[np.ndarray] | None:
    """Return the maps in their natural shape: [N,H,W] of images, [N,W] of vectors and signals, which have no height.

    A model of tiles has one map [h,w] an image.
    """
    maps = verdicts.scores.map
    if isinstance(maps, list):
        return maps
    return maps if maps is None or call.rule.kind == "image" else maps[:, 0]


def _content(
    call: Call, verdicts: Verdicts, resolved: ResolvedScoreRequest, description: MapDescription
) -> dict[str, Any]:
    """Return the fields of a JSON answer, which service.api.schemas.Scored describes."""
    parameters, results = resolved.parameters, result_rows(verdicts)
    if parameters.top_latents:
        for result, latents in zip(results, top_latents(verdicts, parameters.top_latents), strict=True):
            result["latents"] = latents
    maps = _maps(call, verdicts)
    if maps is not None:
        for result, single in zip(results, maps, strict=True):
            result["map"] = single
    return {
        "model": call.served.identity,
        **_basis(resolved.chosen, resolved.basis, parameters),
        "verdict": verdicts.calibrated.reason,
        "also": {
            name: {
                **_basis(ChosenScore(name, definition), resolved.further_bases[name], parameters),
                "verdict": verdicts.also[name].reason,
            }
            for name, definition in resolved.also.items()
        },
        "map": _map_fields(description) if parameters.map else None,
        "results": results,
    }


def _map_fields(description: MapDescription) -> dict[str, Any]:
    low, high = (None, None) if description.scale is None else description.scale
    return {"kind": description.kind, "unit": description.unit, "low": low, "high": high}


def _samples(definitions: Iterable[ScoreDefinition]) -> int:
    """Count the posterior samples a row that the definitions need together, the contrast-stretched ones included."""
    needed: dict[tuple[int, bool], int] = {}
    for definition in definitions:
        key = (definition.seed, definition.estimator == "debiased")
        needed[key] = max(needed.get(key, 0), definition.k)
    return sum(needed.values())


def _basis(chosen: ChosenScore, basis: VerdictBasis, parameters: ScoreParameters) -> dict[str, Any]:
    """Return the fields that say what a score is, and what its verdicts rest on."""
    fields = ("estimator", "k", "seed", "unit", "of", "method")
    definition = {"name": chosen.name, **{field: getattr(chosen.definition, field) for field in fields}}
    if basis.n is None:
        return {"definition": definition, "calibration": None}
    calibration = {
        "n": basis.n,
        "smallest_p_value": 1 / (basis.n + 1),
        "false_positive_rate": basis.rate if parameters.false_discovery_rate is None else None,
        "false_discovery_rate": parameters.false_discovery_rate,
        "threshold": basis.threshold,
    }
    return {"definition": definition, "calibration": calibration}


def _count(call: Call, verdicts: Verdicts) -> None:
    """Count the scored rows and their p-values in the metrics."""
    p_values = verdicts.calibrated.p_values
    metrics, n = call.context.metrics, len(verdicts.scores.score)
    metrics.rows("score", n)
    metrics.scored(call.served.manifest.name, [] if p_values is None else p_values.tolist(), n)


def _record_drift(call: Call, verdicts: Verdicts, resolved: ResolvedScoreRequest) -> None:
    """Hand each score that has p-values, the chosen one and the further ones, to its drift monitor once."""
    calibrated = dict(verdicts.also)
    if resolved.chosen.name is not None:
        calibrated[resolved.chosen.name] = verdicts.calibrated
    for name, key in resolved.monitor_keys.items():
        counts = calibrated[name].counts
        assert counts is not None
        call.context.drift.record(key, *counts)


SCORE = Verb(_score, asks_for_much=lambda parameters, _: parameters.map or parameters.top_latents > 0)
