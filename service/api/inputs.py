"""From a call to its parameters and arrays. Runs on a worker thread: decoding may take long."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from service.api.context import Call, Content
from service.api.small_requests import MAX_BODY_BYTES, fits_event_loop
from service.bundle.input_rules import ArrayPreprocessing, InputRule, Preprocessing
from service.errors import InvalidInput
from service.formats import codecs
from service.formats.arrays import read_npy
from service.formats.images import png_has_model_size, read_png_of_model_size
from service.formats.media_types import JSON, NPY, OCTETS, PNG
from service.formats.tables import TableReader
from service.formats.whole_images import WholeImageReader
from service.inference.jobs import Job, RequestReader
from service.repository.score_parameters import Parameters

P = TypeVar("P", bound=Parameters)
IMAGES, ROWS, LATENTS = ("images", "dtype"), ("rows",), ("latents",)
"""Names of a JSON body's data: what is in it, and how it is to be read."""


def data_names(rule: InputRule) -> tuple[str, ...]:
    """Those of a model's x; the first also names x in answers."""
    return IMAGES if rule.kind == "image" else ROWS


def parameters(call: Call, query: P, *data: str) -> P:
    """The query's parameters and, for a JSON object, those beside its data (under the names ``data``).

    Raises:
        InvalidInput: a parameter is unknown, out of range, or said twice with different values; or other data.
    """
    if call.media_type != JSON or not call.body.strip():
        return query
    document = call.document
    if not isinstance(document, dict):
        return query
    foreign = [name for name in (*IMAGES, *ROWS, *LATENTS) if name in document and name not in data]
    if foreign:
        raise InvalidInput(f'"{foreign[0]}" is not read here: expected {" and ".join(data) or "parameters alone"}')
    beside = {name: value for name, value in document.items() if name not in data}
    if not beside:
        return query
    try:
        said = type(query).model_validate(beside, strict=True).model_dump(exclude_unset=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))[:80]}: {fault['msg']}" for fault in error.errors()[:20]]
        raise InvalidInput("; ".join(faults)) from error
    asked = query.model_dump(exclude_unset=True)
    for name in asked.keys() & said.keys():
        if asked[name] != said[name]:
            raise InvalidInput(f"{name} is said twice: {asked[name]!r} in the query, {said[name]!r} in the body")
    return type(query).model_validate({**said, **asked})


def read_x(call: Call, strict: bool) -> np.ndarray:
    """The body's rows, as model.Model takes them: float32 [N,C,H,W], or images' 8-bit levels, uint8.

    Raises as codecs.Reader.read does, or tables.TableReader.read.
    """
    settings, rule = call.context.settings, call.rule
    if isinstance(rule, ArrayPreprocessing):
        table = TableReader(rule, settings.max_batch, settings.max_numbers_in)
        return table.read(call.media_type, call.body, lambda: call.document)
    reader = call.context.reader(call.served, strict)
    return reader.read_levels(call.content_type, call.body, lambda: call.document)


def repeatable(
    call: Call, job: Job, answer: Callable[[Call, Any], Content], read: Callable[[bytes], np.ndarray | None] | None
) -> Job:
    """The job with a reader for requests like this one; None for ``read``: such requests are read like any other.

    ``read`` gives the rows of a body, as RequestReader has it. ``answer`` makes the answer of the job's result, and
    asks nothing of the call's body, which is forgotten.
    """
    call.forget_body()
    if read is None:
        return job
    return job._replace(reader=RequestReader(job.key, read, job.run, partial(answer, call.with_body(b""))))


def x_reader(call: Call, strict: bool, x: np.ndarray) -> Callable[[bytes], np.ndarray | None] | None:
    """What reads the rows of bodies like this call's, of which ``x`` was read: for ``repeatable``."""
    rule = call.rule
    if not isinstance(rule, Preprocessing):
        return None
    if call.media_type == OCTETS:
        return partial(_levels, x.shape)
    if call.media_type == PNG:  # one that was resized tells nothing: another may be larger than is allowed
        max_bytes = min(MAX_BODY_BYTES, call.context.settings.max_image_bytes)
        return partial(_natural, rule, max_bytes) if png_has_model_size(call.body, rule) else None
    return _array_reader(call, x.shape, math.prod(x.shape[1:]), lambda other: read_x(other, strict))


def latents_reader(call: Call, z: np.ndarray, numbers: int) -> Callable[[bytes], np.ndarray | None] | None:
    """As ``x_reader``, of a call of which latents ``z`` were read, for rows of x of ``numbers`` numbers."""
    return _array_reader(call, z.shape, numbers, read_latents)


def _levels(shape: tuple[int, ...], body: bytes) -> np.ndarray:
    return np.frombuffer(body, np.uint8).reshape(shape)


def _natural(rule: Preprocessing, max_bytes: int, body: bytes) -> np.ndarray | None:
    image = read_png_of_model_size(body, rule) if len(body) <= max_bytes else None
    return None if image is None else image[None]


def _array_reader(
    call: Call, shape: tuple[int, ...], numbers: int, read: Callable[[Call], np.ndarray]
) -> Callable[[bytes], np.ndarray | None] | None:
    """What reads an npy array, if it is small and its rows have that shape; None for other media types."""
    if call.media_type != NPY:
        return None
    headers = call.with_body(b"")

    def read_alike(body: bytes) -> np.ndarray | None:
        other = headers.with_body(body)
        if not fits_event_loop(other, numbers):
            return None
        rows = read(other)
        return rows if rows.shape == shape else None

    return read_alike


def read_images(call: Call) -> list[np.ndarray]:
    """The body's whole images [C,h,w], for a model of tiles. Raises as whole_images.WholeImageReader.read does."""
    assert isinstance(call.rule, Preprocessing)
    return WholeImageReader(call.rule, call.context.image_limits).read(
        call.content_type, call.body, lambda: call.document
    )


def read_latents(call: Call) -> np.ndarray:
    """The body's latents: float32 [M,L]. Raises as codecs.read_latents does."""
    width, limit = call.served.manifest.signature.latent_dim, call.context.settings.max_batch
    return codecs.read_latents(call.content_type, call.body, lambda: call.document, width, limit)


def read_pair(call: Call, strict: bool) -> tuple[np.ndarray, bool]:
    """The body's two latents [2,L], or its two rows as ``read_x`` gives them; and whether it is latents.

    Raises:
        InvalidInput: not two, or rows as well as latents.
    """
    names = data_names(call.rule)
    if _holds_latents(call):
        if call.media_type == JSON and (more := [name for name in names if name in call.document]):
            raise InvalidInput(f'"{more[0]}" beside "latents": one or the other expected')
        return _two(read_latents(call), "latents"), True
    return _two(read_x(call, strict), names[0]), False


def _two(found: np.ndarray, kind: str) -> np.ndarray:
    if len(found) != 2:
        raise InvalidInput(f"{len(found)} {kind}: two expected, to interpolate between")
    return found


def _holds_latents(call: Call) -> bool:
    """A JSON object with "latents", or an array [M,L] that could not be the model's own x."""
    signature = call.served.manifest.signature
    if call.media_type == JSON:
        return isinstance(call.document, dict) and "latents" in call.document
    if call.media_type != NPY or not call.body:
        return False
    shape = read_npy(call.body).shape
    if len(shape) != 2 or shape[1] != signature.latent_dim:
        return False
    return shape != signature.shape[1:] if call.rule.kind == "image" else shape[1] != signature.shape[2]
