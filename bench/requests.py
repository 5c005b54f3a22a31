"""The requests that are measured: each verb, with every input format or every kind of answer."""

from __future__ import annotations

import http.client
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np

from bench.bodies import COMMON, FORMATS, LATENT_FORMATS, ONE_IMAGE
from bench.load import LoadError, Target, http_request

ANSWERS: Final = {"json": "application/json", "npy": "application/x-npy", "png": "image/png", "gif": "image/gif"}
# The answer to every input format, and more answers of the verb (to the cheapest input format).
VERBS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "encode": ("json", ("npy",)),
    "decode": ("npy", ("json",)),
    "reconstruct": ("npy", ("json", "png")),
    "score": ("json", ("npy",)),
    "interpolate": ("npy", ("json", "gif")),
    "sample": ("npy", ("json", "png")),
}
MIN_ROWS: Final = {"interpolate": 2}
"""Of an answer, for verbs that do not answer with one."""
TIMEOUT = 60  # seconds for an answer that is checked


@dataclass(frozen=True)
class Case:
    """One kind of request: its input ``format``, the ``answer`` that it asks for, and its bytes."""

    format: str
    answer: str
    target: Target


def cases(
    model: str,
    verb: str,
    pixels: np.ndarray,
    latent_dim: int,
    address: tuple[str, int],
    formats: Collection[str] = COMMON,
) -> list[Case]:
    """All requests of a verb in these formats with images ``pixels``, uint8 [N,C,H,W], or with N latents or draws, or
    for N images on the way from the first of them to the second."""
    answer, more = VERBS[verb]
    path = f"/v1/models/{model}/{verb}"
    if verb == "sample":
        asked = [("n", kind, http_request("GET", f"{path}?n={len(pixels)}", _accept(kind))) for kind in (answer, *more)]
        return [Case(name, kind, Target(*address, request)) for name, kind, request in asked]
    if verb == "interpolate":
        path, bodies = f"{path}?steps={len(pixels)}", {"octet-stream": FORMATS["octet-stream"](pixels[:2])}
    elif verb == "decode":
        latents = np.random.RandomState(0).standard_normal((len(pixels), latent_dim)).astype(np.float32)
        bodies = {name: make(latents) for name, make in LATENT_FORMATS.items()}
    else:
        fitting = [name for name in FORMATS if name in formats and not _unfit(name, len(pixels), formats)]
        bodies = {name: FORMATS[name](pixels) for name in fitting}
    first = next(iter(bodies))
    pairs = [*((name, answer) for name in bodies), *((first, kind) for kind in more)]
    return [Case(name, kind, Target(*address, request(path, kind, *bodies[name]))) for name, kind in pairs]


def images_sent(verb: str, batch: int) -> int:
    """In a request whose answer has ``batch`` rows."""
    return {"sample": 0, "interpolate": 2}.get(verb, batch)


def request(path: str, answer: str, content_type: str, body: bytes) -> bytes:
    """A POST that asks for that kind of answer."""
    return http_request("POST", path, _accept(answer) | {"content-type": content_type}, body)


def _unfit(name: str, batch: int, formats: Collection[str]) -> bool:
    """A PNG file is one image; one image has no need of multipart, unless every format was asked for."""
    return (batch > 1 and name in ONE_IMAGE) or (batch == 1 and name == "multipart png" and set(formats) == set(COMMON))


def hello_request(size: int) -> bytes:
    """A POST of so many bytes, or a GET."""
    headers = {"content-type": "application/octet-stream"}
    return http_request("POST", "/", headers, bytes(size)) if size else http_request("GET", "/", {})


def check_answers(made: list[Case]) -> None:
    """Ask each case once: all input formats must give the same bytes. Raises LoadError where they do not."""
    found: dict[str, tuple[str, bytes]] = {}
    for case in made:
        body = ask(case.target, f"{case.format} → {case.answer}")
        first, expected = found.setdefault(case.answer, (case.format, body))
        if body != expected:
            raise LoadError(f"{case.format} and {first} got different answers to the same images")


def ask(target: Target, name: str = "a request") -> bytes:
    """The body of the answer to one request. Raises LoadError for another status than 200."""
    connection = http.client.HTTPConnection(target.host, target.port, timeout=TIMEOUT)
    try:
        connection.connect()
        connection.sock.sendall(target.request)
        response = http.client.HTTPResponse(connection.sock)
        response.begin()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise LoadError(f"{name}: status {response.status}, {body[:500].decode(errors='replace')}")
    return body


def _accept(kind: str) -> dict[str, str]:
    return {"accept": ANSWERS[kind]}
