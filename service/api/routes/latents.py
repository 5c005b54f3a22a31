"""Routes of encode, decode, reconstruct, interpolate and sample.

They translate between HTTP and arrays; service.inference.model computes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from service.api.context import Call, Content, dump
from service.api.endpoint import Verb, respond
from service.api.inputs import (
    LATENTS,
    data_names,
    latents_reader,
    read_latents,
    read_pair,
    read_parameters,
    read_x,
    repeatable,
    x_reader,
)
from service.api.openapi import DATA_BODY, LATENT_BODY, PAIR_BODY, PARAMETER_BODY, answers
from service.api.schemas import (
    DecodeParameters,
    Encoded,
    EncodeParameters,
    InterpolateParameters,
    LatentRows,
    ReconstructParameters,
    Rows,
    SampleParameters,
)
from service.api.small_requests import are_few
from service.errors import InvalidInput
from service.formats import codecs
from service.formats.media_types import GIF, JSON, NPY, PNG, WEBP
from service.inference.jobs import Job, Work
from service.inference.model import Encoding, Model

router = APIRouter(tags=["latents"])


class Generated(NamedTuple):
    """Samples of a model: latents z of the prior, float32 [N,L], and the x that they lead to, float32 [N,C,H,W]."""

    z: np.ndarray
    x: np.ndarray


NUMBERS = (JSON, NPY)
ROWS = (JSON, NPY, PNG)
"""Media types of answers that hold numbers, and of answers that hold rows of x, which may be images."""


@router.post("/encode", openapi_extra=DATA_BODY, responses=answers(Encoded, JSON, NPY))
async def encode(request: Request, query: Annotated[EncodeParameters, Query()]) -> Response:
    """Answer with the posterior q(z|x) of each image (vector, signal): loc, scale, and seeded samples if asked for."""
    return respond(request, ENCODE, query)


@router.post("/decode", openapi_extra=LATENT_BODY, responses=answers(Rows, JSON, NPY, PNG))
async def decode(request: Request, query: Annotated[DecodeParameters, Query()]) -> Response:
    """Decode latents to images (vectors, signals): E[x|z], or a draw from p(x|z)."""
    return respond(request, DECODE, query)


@router.post("/reconstruct", openapi_extra=DATA_BODY, responses=answers(Rows, JSON, NPY, PNG))
async def reconstruct(request: Request, query: Annotated[ReconstructParameters, Query()]) -> Response:
    """Encode each image (vector, signal) and decode the loc of its posterior: E[x|z]."""
    return respond(request, RECONSTRUCT, query)


@router.post("/interpolate", openapi_extra=PAIR_BODY, responses=answers(LatentRows, JSON, NPY, PNG, GIF, WEBP))
async def interpolate(request: Request, query: Annotated[InterpolateParameters, Query()]) -> Response:
    """Decode a path between two images (vectors, signals) or two latents."""
    return respond(request, INTERPOLATE, query)


@router.get("/sample", responses=answers(LatentRows, JSON, NPY, PNG))
async def sample(request: Request, query: Annotated[SampleParameters, Query()]) -> Response:
    """Make new images (vectors, signals): z is drawn from the prior, then decoded to E[x|z] or a draw from p(x|z)."""
    return respond(request, SAMPLE, query)


@router.post("/sample", openapi_extra=PARAMETER_BODY, responses=answers(LatentRows, JSON, NPY, PNG))
async def sample_post(request: Request, query: Annotated[SampleParameters, Query()]) -> Response:
    """Make new images as GET does; the parameters may also be a JSON object in the body."""
    return respond(request, SAMPLE, query)


def _encode(call: Call, query: EncodeParameters) -> Work[Content]:
    media_type = call.negotiate(NUMBERS)
    parameters = read_parameters(call, query, *data_names(call.rule))
    call.context.limit("samples", parameters.samples, "max_samples")
    if parameters.samples:
        call.served.model.require("encode.samples")
    x = _read_rows(call, parameters.strict)
    call.context.limit_numbers_out(len(x), (2 + parameters.samples) * call.served.manifest.signature.latent_dim)
    job = _encode_job(call.served.model, x, parameters.samples, parameters.seed)
    answer = partial(_encode_answer, parameters, media_type)
    return answer(call, (yield repeatable(call, job, answer, x_reader(call, parameters.strict, x))))


def _read_rows(call: Call, strict: bool) -> np.ndarray:
    """Read the body's rows as ``read_x`` does. Raises LimitExceeded for more than a slow backbone can take in time."""
    x = read_x(call, strict)
    call.context.limit_seconds(call.served.model, len(x), 0, f"{len(x)} {data_names(call.rule)[0]}")
    return x


