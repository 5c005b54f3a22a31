"""Structured logs: one JSON object a line on stderr, of the same shape for our lines and those of libraries."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import stat
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import orjson
import structlog

from service.deferred import DeferredWriter


def configure_logs(level: str, form: str, **fields: Any) -> None:
    """Route structlog and the standard library's loggers to stderr as ``form`` ("json" or "console") lines.

    ``fields`` stand in every line, such as the number of a worker. Our own lines do not pass through the standard
    library's loggers, which would take twice the time.
    """
    shared = _shared_processors(fields)
    handler = _LineHandler()
    handler.setFormatter(_library_formatter(shared, _renderer(form, _as_text)))
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    structlog.configure(
        processors=[*shared, structlog.processors.format_exc_info, _renderer(form, orjson.dumps)],
        wrapper_class=structlog.make_filtering_bound_logger(_number_of(level)),
        logger_factory=LineWriter,
        cache_logger_on_first_use=True,
    )
    _request_line.write = _request_writer(fields) if form == "json" and _number_of(level) <= logging.INFO else None


def _renderer(form: str, to_json: Callable[..., Any]) -> Any:
    """Return structlog's processor that writes the fields of a line as text."""
    if form == "json":
        return structlog.processors.JSONRenderer(to_json)
    return structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)


def _shared_processors(fields: dict[str, Any]) -> list[Any]:
    """List structlog's processors that add the fields of every line."""

    def add_fields(_logger: Any, _method: str, line: Any) -> Any:
        return {**line, **fields}

    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        *([add_fields] if fields else []),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _library_formatter(shared: list[Any], renderer: Any) -> logging.Formatter:
    """Return a formatter that gives lines of the standard library's loggers the shape of ours."""
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
        ],
    )


def log_request(**fields: Any) -> None:
    """Log a request as ``get_logger().info("request", …)`` would, which takes three times as long for JSON."""
    if _request_line.write is None:
        get_logger().info("request", **fields)
    else:
        _request_line.write(fields)


class _RequestLine:
    """Holds the function that writes a request's line; None if structlog is to write it."""

    write: Callable[[dict[str, Any]], None] | None = None


_request_line = _RequestLine()


def _number_of(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _request_writer(process_fields: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Return a function that logs the fields of a request as JSON, together with those of other requests."""
    constant = {"event": "request", "level": "info", **process_fields}

    def write(lines: list[dict[str, Any]]) -> None:
        # orjson writes the time itself, and names UTC by the letter that structlog ends it with.
        _write_together([orjson.dumps(fields, option=orjson.OPT_UTC_Z) for fields in lines])

    deferred = DeferredWriter(write)

    def add(fields: dict[str, Any]) -> None:
        deferred.add({**fields, **constant, "timestamp": datetime.now(UTC)})

    return add


def _write_together(lines: list[bytes]) -> None:
    """Write as many lines at once as a pipe takes whole, so that those of several processes do not mix."""
    writer, together, size = LineWriter(), list[bytes](), 0
    for line in lines:
        if together and size + len(line) >= select.PIPE_BUF:
            writer.msg(b"\n".join(together))
            together, size = [], 0
        together.append(line)
        size += len(line) + 1
    writer.msg(b"\n".join(together))


class LineWriter:
    """Writes lines to the present sys.stderr, which is never waited for: what cannot be written fails no request.

    Lines for a pipe or a terminal that nobody reads are dropped and counted; so are those for a full disk.
    """

    def __init__(self, *_name: Any) -> None: ...

    def msg(self, line: str | bytes) -> None:
        """Write one line by one call, so that lines of several threads do not mix."""
        _output.write((line if isinstance(line, bytes) else line.encode()) + b"\n")

    debug = info = warning = error = critical = msg


class _Output:
    """The bytes on their way to sys.stderr. ``dropped``: how many lines were lost since the process began."""

    def __init__(self) -> None:
        self.dropped = 0
        self._unsaid = 0  # of the dropped lines, those that no line has told of
        self._is_cut = False  # true behind a line of which only a part was written
        self._opened: tuple[tuple[int, int], int] | None = None  # device and inode of stderr, and our descriptor of it

    def write(self, lines: bytes) -> None:
        """Write whole lines, before them how many were lost; or count them, where stderr takes none now."""
        told = orjson.dumps({"event": "log lines dropped", "level": "warning", "count": self._unsaid}) + b"\n"
        data = b"\n" * self._is_cut + told * bool(self._unsaid) + lines
        try:
            written = self._write(data)
        except (OSError, ValueError):
            written = 0
        if written:
            self._unsaid, self._is_cut = 0, written < len(data)
        lost = 0 if written == len(data) else lines.count(b"\n")
        self.dropped, self._unsaid = self.dropped + lost, self._unsaid + lost

    def _write(self, data: bytes) -> int:
        """Write as many of the bytes as stderr takes at once, and return how many. Raises OSError, ValueError."""
        try:
            status = os.fstat(descriptor := sys.stderr.fileno())
        except (OSError, ValueError):  # one that is no file, or closed
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
            return len(data)
        if not stat.S_ISFIFO(status.st_mode) and not stat.S_ISCHR(status.st_mode):
            return os.write(descriptor, data)
        return os.write(self._unwaited(descriptor, (status.st_dev, status.st_ino)), data)

    def _unwaited(self, descriptor: int, identity: tuple[int, int]) -> int:
        """Return a descriptor of the same pipe or terminal that does not block.

        To set that on stderr itself would set it for all processes that share it. Raises BlockingIOError where it
        cannot be opened again, and takes nothing now.
        """
        if self._opened is None or self._opened[0] != identity:
            if self._opened is not None:
                os.close(self._opened[1])
                self._opened = None
            with contextlib.suppress(OSError):
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self._opened = identity, os.open(f"/proc/self/fd/{descriptor}", flags)
        if self._opened is not None:
            return self._opened[1]
        ready = select.poll()
        ready.register(descriptor, select.POLLOUT)
        if not ready.poll(0):
            raise BlockingIOError
        return descriptor


_output = _Output()


def dropped_lines() -> int:
    """Count the lines that this process could not write to stderr."""
    return _output.dropped


class _LineHandler(logging.Handler):
    """Writes the lines of the standard library's loggers."""

    def emit(self, record: logging.LogRecord) -> None:
        LineWriter().msg(self.format(record))


def get_logger() -> Any:
    """Return the service's logger; keyword arguments become fields of the line. Who logs often should keep it."""
    return structlog.get_logger()


def _as_text(fields: Any, **options: Any) -> str:
    return orjson.dumps(fields, **options).decode()
