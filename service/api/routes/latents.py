"""encode, decode, reconstruct, interpolate and sample: thin handlers that translate; service.inference.model
computes."""

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
    parameters,
    read_latents,
    read_pair,
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
from service.errors import InvalidInput
from service.formats import codecs
from service.formats.media_types import GIF, JSON, NPY, PNG, WEBP
from service.inference.jobs import Job, Work
from service.inference.model import Encoding, Model

router = APIRouter(tags=["latents"])


class Generated(NamedTuple):
    """Latents z, float32 [N,L], of the prior, and the x [N,C,H,W] of each."""

    z: np.ndarray
    x: np.ndarray


NUMBERS = (JSON, NPY)
ROWS = (JSON, NPY, PNG)
"""What answers of numbers, and of rows, are offered as."""


@router.post("/encode", openapi_extra=DATA_BODY, responses=answers(Encoded, JSON, NPY))
async def encode(request: Request, query: Annotated[EncodeParameters, Query()]) -> Response:
    """Posterior q(z|x) of each image (vector, signal): loc, scale, and seeded samples if asked for."""
    return respond(request, ENCODE, query)


@router.post("/decode", openapi_extra=LATENT_BODY, responses=answers(Rows, JSON, NPY, PNG))
async def decode(request: Request, query: Annotated[DecodeParameters, Query()]) -> Response:
    """Images (vectors, signals) of given latents: E[x|z], or a draw from p(x|z)."""
    return respond(request, DECODE, query)


@router.post("/reconstruct", openapi_extra=DATA_BODY, responses=answers(Rows, JSON, NPY, PNG))
async def reconstruct(request: Request, query: Annotated[ReconstructParameters, Query()]) -> Response:
    """E[x|z] at the posterior's loc."""
    return respond(request, RECONSTRUCT, query)


@router.post("/interpolate", openapi_extra=PAIR_BODY, responses=answers(LatentRows, JSON, NPY, PNG, GIF, WEBP))
async def interpolate(request: Request, query: Annotated[InterpolateParameters, Query()]) -> Response:
    """A path between two images (vectors, signals) or two latents, decoded."""
    return respond(request, INTERPOLATE, query)


@router.get("/sample", responses=answers(LatentRows, JSON, NPY, PNG))
async def sample(request: Request, query: Annotated[SampleParameters, Query()]) -> Response:
    """New images (vectors, signals): z from the prior, then E[x|z] or a draw from p(x|z)."""
    return respond(request, SAMPLE, query)


@router.post("/sample", openapi_extra=PARAMETER_BODY, responses=answers(LatentRows, JSON, NPY, PNG))
async def sample_post(request: Request, query: Annotated[SampleParameters, Query()]) -> Response:
    """As GET; the parameters may also be a JSON object in the body."""
    return respond(request, SAMPLE, query)


def _encode(call: Call, query: EncodeParameters) -> Work[Content]:
    media_type = call.negotiate(NUMBERS)
    asked = parameters(call, query, *data_names(call.rule))
    call.context.limit("samples", asked.samples, "max_samples")
    if asked.samples:
        call.served.model.require("encode.samples")
    x = read_x(call, asked.strict)
    call.context.limit_numbers_out(len(x), (2 + asked.samples) * call.served.manifest.signature.latent_dim)
    answer, job = partial(_encoded, asked, media_type), _encoding(call.served.model, x, asked.samples, asked.seed)
    return answer(call, (yield repeatable(call, job, answer, x_reader(call, asked.strict, x))))


def _encoding(model: Model, x: np.ndarray, samples: int, seed: int) -> Job:
    return Job(("encode", model, samples, seed), x, lambda rows: model.encode(rows, samples, seed))


def _decoding(model: Model, z: np.ndarray, draw: bool, seed: int) -> Job:
    return Job(("decode", model, draw, seed), z, lambda rows: _observed(model, rows, draw, seed))


def _encoded(asked: EncodeParameters, media_type: str, call: Call, posterior: Encoding) -> Content:
    call.context.metrics.rows("encode", len(posterior.loc))
    if media_type == NPY:
        return codecs.encode_npy(getattr(posterior, asked.array)), NPY
    content: dict[str, Any] = {"model": call.served.identity, "loc": posterior.loc, "scale": posterior.scale}
    if asked.samples:
        content["samples"] = posterior.samples
    return dump(content), JSON


def _decode(call: Call, query: DecodeParameters) -> Work[Content]:
    media_type = call.negotiate(ROWS)
    asked = parameters(call, query, *LATENTS)
    call.served.model.require("decode")
    _require_draw(call, "decode", asked.draw)
    z = read_latents(call)
    call.context.limit_numbers_out(len(z), _numbers(call))
    answer, job = partial(_decoded, media_type), _decoding(call.served.model, z, asked.draw, asked.seed)
    return answer(call, (yield repeatable(call, job, answer, latents_reader(call, z, _numbers(call)))))