def _encode_job(model: Model, x: np.ndarray, samples: int, seed: int) -> Job:
    drawn_by = seed if samples or model.manifest.signature.dither else 0  # jobs that need no seed share batches
    return Job(("encode", model, samples, drawn_by), x, lambda rows: model.encode(rows, samples, seed))


def _decode_job(model: Model, z: np.ndarray, draw: bool, seed: int) -> Job:
    return Job(("decode", model, draw, seed if draw else 0), z, lambda rows: _observe(model, rows, draw, seed))


def _encode_answer(parameters: EncodeParameters, media_type: str, call: Call, posterior: Encoding) -> Content:
    call.context.metrics.rows("encode", len(posterior.loc))
    if media_type == NPY:
        return codecs.encode_npy(getattr(posterior, parameters.array)), NPY
    content: dict[str, Any] = {"model": call.served.identity, "loc": posterior.loc, "scale": posterior.scale}
    if parameters.samples:
        content["samples"] = posterior.samples
    return dump(content), JSON


def _decode(call: Call, query: DecodeParameters) -> Work[Content]:
    media_type = call.negotiate(ROWS)
    parameters = read_parameters(call, query, *LATENTS)
    call.served.model.require("decode")
    _require_draw(call, "decode", parameters.draw)
    z = read_latents(call)
    call.context.limit_numbers_out(len(z), _row_numbers(call))
    job = _decode_job(call.served.model, z, parameters.draw, parameters.seed)
    answer = partial(_decode_answer, media_type)
    return answer(call, (yield repeatable(call, job, answer, latents_reader(call, z, _row_numbers(call)))))


def _decode_answer(media_type: str, call: Call, x: np.ndarray) -> Content:
    call.context.metrics.rows("decode", len(x))
    return _write_rows(call, media_type, x)


def _reconstruct(call: Call, query: ReconstructParameters) -> Work[Content]:
    media_type = call.negotiate(ROWS)
    parameters = read_parameters(call, query, *data_names(call.rule))
    call.served.model.require("reconstruct")
    x = _read_rows(call, parameters.strict)
    call.context.limit_numbers_out(len(x), _row_numbers(call))
    model, seed = call.served.model, parameters.seed
    answer = partial(_reconstruct_answer, media_type)
    drawn_by = seed if model.manifest.signature.dither else 0
    job = Job(("reconstruct", model, drawn_by), x, lambda rows: model.reconstruct(rows, seed))
    return answer(call, (yield repeatable(call, job, answer, x_reader(call, parameters.strict, x))))


def _reconstruct_answer(media_type: str, call: Call, decoded: np.ndarray) -> Content:
    call.context.metrics.rows("reconstruct", len(decoded))
    return _write_rows(call, media_type, decoded)


