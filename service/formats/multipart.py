"""Read the files of multipart/form-data (RFC 7578) from a body in memory; nothing is written to disk."""

from __future__ import annotations

import logging
import re
from typing import Any

from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from service.errors import InvalidInput, LimitExceeded

FIELD = "images"
"""Name of the form's field that holds the files."""
_FIELDS = re.compile(rb"(image|file)s?(\[\d{0,4}\])?")
"""Names that clients write for it: file, files, image and images, also with [] or [0], as PHP and axios write lists."""
# The parser logs a warning for each damaged form, which the client learns from the answer.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


def read_multipart(content_type: str, body: bytes, max_files: int) -> list[bytes]:
    """Return the contents of the files in field ``images``, or one of the names that stand for it, in their order.

    Raises:
        InvalidInput: the form is damaged, lacks its closing boundary, or has a field of another name.
        LimitExceeded: it has more than ``max_files`` files.
    """
    boundary = _boundary(content_type)
    _check_boundaries(body, boundary)
    contents: list[bytes] = []
    closing_boundaries: list[bool] = []

    def add(name: bytes | None, content: bytes) -> None:
        if not _FIELDS.fullmatch(name or b""):
            raise InvalidInput(f"form field {(name or b'')[:40].decode('latin-1')!r}: only files in {FIELD!r} expected")
        if len(contents) >= max_files:
            raise LimitExceeded(f"over {max_files} files: at most {max_files} images here (setting max_batch)")
        contents.append(content)

    def on_file(file: Any) -> None:
        add(file.field_name, file.file_object.getvalue())
        file.close()

    try:
        parser = FormParser(
            "multipart/form-data",
            on_field=lambda field: add(field.field_name, field.value or b""),
            on_file=on_file,
            on_end=lambda: closing_boundaries.append(True),
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1, "UPLOAD_ERROR_ON_BAD_CTE": True},
        )
        parser.write(body)
    except FormParserError as error:
        raise InvalidInput("the multipart form is damaged") from error
    if not closing_boundaries:
        raise InvalidInput("the multipart form is truncated: its closing boundary is missing")
    return contents


def _boundary(content_type: str) -> bytes:
    """Return the boundary that a Content-Type header names. Raises InvalidInput if it names none."""
    try:
        _, options = parse_options_header(content_type)
    except UnicodeError as error:
        raise InvalidInput("the Content-Type holds characters outside latin-1") from error
    boundary: bytes = options.get(b"boundary", b"")
    if not boundary:
        raise InvalidInput("multipart/form-data without a boundary")
    return boundary


def _check_boundaries(body: bytes, boundary: bytes) -> None:
    """Raise InvalidInput if a line of a part begins with the boundary, which RFC 2046, 5.1.1 forbids.

    The parser would go byte by byte wherever a boundary seems to begin, so that a flood of them would take seconds. The
    RFC allows blanks after a boundary, but no client writes them, and they are refused here.
    """
    if re.search(re.escape(b"\r\n--" + boundary) + rb"(?!\r\n|--)", body):
        raise InvalidInput("the multipart form is damaged: a line begins with the boundary, but is none or is cut")
