"""Fixtures of tests of the endpoint: one server for a module, which has remembered nothing when a test begins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service.http import APPS, serving


@pytest.fixture(scope="module")
def server(ppca_root: Path) -> Iterator[httpx.Client]:
    with serving(ppca_root, max_batch=8) as client:
        yield client


@pytest.fixture
def client(server: httpx.Client) -> httpx.Client:
    """A server that remembers nothing."""
    APPS[server].state.remembered.clear()
    return server
