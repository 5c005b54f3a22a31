"""The parts of the OpenAPI document that FastAPI cannot derive: raw bodies, and answers by Accept."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from service.schemas import Problem

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_IMAGES: dict[str, Any] = {
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
    "application/json": {
        "schema": {
            "type": "object",
            "description": "images: nested lists with pixels in [0, 1] or base64 files; parameters may stand beside it",
            "properties": {"images": {"type": "array", "items": {}}},
            "required": ["images"],
        }
    },
}
_LATENTS: dict[str, Any] = {
    "application/x-npy": _BINARY,
    "application/json": {
        "schema": {
            "type": "object",
            "description": "latents: [M, L]; parameters may stand beside it",
            "properties": {"latents": {"type": "array", "items": {}}},
            "required": ["latents"],
        }
    },
}

IMAGE_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": _IMAGES}}
LATENT_BODY: dict[str, Any] = {"requestBody": {"required": True, "content": _LATENTS}}
_PAIR = _IMAGES | {
    "application/json": {"schema": {"oneOf": [body["application/json"]["schema"] for body in (_IMAGES, _LATENTS)]}}
}
PAIR_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "description": "two images, or two latents [2, L]", "content": _PAIR}
}
PARAMETER_BODY: dict[str, Any] = {
    "requestBody": {"required": False, "content": {"application/json": {"schema": {"type": "object"}}}}
}


def answers(model: type[BaseModel], *media_types: str) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a verb: the JSON model, the other media types that Accept can ask for, and the error shape."""
    binary = {media_type: _BINARY for media_type in media_types if media_type != "application/json"}
    return {200: {"model": model, "content": binary}, "4XX": {"model": Problem, "description": "problem"}}
