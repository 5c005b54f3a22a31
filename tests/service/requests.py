"""Requests to the model ppca of tests.ppca_bundle: through a client, or as bytes over a connection of one's own."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import httpx
import numpy as np
import pytest
from PIL import Image

from service.inference.model import Model
from tests.ppca_bundle import LATENT_DIM, images
from tests.service.http import APPS, npy

OCTETS, NPY, JSON, PNG = "application/octet-stream", "application/x-npy", "application/json", "image/png"
X = images(6)
LEVELS = np.round(X * 255).astype(np.uint8)
ROW = LEVELS[0].tobytes()
LATENTS = np.random.RandomState(0).standard_normal((3, LATENT_DIM)).astype(np.float32)


def png(levels: np.ndarray, level: int = -1) -> bytes:
    """A grey picture of 8-bit levels [1,H,W] or [H,W] as PNG; ``level`` of compression."""
    buffer = io.BytesIO()
    Image.fromarray(levels.squeeze()).save(buffer, "PNG", compress_level=level)
    return buffer.getvalue()


Body = tuple[str, bytes]
"""Content-Type and body."""

BODIES: dict[str, Body] = {
    "octets": (OCTETS, LEVELS.tobytes()),
    "npy uint8": (NPY, npy(LEVELS)),
    "npy float32": (NPY, npy(X)),
    "json": (JSON, json.dumps({"images": X.tolist()}).encode()),
    "png": (PNG, png(LEVELS[0])),
}
"""Images in every format that can be read on the event loop."""

PAIRS: dict[str, Body] = {
    "octets": (OCTETS, LEVELS[:2].tobytes()),
    "json": (JSON, json.dumps({"images": LEVELS[:2].tolist(), "dtype": "uint8"}).encode()),
    "latents": (NPY, npy(LATENTS[:2])),
}
"""Two images, or two latents."""

REFUSED: dict[str, tuple[str, str, str, bytes, int]] = {
    "an unknown parameter": ("score", "what=1", *BODIES["octets"], 422),
    "a parameter out of range": ("score", "k=0", *BODIES["octets"], 422),
    "an unknown score": ("score", "score=nothing", *BODIES["octets"], 422),
    "another size": ("encode", "", OCTETS, b"123", 422),
    "nothing": ("encode", "", OCTETS, b"", 422),
    "too many": ("encode", "", OCTETS, LEVELS.tobytes() * 2, 422),
    "no picture": ("encode", "", PNG, b"\x89PNG\r\n\x1a\n", 422),
    "text": ("encode", "", "text/plain", b"hello", 415),
    "broken JSON": ("score", "", JSON, b"{", 422),
    "latents of another width": ("decode", "", NPY, npy(np.zeros((1, LATENT_DIM + 1), np.float32)), 422),
    "what the model has not": ("encode", "array=what", *BODIES["octets"], 422),
}
"""(verb, query, Content-Type, body, status) of requests that are refused where max_batch is 8."""


def post(
    client: httpx.Client,
    verb: str,
    query: str,
    content_type: str,
    body: bytes | Iterator[bytes],
    accept: str = JSON,
    at: str = "/v1/models/ppca",
    **headers: str,
) -> httpx.Response:
    """POST to a verb; a body that is an iterator is sent in chunks."""
    address = f"{at}/{verb}?{query}" if query else f"{at}/{verb}"
    return client.post(address, content=body, headers={"content-type": content_type, "accept": accept, **headers})


def sample(client: httpx.Client, query: str, accept: str = NPY, **headers: str) -> httpx.Response:
    """GET samples."""
    return client.get(f"/v1/models/ppca/sample?{query}", headers={"accept": accept, **headers})


def raw(body: bytes = ROW, verb: str = "encode", version: str = "1.1", **headers: Any) -> bytes:
    """A POST to a verb of ppca as it is sent; an underscore in a header's name stands for a hyphen."""
    named = {"host": "x", "content-type": OCTETS, "accept": NPY, "content-length": len(body)}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"POST /v1/models/ppca/{verb} HTTP/{version}\r\n{lines}\r\n".encode() + body


def chunked(body: bytes, trailers: bytes = b"", verb: str = "encode") -> bytes:
    """As ``raw`` of octets, in one chunk, with trailers."""
    head = f"POST /v1/models/ppca/{verb} HTTP/1.1\r\nhost: x\r\ncontent-type: {OCTETS}\r\naccept: {NPY}\r\n"
    return head.encode() + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)


def answers(stream: BinaryIO, count: int) -> list[tuple[bytes, bytes]]:
    """(head, body) of so many answers on one connection, in their order."""
    pairs = []
    for _ in range(count):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            piece = stream.read(1)
            assert piece, f"the connection was closed after {len(pairs)} answers and {head!r}"
            head += piece
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
        pairs.append((head, stream.read(length)))
    return pairs


@contextmanager
def connected(client: httpx.Client, *requests: bytes) -> Iterator[tuple[socket.socket, BinaryIO]]:
    """A connection to the client's server over which these have been sent, and the stream of what comes back."""
    with (
        socket.create_connection((client.base_url.host, client.base_url.port or 80), 20) as connection,
        connection.makefile("rb") as stream,
    ):
        for request in requests:
            connection.sendall(request)
        yield connection, stream


def exchanged(client: httpx.Client, *requests: bytes) -> list[tuple[bytes, bytes]]:
    """(head, body) of the answers to requests that are sent one after the other over one connection."""
    pairs = []
    with connected(client) as (connection, stream):
        for request in requests:
            connection.sendall(request)
            pairs += answers(stream, 1)
    return pairs


def received(client: httpx.Client, *pieces: bytes) -> bytes:
    """All that comes back until the server closes, of pieces of which each is read before the next is sent."""
    with connected(client) as (connection, stream):
        for index, piece in enumerate(pieces):
            if index:
                turn(client)
            connection.sendall(piece)
        return stream.read()


def statuses(answered: bytes) -> list[bytes]:
    """The statuses of the answers in these bytes."""
    return [part[:3] for part in answered.split(b"HTTP/1.1 ")[1:]]


def turn(client: httpx.Client) -> None:
    """Return once the server has read what was sent before on other connections: it answers those that are ready."""
    for _ in range(2):
        assert client.get("/livez").status_code == 200


def until(client: httpx.Client, condition: Callable[[], Any]) -> None:
    """Return once the condition holds, which the server's event loop brings about."""
    while not condition():
        assert client.get("/livez").status_code == 200


def metric(client: httpx.Client, start: str) -> float:
    """The value of the first metric whose line starts so; 0.0 if there is none."""
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start)), 0.0)


def under_way(client: httpx.Client) -> tuple[int, int, float]:
    """Bytes of bodies held, slots of the pool taken, and requests in flight, this question among them."""
    in_flight = metric(client, "vaeserve_requests_in_flight")
    state = APPS[client].state
    return state.budget.held, state.context.pool.pending, in_flight


IDLE = 0, 0, 1.0
"""``under_way`` of a server that has nothing to do but to answer that."""


class Stuck:
    """An encoder that waits on threads of the pool: ``rows`` of each run that has begun; ``release`` lets all go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self._go_on, encode = threading.Event(), Model.encode
        self.release = self._go_on.set

        def waiting(model: Model, x: np.ndarray, *given: Any) -> Any:
            if threading.current_thread().name.startswith("vaeserve"):
                self.rows.append(len(x))
                assert self._go_on.wait(60)
            return encode(model, x, *given)

        monkeypatch.setattr(Model, "encode", waiting)
