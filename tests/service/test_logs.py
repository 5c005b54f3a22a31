"""One line a request on stderr, whatever becomes of stderr."""

import io
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import suppress

import pytest

from service.logs import LineWriter, dropped_lines

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
    stream = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stderr", stream)
    LineWriter().info(b"a line")
    assert stream.buffer.getvalue() == b"a line\n"
    stream.close()
    LineWriter().info("another")


UNREAD = """
import logging, sys
from service.logs import configure_logs, dropped_lines, get_logger, log_request
configure_logs("info", "json")
for number in range(2000):
    get_logger().info("ours", number=number, padding="x" * 50)
    logging.getLogger("theirs").warning("a warning")
    log_request(path="/" + "y" * 50)
print(dropped_lines(), flush=True)
sys.stdin.readline()
get_logger().info("again")
print(dropped_lines(), flush=True)
"""


def test_a_stderr_that_nobody_reads_is_not_waited_for_and_what_it_lost_is_counted():
    """A pipe takes 64 KiB, of 6000 lines. That of this process keeps its flags, which others may share."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", UNREAD], **pipes) as process:
        dropped = int(process.stdout.readline())
        assert 3000 < dropped < 6000
        assert os.get_blocking(process.stderr.fileno())
        before = b""
        while before.count(b"\n") < 6000 - dropped:
            before += os.read(process.stderr.fileno(), 2**16)
        process.stdin.write(b"\n")
        process.stdin.flush()
        after = process.stderr.read()
        assert int(process.stdout.readline()) == dropped
    lines = [json.loads(line) for line in (before + after).splitlines() if line]
    assert len(lines) == 6000 - dropped + 2
    assert (lines[-2]["event"], lines[-2]["count"], lines[-1]["event"]) == ("log lines dropped", dropped, "again")


def test_a_stderr_that_cannot_be_opened_again_is_asked_whether_it_takes_more(monkeypatch):
    """A socket, or a pipe of another user."""
    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr("service.logs.stat.S_ISFIFO", lambda mode: True)
        before = dropped_lines()
        for _ in range(20_000):
            LineWriter().info(b"x" * 100)
        assert 0 < dropped_lines() - before < 20_000
        theirs.setblocking(False)
        with suppress(BlockingIOError):
            while theirs.recv(2**20):
                pass
        LineWriter().info(b"again")
        assert b'"event":"log lines dropped"' in theirs.recv(2**20)


def test_a_full_disk_costs_lines_and_nothing_else(monkeypatch):
    with open("/dev/full", "w", closefd=True) as full:
        monkeypatch.setattr(sys, "stderr", full)
        before = dropped_lines()
        LineWriter().info("lost")
        assert dropped_lines() == before + 1
