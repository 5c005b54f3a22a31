"""Read the parameters and the arrays of a call from its query and body.

Large bodies are read on a worker thread, since decoding may take long (service.api.small_requests).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from pydantic import ValidationError

from service.api.context import Call, Content
from service.api.small_requests import MAX_BODY_BYTES, fits_event_loop
from service.bundle.input_rules import ArrayPreprocessing, InputRule, Preprocessing
from service.errors import InvalidInput
from service.formats import codecs
from service.formats.arrays import read_npy
from service.formats.containers import describe_file
from service.formats.images import png_has_model_size, read_png_of_model_size
from service.formats.media_types import JSON, NPY, OCTETS, PNG
from service.formats.tables import TableReader
from service.formats.whole_images import WholeImageReader
from service.inference.jobs import Job, RequestReader
from service.repository.score_parameters import Parameters

P = TypeVar("P", bound=Parameters)
MAX_FAULTS = 20  # of the fields of a body, that a refusal names
IMAGES, ROWS, LATENTS = ("images", "dtype"), ("rows",), ("latents",)
"""Names in a JSON body that hold data, or say how they are to be read, for images, rows and latents."""


def data_names(rule: InputRule) -> tuple[str, ...]:
    """Return the names of the data of a model's x in JSON bodies; the first also names x in answers."""
    return IMAGES if rule.kind == "image" else ROWS


def read_parameters(call: Call, query: P, *data: str) -> P:
    """Join the query's parameters with those in a JSON body, which are its names other than ``data``.

    Raises:
        InvalidInput: a parameter is unknown, out of range, or given twice with different values, or the body holds data
            that this verb does not read.
    """
    if call.media_type != JSON or not call.body.strip():
        return query
    document = call.document
    if not isinstance(document, dict):
        return query
    unread = [name for name in (*IMAGES, *ROWS, *LATENTS) if name in document and name not in data]
    if unread:
        raise InvalidInput(f'"{unread[0]}" is not read here: expected {" and ".join(data) or "parameters alone"}')
    fields = _without_most_unknown({name: value for name, value in document.items() if name not in data}, query)
    if not fields:
        return query
    try:
        from_body = type(query).model_validate(fields, strict=True).model_dump(exclude_unset=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))[:80]}: {fault['msg']}" for fault in error.errors()[:MAX_FAULTS]]
        raise InvalidInput("; ".join(faults)) from error
    from_query = query.model_dump(exclude_unset=True)
    for name in from_query.keys() & from_body.keys():
        if from_query[name] != from_body[name]:
            raise InvalidInput(
                f"{name} is said twice: {from_query[name]!r} in the query, {from_body[name]!r} in the body"
            )
    return type(query).model_validate({**from_body, **from_query})


def _without_most_unknown(fields: dict[str, Any], query: Parameters) -> dict[str, Any]:
    """Leave out unknown names beyond the first MAX_FAULTS, which are all that an error's text names."""
    known = type(query).model_fields
    if len(fields) <= len(known) + MAX_FAULTS:
        return fields
    unknown = list(islice((name for name in fields if name not in known), MAX_FAULTS))
    return {name: fields[name] for name in (*(fields.keys() & known.keys()), *unknown)}


