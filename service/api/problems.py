"""Error responses: application/problem+json (RFC 9457), with the text repeated under ``error``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from starlette.responses import Response

MEDIA_TYPE = "application/problem+json"


def problem(
    status: int,
    detail: str,
    request_id: str,
    headers: Mapping[str, str] | None = None,
    errors: Sequence[Mapping[str, Any]] | None = None,
) -> Response:
    """Make an error response.

    Args:
        status: HTTP status.
        detail: the text, for the client's eyes.
        request_id: repeated in the body.
        headers: headers of the response beside Content-Type and Content-Length.
        errors: single fields of a failed validation, {"where", "what"} each.
    """
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "error": detail,
        "request_id": request_id,
    }
    if errors:
        body["errors"] = list(errors)
    return Response(
        orjson.dumps(body, default=str), status_code=status, media_type=MEDIA_TYPE, headers=dict(headers or {})
    )


def problem_response(status: int, detail: str, request_id: str) -> bytes:
    """Return the bytes of a whole HTTP response with a problem, for a connection that is closed after it."""
    response = problem(status, detail, request_id, {"x-request-id": request_id, "connection": "close"})
    head = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode() + head + b"\r\n" + bytes(response.body)
