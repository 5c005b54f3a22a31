"""Fixtures of tests that send requests: which were remembered, where their jobs run; models of vectors and signals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.api.endpoint import ResolvedRequest, RouteResolver, _key
from service.inference.batcher import Batcher
from tests.service import linear_bundles
from tests.service.requests import Stuck

VERBS = ("/encode", "/decode", "/reconstruct", "/interpolate", "/score", "/sample")


@pytest.fixture(scope="session")
def linear_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository of the linear models of vectors and signals. Read only: tests share it."""
    return linear_bundles.write_all(tmp_path_factory.mktemp("linear"))


@pytest.fixture
def all_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """All jobs run on the event loop, however slow this machine is."""
    monkeypatch.setattr(Batcher, "is_short", lambda self, key, rows: True)


@pytest.fixture
def all_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """All jobs run on the pool."""
    monkeypatch.setattr(Batcher, "is_short", lambda self, key, rows: False)


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each request to a verb, whether one of its method, path and query was remembered when it came."""
    remembered: list[bool] = []
    answer = RouteResolver.__call__

    async def noted(self, scope, receive, send):  # type: ignore[no-untyped-def]
        if scope["type"] == "http" and scope["path"].endswith(VERBS):
            remembered.append(_key(scope) in self._remembered)
        await answer(self, scope, receive, send)

    monkeypatch.setattr(RouteResolver, "__call__", noted)
    return remembered


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies that were read by a reader of a request before."""
    bodies: list[bytes] = []
    read = ResolvedRequest._read_again

    def noted(self, key, body):  # type: ignore[no-untyped-def]
        reader, rows = read(self, key, body)
        if rows is not None:
            bodies.append(body)
        return reader, rows

    monkeypatch.setattr(ResolvedRequest, "_read_again", noted)
    return bodies


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    """An encoder that waits, and is released at the end of the test at the latest."""
    encoder = Stuck(monkeypatch)
    yield encoder
    encoder.release()
