"""The requests that are measured: each verb, with every input format or every kind of answer."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from typing import Final

import numpy as np

from bench.bodies import FORMATS, ONE_IMAGE
from bench.load import LoadError, Target, http_request

ANSWERS: Final = {"json": "application/json", "npy": "application/x-npy", "png": "image/png"}
# The answer to every input format, and more answers of the verb (to the cheapest input format).
VERBS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "encode": ("json", ("npy",)),
    "score": ("json", ()),
    "reconstruct": ("npy", ("json", "png")),
    "sample": ("npy", ("json", "png")),
}


@dataclass(frozen=True)
class Case:
    """One kind of request: its input ``format``, the ``answer`` that it asks for, and its bytes."""

    format: str
    answer: str
    target: Target


def cases(model: str, verb: str, pixels: np.ndarray, address: tuple[str, int]) -> list[Case]:
    """All requests of a verb with the images ``pixels``, uint8 [N,C,H,W], or for N new ones."""
    answer, more = VERBS[verb]
    path = f"/v1/models/{model}/{verb}"
    if verb == "sample":
        asked = [("n", kind, http_request("GET", f"{path}?n={len(pixels)}", _accept(kind))) for kind in (answer, *more)]
    else:
        formats = [name for name in FORMATS if len(pixels) == 1 or name not in ONE_IMAGE]
        pairs = [*((name, answer) for name in formats), *((formats[0], kind) for kind in more)]
        asked = []
        for name, kind in pairs:
            content_type, body = FORMATS[name](pixels)
            headers = _accept(kind) | {"content-type": content_type}
            asked.append((name, kind, http_request("POST", path, headers, body)))
    return [Case(name, kind, Target(*address, request)) for name, kind, request in asked]


def hello_request(size: int) -> bytes:
    """A POST of so many bytes, or a GET."""
    headers = {"content-type": "application/octet-stream"}
    return http_request("POST", "/", headers, bytes(size)) if size else http_request("GET", "/", {})


def check_answers(made: list[Case]) -> None:
    """Ask each case once: all input formats must give the same bytes. Raises LoadError where they do not."""
    found: dict[str, tuple[str, bytes]] = {}
    for case in made:
        body = _ask(case)
        first, expected = found.setdefault(case.answer, (case.format, body))
        if body != expected:
            raise LoadError(f"{case.format} and {first} got different answers to the same images")


def _ask(case: Case) -> bytes:
    connection = http.client.HTTPConnection(case.target.host, case.target.port, timeout=60)
    try:
        connection.connect()
        connection.sock.sendall(case.target.request)
        response = http.client.HTTPResponse(connection.sock)
        response.begin()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise LoadError(f"{case.format} → {case.answer}: status {response.status}, {body[:500].decode()}")
    return body


def _accept(kind: str) -> dict[str, str]:
    return {"accept": ANSWERS[kind]}