def read_x(call: Call, strict: bool) -> np.ndarray:
    """Read the body's rows as Model takes them: float32 [N,C,H,W], or the levels of 8-bit images, uint8.

    Raises as codecs.Reader.read does, or tables.TableReader.read for vectors and signals.
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
    """Give a job a reader for later requests with the same headers and length, and drop the call's body.

    Args:
        answer: makes the answer from the call, without its body, and the job's result.
        read: reads the rows of a body, or returns None for one that is not alike (jobs.RequestReader). None instead of
            a function: later requests are read as this one was.
    """
    call.forget_body()
    if read is None:
        return job
    return job._replace(reader=RequestReader(job.key, read, job.run, partial(answer, call.with_body(b""))))


def x_reader(call: Call, strict: bool, x: np.ndarray) -> Callable[[bytes], np.ndarray | None] | None:
    """Return ``read`` of ``repeatable`` for a call whose rows are ``x``; None if there is none for its format."""
    rule = call.rule
    if call.media_type == OCTETS:
        return partial(_read_octets, x.shape)
    if call.media_type == PNG:  # none for one that was resized, since the next may be larger than is allowed
        assert isinstance(rule, Preprocessing)
        max_bytes = min(MAX_BODY_BYTES, call.context.settings.max_image_bytes)
        return partial(_read_png, rule, max_bytes) if png_has_model_size(call.body, rule) else None
    return _array_reader(call, x.shape, math.prod(x.shape[1:]), lambda other: read_x(other, strict))


def latents_reader(call: Call, z: np.ndarray, numbers: int) -> Callable[[bytes], np.ndarray | None] | None:
    """Return ``read`` of ``repeatable`` for a call with latents ``z``; a row of x has ``numbers`` numbers."""
    return _array_reader(call, z.shape, numbers, read_latents)


def _read_octets(shape: tuple[int, ...], body: bytes) -> np.ndarray | None:
    if describe_file(body):  # which the codecs refuse in words
        return None
    return np.frombuffer(body, np.uint8).reshape(shape)


def _read_png(rule: Preprocessing, max_bytes: int, body: bytes) -> np.ndarray | None:
    image = read_png_of_model_size(body, rule) if len(body) <= max_bytes else None
    return None if image is None else image[None]


def _array_reader(
    call: Call, shape: tuple[int, ...], numbers: int, read: Callable[[Call], np.ndarray]
) -> Callable[[bytes], np.ndarray | None] | None:
    """Return a function that reads small npy bodies of that shape; None if the call's body is no npy."""
    if call.media_type != NPY:
        return None
    empty_call = call.with_body(b"")

    def read_small(body: bytes) -> np.ndarray | None:
        other = empty_call.with_body(body)
        if not fits_event_loop(other, numbers):
            return None
        rows = read(other)
        return rows if rows.shape == shape else None

    return read_small


def read_images(call: Call) -> list[np.ndarray]:
    """Read the body's whole images [C,h,w] for a model of tiles. Raises as whole_images.WholeImageReader.read does."""
    assert isinstance(call.rule, Preprocessing)
    return WholeImageReader(call.rule, call.context.image_limits).read(
        call.content_type, call.body, lambda: call.document
    )


def read_latents(call: Call) -> np.ndarray:
    """Read the body's latents, float32 [M,L]. Raises as codecs.read_latents does."""
    latent_dim, max_rows = call.served.manifest.signature.latent_dim, call.context.settings.max_batch
    return codecs.read_latents(call.content_type, call.body, lambda: call.document, latent_dim, max_rows)


def read_pair(call: Call, strict: bool) -> tuple[np.ndarray, bool]:
    """Read two latents [2,L], or two rows as ``read_x`` does, and return with them whether they are latents.

    Raises:
        InvalidInput: there are not two, or the body holds rows as well as latents.
    """
    names = data_names(call.rule)
    if _holds_latents(call):
        if call.media_type == JSON and (row_names := [name for name in names if name in call.document]):
            raise InvalidInput(f'"{row_names[0]}" beside "latents": one or the other expected')
        return _check_two(read_latents(call), "latents"), True
    return _check_two(read_x(call, strict), names[0]), False


def _check_two(rows: np.ndarray, kind: str) -> np.ndarray:
    if len(rows) != 2:
        raise InvalidInput(f"{len(rows)} {kind}: two expected, to interpolate between")
    return rows


def _holds_latents(call: Call) -> bool:
    """True if the body is a JSON object with "latents", or an npy array [M,L] that cannot be rows of the model's x."""
    signature = call.served.manifest.signature
    if call.media_type == JSON:
        return isinstance(call.document, dict) and "latents" in call.document
    if call.media_type != NPY or not call.body:
        return False
    shape = read_npy(call.body).shape
    if len(shape) != 2 or shape[1] != signature.latent_dim:
        return False
    return shape != signature.shape[1:] if call.rule.kind == "image" else shape[1] != signature.shape[2]
