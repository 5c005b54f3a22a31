"""Parts of the OpenAPI document that FastAPI cannot derive: bodies that are no form or model, and answers by Accept."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _object(name: str, description: str) -> dict[str, Any]:
    """Describe a JSON object that holds an array under ``name``."""
    return {
        "type": "object",
        "description": f"{name}: {description}; parameters may stand beside it",
        "properties": {name: {"type": "array", "items": {}}},
        "required": [name],
    }


_IMAGES = _object("images", "nested lists with pixels in [0, 1], or base64 files")
_ROWS = _object("rows", "of a model of vectors or signals, nested lists of numbers or objects by feature")
_LATENTS = _object("latents", "[M, L]")
_DATA: dict[str, Any] = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
        }
    },
    "image/png": _BINARY,
    "image/jpeg": _BINARY,
    "image/webp": _BINARY,
    "application/x-npy": _BINARY,
    "application/octet-stream": _BINARY,
    "text/csv": {"schema": {"type": "string", "description": "of a model of vectors or signals, a line a row"}},
}

DATA_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": _DATA | {"application/json": {"schema": {"oneOf": [_IMAGES, _ROWS]}}},
    }
}
LATENT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/x-npy": _BINARY, "application/json": {"schema": _LATENTS}},
    }
}
PAIR_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "two images (vectors, signals), or two latents [2, L]",
        "content": _DATA | {"application/json": {"schema": {"oneOf": [_IMAGES, _ROWS, _LATENTS]}}},
    }
}
PARAMETER_BODY: dict[str, Any] = {
    "requestBody": {"required": False, "content": {"application/json": {"schema": {"type": "object"}}}}
}


def answers(model: type[BaseModel], *media_types: str) -> dict[int | str, dict[str, Any]]:
    """Describe the responses of a verb: its JSON model, and the other media types that Accept can ask for."""
    binary = {media_type: _BINARY for media_type in media_types if media_type != "application/json"}
    return {200: {"model": model, "content": binary}}
