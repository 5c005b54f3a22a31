"""What importing a library need not import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Meanwhile the package is as if it were not installed, unless it has been imported: for what can do without it."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def import_fastapi() -> None:
    """Import FastAPI, but leave its models of OpenAPI to be built when the document is asked for (30 ms of a start).

    Pydantic's ``defer_build`` does that; here it is on for what is defined by that import, and for nothing else.
    """
    if "fastapi" in sys.modules:
        return
    from pydantic import BaseModel

    kept = BaseModel.model_config.get("defer_build", False)
    BaseModel.model_config["defer_build"] = True
    try:
        import fastapi  # noqa: F401
    finally:
        BaseModel.model_config["defer_build"] = kept