def _decoded(media_type: str, call: Call, x: np.ndarray) -> Content:
    call.context.metrics.rows("decode", len(x))
    return _show(call, media_type, x)


def _reconstruct(call: Call, query: ReconstructParameters) -> Work[Content]:
    media_type = call.negotiate(ROWS)
    asked = parameters(call, query, *data_names(call.rule))
    call.served.model.require("reconstruct")
    x = read_x(call, asked.strict)
    call.context.limit_numbers_out(len(x), _numbers(call))
    model, seed = call.served.model, asked.seed
    answer = partial(_reconstructed, media_type)
    job = Job(("reconstruct", model, seed), x, lambda rows: model.reconstruct(rows, seed))
    return answer(call, (yield repeatable(call, job, answer, x_reader(call, asked.strict, x))))


def _reconstructed(media_type: str, call: Call, decoded: np.ndarray) -> Content:
    call.context.metrics.rows("reconstruct", len(decoded))
    return _show(call, media_type, decoded)


def _interpolate(call: Call, query: InterpolateParameters) -> Work[Content]:
    media_type = call.negotiate((*ROWS, GIF, WEBP))
    asked = parameters(call, query, *data_names(call.rule), *LATENTS)
    call.served.model.require("interpolate")
    _require_draw(call, "interpolate", asked.draw)
    call.context.limit("steps", asked.steps, "max_steps")
    call.context.limit_numbers_out(asked.steps, _numbers(call) + call.served.manifest.signature.latent_dim)
    pair, is_of_latents = read_pair(call, asked.strict)
    call.forget_body()
    model = call.served.model
    a, b = pair if is_of_latents else (yield _encoding(model, pair, 0, 0)).loc
    z = model.interpolate(a, b, asked.steps, asked.mode)
    x = yield _decoding(model, z, asked.draw, asked.seed)
    call.context.metrics.rows("interpolate", len(z))
    return _show(call, media_type, x, latents=z)


def _sample(call: Call, query: SampleParameters) -> Work[Content]:
    media_type = call.negotiate(ROWS)
    asked = parameters(call, query)
    call.served.model.require("sample")
    _require_draw(call, "sample", asked.draw)
    call.context.limit("n", asked.n, "max_n")
    call.context.limit_numbers_out(asked.n, _numbers(call) + call.served.manifest.signature.latent_dim)
    model, answer = call.served.model, partial(_sampled, media_type)
    draw_noise = partial(model.prior_noise, asked.n, asked.seed, asked.temperature)
    if asked.draw:
        # Draws of one sample are independent of each other, a seed each, and so of no job that others might share.
        seeds = [(asked.seed + row) % 2**32 for row in range(asked.n)]
        z = model.latents_of(draw_noise())
        return answer(call, Generated(z, _observed(model, z, True, seeds)))
    job = Job(("sample", model), draw_noise(), partial(_generated, model))
    return answer(call, (yield repeatable(call, job, answer, lambda _: draw_noise())))


def _generated(model: Model, prior_noise: np.ndarray) -> Generated:
    z = model.latents_of(prior_noise)
    return Generated(z, _observed(model, z, False, 0))


def _sampled(media_type: str, call: Call, generated: Generated) -> Content:
    call.context.metrics.rows("sample", len(generated.x))
    return _show(call, media_type, generated.x, generated.z)


def _require_draw(call: Call, verb: str, draw: bool) -> None:
    if draw:
        call.served.model.require(f"{verb}.draw")


def _numbers(call: Call) -> int:
    """In one row of x."""
    return math.prod(call.served.manifest.signature.shape)


def _observed(model: Model, z: np.ndarray, draw: bool, seed: int | list[int]) -> np.ndarray:
    x = model.observe(z, seed) if draw else model.decode(z)
    if not np.isfinite(x).all():
        raise InvalidInput("these latents lead to numbers that are not finite: expected latents of the prior's size")
    return x


def _show(call: Call, media_type: str, x: np.ndarray, latents: np.ndarray | None = None) -> tuple[bytes, str]:
    """Rows [N,C,H,W] in the negotiated media type, in their natural shape."""
    x = x.reshape(-1, *call.rule.natural)
    if media_type == JSON:
        content: dict[str, Any] = {"model": call.served.identity, data_names(call.rule)[0]: x}
        return dump(content if latents is None else {**content, "latents": latents}), JSON
    encoders = {NPY: codecs.encode_npy, PNG: codecs.encode_png, GIF: codecs.encode_gif, WEBP: codecs.encode_webp}
    return encoders[media_type](x), media_type


ENCODE = Verb(_encode)
DECODE = Verb(_decode)
RECONSTRUCT = Verb(_reconstruct)
INTERPOLATE = Verb(_interpolate, several=True)
SAMPLE = Verb(_sample, rows=lambda parameters: parameters.n)
