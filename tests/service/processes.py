"""A real ``vaeserve serve`` with several workers, watched through its log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from tests.service.http import npy

NPY = {"content-type": "application/x-npy"}


def command(repository: Path, *flags: str, start: Sequence[str] = ("-m", "service")) -> list[str]:
    """The command line of a service on a free port; ``start`` is what Python is to run as the service's entry point."""
    return [sys.executable, *start, "serve", "--repository", str(repository), "--port", "0", *flags]


def environment() -> dict[str, str]:
    """This environment without settings."""
    return {key: value for key, value in os.environ.items() if not key.startswith("VAESERVE_")}


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """The first true value of ``condition()``; fails if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "never true"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Whether that process runs: one that is dead and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def open_files(pid: int) -> list[str]:
    """What the descriptors of that process refer to."""
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(each))
    return found


class Service:
    """The master's process, and the lines that it and the workers have logged."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.words: list[str] = []  # what is said outside the log
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{"):
                self.lines.append(json.loads(line))
            else:
                self.words.append(line)

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The lines of that event so far."""
        return [line for line in list(self.lines) if line["event"] == event]

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """The last of the first ``count`` lines of that event, once they are logged."""

        def found() -> list[dict[str, Any]]:
            assert self.process.poll() is None or self.logged(event), self.lines
            return self.logged(event)[count - 1 : count]

        return until(found)[0]

    @property
    def pids(self) -> dict[int, int]:
        """The process of each worker, by number: the one started last."""
        return {line["worker"]: line["pid"] for line in self.logged("worker started")}

    @property
    def folder(self) -> Path:
        """Where the metrics of all workers lie."""
        return next(Path(file).parent for file in open_files(self.pids[0]) if file.endswith(".db"))

    def client(self) -> httpx.Client:
        """A client with a connection of its own: the kernel chooses which worker gets it."""
        return httpx.Client(base_url=f"http://127.0.0.1:{self.logged('starting')[0]['port']}", timeout=60)

    def get(self, path: str) -> httpx.Response:
        """GET over a new connection."""
        with self.client() as client:
            return client.get(path)

    def score(self, x: np.ndarray, request_id: str = "") -> httpx.Response:
        """Score images over a new connection."""
        with self.client() as client:
            return client.post("/v1/score", content=npy(x), headers={**NPY, "x-request-id": request_id})

    def who_answered(self, request_id: str) -> list[int]:
        """The worker of each request with that id, as far as they are logged."""
        return [line["worker"] for line in self.logged("request") if line["request_id"] == request_id]

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Values of /metrics by name and values of the labels, in the order of the labels' names."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {(s.name, *(s.labels[label] for label in sorted(s.labels))): s.value for s in samples}

    def end(self, signum: int) -> int:
        """Send the master a signal; its exit code."""
        self.process.send_signal(signum)
        code = self.process.wait(20)
        self._reader.join(60)
        return code


def _end(service: Service) -> None:
    """Stop what still runs, by force where it must be, and say so by failing."""
    try:
        if service.process.poll() is None:
            service.end(signal.SIGINT)
        until(lambda: not any(alive(pid) for pid in service.pids.values()), 20)
    except (subprocess.TimeoutExpired, AssertionError):
        for pid in (service.process.pid, *service.pids.values()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise


@contextmanager
def workers(
    repository: Path, *flags: str, start: Sequence[str] = ("-m", "service"), said: str = "serving", **options: Any
) -> Iterator[Service]:
    """A service with two workers, unless flags say otherwise, once it has ``said`` that it serves.

    ``start``: see command; ``options`` of Popen.
    """
    options = {"env": environment(), **options}
    process: subprocess.Popen[str] = subprocess.Popen(
        command(repository, "--workers", "2", *flags, start=start), stderr=subprocess.PIPE, text=True, **options
    )
    service = Service(process)
    try:
        service.wait_for(said)
        yield service
    finally:
        _end(service)
        assert process.stderr is not None
        service._reader.join(60)
        process.stderr.close()
