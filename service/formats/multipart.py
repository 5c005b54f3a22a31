"""multipart/form-data (RFC 7578) -> the contents of its files. The whole body is at hand; nothing goes to disk."""

from __future__ import annotations

import logging
import re
from typing import Any

from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.errors import InvalidInput, LimitExceeded

FIELD = "images"
# The parser warns of each damaged form; the caller is told, the log need not repeat it.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


def read_multipart(content_type: str, body: bytes, max_files: int) -> list[bytes]:
    """The contents of the files in field ``images``, in order.

    Raises:
        InvalidInput: no valid form, one without its closing boundary, or a field of another name.
        LimitExceeded: more than ``max_files``.
    """
    boundary = _boundary(content_type)
    _check_boundaries(body, boundary)
    found: list[bytes] = []
    closed: list[bool] = []

    def keep(name: bytes | None, content: bytes) -> None:
        if name != FIELD.encode():
            raise InvalidInput(f"form field {(name or b'')[:40].decode('latin-1')!r}: only {FIELD!r} expected")
        if len(found) >= max_files:
            raise LimitExceeded(f"over {max_files} files: at most {max_files} images here (setting max_batch)")
        found.append(content)

    def on_file(file: Any) -> None:
        keep(file.field_name, file.file_object.getvalue())
        file.close()

    try:
        parser = FormParser(
            "multipart/form-data",
            on_field=lambda field: keep(field.field_name, field.value or b""),
            on_file=on_file,
            on_end=lambda: closed.append(True),
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1, "UPLOAD_ERROR_ON_BAD_CTE": True},
        )
        parser.write(body)
    except FormParserError as error:
        raise InvalidInput("the multipart form is damaged") from error
    if not closed:
        raise InvalidInput("the multipart form is truncated: its closing boundary is missing")
    return found


def _boundary(content_type: str) -> bytes:
    try:
        _, options = parse_options_header(content_type)
    except UnicodeError as error:
        raise InvalidInput("the Content-Type holds characters outside latin-1") from error
    boundary: bytes = options.get(b"boundary", b"")
    if not boundary:
        raise InvalidInput("multipart/form-data without a boundary")
    return boundary


def _check_boundaries(body: bytes, boundary: bytes) -> None:
    """Before the parser, which goes byte by byte where a boundary seems to begin: a flood of those would take seconds.

    RFC 2046, 5.1.1: no line of a part may begin with the boundary. Blanks after it are allowed there, but no sender
    writes them.
    """
    if re.search(re.escape(b"\r\n--" + boundary) + rb"(?!\r\n|--)", body):
        raise InvalidInput("the multipart form is damaged: a line begins with the boundary, but is none or is cut")