def _interpolate(call: Call, query: InterpolateParameters) -> Work[Content]:
    media_type = call.negotiate((*ROWS, GIF, WEBP))
    parameters = read_parameters(call, query, *data_names(call.rule), *LATENTS)
    call.served.model.require("interpolate")
    _require_draw(call, "interpolate", parameters.draw)
    call.context.limit("steps", parameters.steps, "max_steps")
    call.context.limit_numbers_out(parameters.steps, _row_numbers(call) + call.served.manifest.signature.latent_dim)
    pair, is_of_latents = read_pair(call, parameters.strict)
    call.forget_body()
    model = call.served.model
    a, b = pair if is_of_latents else (yield _encode_job(model, pair, 0, 0)).loc
    z = model.interpolate(a, b, parameters.steps, parameters.mode)
    x = yield _decode_job(model, z, parameters.draw, parameters.seed)
    call.context.metrics.rows("interpolate", len(z))
    return _write_rows(call, media_type, x, latents=z)


def _sample(call: Call, query: SampleParameters) -> Work[Content]:
    media_type = call.negotiate(ROWS)
    parameters = read_parameters(call, query)
    call.served.model.require("sample")
    _require_draw(call, "sample", parameters.draw)
    call.context.limit("n", parameters.n, "max_n")
    call.context.limit_numbers_out(parameters.n, _row_numbers(call) + call.served.manifest.signature.latent_dim)
    model, answer = call.served.model, partial(_sample_answer, media_type)
    draw_noise = partial(model.prior_noise, parameters.n, parameters.seed, parameters.temperature)
    if parameters.draw:
        # Each draw of a request has a seed of its own, so that they are independent: no others could share the job.
        seeds = [(parameters.seed + row) % 2**32 for row in range(parameters.n)]
        z = model.latents_of(draw_noise())
        return answer(call, Generated(z, _observe(model, z, True, seeds)))
    job = Job(("sample", model), draw_noise(), partial(_generate, model))
    return answer(call, (yield repeatable(call, job, answer, lambda _: draw_noise())))


def _generate(model: Model, prior_noise: np.ndarray) -> Generated:
    z = model.latents_of(prior_noise)
    return Generated(z, _observe(model, z, False, 0))


def _sample_answer(media_type: str, call: Call, generated: Generated) -> Content:
    call.context.metrics.rows("sample", len(generated.x))
    return _write_rows(call, media_type, generated.x, generated.z)


def _require_draw(call: Call, verb: str, draw: bool) -> None:
    """Raise UnsupportedVerb if a draw from p(x|z) is asked for and the model cannot draw."""
    if draw:
        call.served.model.require(f"{verb}.draw")


def _row_numbers(call: Call) -> int:
    """Count the numbers in one row of x."""
    return math.prod(call.served.manifest.signature.shape)


def _observe(model: Model, z: np.ndarray, draw: bool, seed: int | list[int]) -> np.ndarray:
    """Return x of the latents: E[x|z], or a draw from p(x|z). Raises InvalidInput if that is not finite."""
    x = model.observe(z, seed) if draw else model.decode(z)
    if not np.isfinite(x).all():
        raise InvalidInput("these latents lead to numbers that are not finite: expected latents of the prior's size")
    return x


def _write_rows(call: Call, media_type: str, x: np.ndarray, latents: np.ndarray | None = None) -> tuple[bytes, str]:
    """Write rows [N,C,H,W] in the negotiated media type and in their natural shape."""
    x = x.reshape(-1, *call.rule.natural)
    if media_type == JSON:
        content: dict[str, Any] = {"model": call.served.identity, data_names(call.rule)[0]: x}
        return dump(content if latents is None else {**content, "latents": latents}), JSON
    encoders = {NPY: codecs.encode_npy, PNG: codecs.encode_png, GIF: codecs.encode_gif, WEBP: codecs.encode_webp}
    return encoders[media_type](x), media_type


ENCODE = Verb(_encode, asks_for_much=lambda parameters, _: parameters.samples > 0)
DECODE = Verb(_decode)
RECONSTRUCT = Verb(_reconstruct)
INTERPOLATE = Verb(
    _interpolate, asks_for_much=lambda parameters, numbers: not are_few(parameters.steps, numbers), several=True
)
SAMPLE = Verb(_sample, rows=lambda parameters: parameters.n, asks_for_much=lambda parameters, _: parameters.draw)
