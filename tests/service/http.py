"""A real uvicorn on a free port, in a thread of the test process."""

from __future__ import annotations

import io
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import httpx
import numpy as np
from fastapi import FastAPI, params

from service.api.app import create_app
from service.repository.model_repository import load_repository
from service.server.draining import DrainingServer
from service.settings import Settings

APPS: WeakKeyDictionary[httpx.Client, FastAPI] = WeakKeyDictionary()
"""What each client of ``serving`` talks to."""
PROBLEM_KEYS = {"type", "title", "status", "detail", "error", "request_id"}


@contextmanager
def serving(
    repository: Path,
    prepare: Callable[[FastAPI], None] = lambda app: None,
    dependencies: Sequence[params.Depends] = (),
    **settings: Any,
) -> Iterator[httpx.Client]:
    """A client of a server that serves ``repository``; other settings by keyword.

    ``prepare`` is called with the app before it starts; ``dependencies`` are those of all its routes.
    """
    chosen = Settings(repository=repository, port=0, **settings)
    app = create_app(chosen, load_repository(chosen), dependencies=dependencies)
    prepare(app)
    server = DrainingServer(app, chosen)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
            APPS[client] = app
            yield client
    finally:
        server.should_exit = True
        thread.join()


def send_raw(client: httpx.Client, data: bytes, timeout: float = 10) -> tuple[int, bytes, bytes]:
    """Send bytes on a socket of their own; (status, headers, body) of what comes back until the server closes it."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout) as connection:
        connection.sendall(data)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), head, body


def npy(array: np.ndarray) -> bytes:
    """The array as an .npy body."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def assert_problem(response: httpx.Response, status: int | None = None) -> dict[str, Any]:
    """The response is a 4xx (or ``status``) in the one error shape, with nothing of the inside in its text."""
    if status is None:
        assert 400 <= response.status_code < 500, (response.status_code, response.text[:300])
    else:
        assert response.status_code == status, (response.status_code, response.text[:300])
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body.keys() >= PROBLEM_KEYS
    assert body["error"] == body["detail"] != ""
    assert body["status"] == response.status_code
    assert body["request_id"] == response.headers["x-request-id"]
    for secret in ("Traceback", 'File "', "/site-packages", "/service/", "onnxruntime"):
        assert secret not in response.text
    return body
