"""Look up request headers in an ASGI scope, which holds them as bytes."""

from __future__ import annotations

from starlette.types import Scope


def list_header(scope: Scope, name: bytes) -> str:
    """Return the values of all headers named ``name`` with commas between, as RFC 9110, 5.3, reads lists; else ""."""
    return ", ".join(value.decode("latin-1") for key, value in scope["headers"] if key == name)


def header(scope: Scope, name: bytes) -> str:
    """Return the value of the first header named ``name``, in lower case; "" if there is none."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return ""
