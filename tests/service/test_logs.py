"""One line a request on stderr, whatever becomes of stderr."""

import io
import json
import re
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from service.logs import configure_logs, get_logger
configure_logs(*sys.argv[1:3], worker=3)
log = get_logger()
log.debug("quiet")
log.info("request", status=200, path="/é")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("unexpected error", request_id="a")
import logging
logging.getLogger("uvicorn").warning("theirs %s", 1)
"""


def said(form, level="info"):
    return subprocess.run([sys.executable, "-c", PROGRAM, level, form], capture_output=True, check=True).stderr.decode()


def test_our_lines_and_those_of_libraries_have_one_shape():
    lines = [json.loads(line) for line in said("json").splitlines()]
    ours, error, theirs = lines
    assert (ours["event"], ours["status"], ours["path"], ours["level"]) == ("request", 200, "/é", "info")
    assert (error["level"], error["request_id"]) == ("error", "a")
    assert "ZeroDivisionError" in error["exception"]
    assert (theirs["event"], theirs["level"]) == ("theirs 1", "warning")
    assert all(line["worker"] == 3 and line["timestamp"].endswith("Z") for line in lines)


REQUEST = """
import sys
from service.logs import configure_logs, get_logger, log_request
configure_logs(*sys.argv[1:3], worker=3)
fields = {"request_id": "a", "path": "/é\\n", "status": 200, "milliseconds": 1.5}
get_logger().info("request", **fields)
log_request(**fields)
"""


@pytest.mark.parametrize(
    ("level", "form", "lines"), [("info", "json", 2), ("info", "console", 2), ("warning", "json", 0)]
)
def test_the_short_way_of_a_requests_line_writes_what_the_long_one_does(level, form, lines):
    done = subprocess.run([sys.executable, "-c", REQUEST, level, form], capture_output=True, check=True)
    written = done.stderr.decode().splitlines()
    assert len(written) == lines
    if lines:
        long, short = (re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "now", line) for line in written)
        assert "now" in short
        assert (json.loads(short) == json.loads(long)) if form == "json" else (short == long)


def test_the_level_and_the_console_form_are_kept():
    assert [json.loads(line)["level"] for line in said("json", "warning").splitlines()] == ["error", "warning"]
    text = said("console")
    assert "request" in text
    assert "status" in text
    assert "quiet" not in text


def test_a_closed_stderr_costs_nothing(monkeypatch):
    from service.logs import LineWriter

    stream = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stderr", stream)
    LineWriter().info(b"a line")
    assert stream.buffer.getvalue() == b"a line\n"
    stream.close()
    LineWriter().info("another")
