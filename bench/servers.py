"""Servers under measurement: real processes on free ports, their CPU time and memory. Linux only (/proc)."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO

START_SECONDS = 120
POLL_SECONDS = 0.005


class ServerFailedError(RuntimeError):
    """The server ended, or never became ready; the text is what it logged last."""


class Server:
    """A command that listens on a port of 127.0.0.1; its log goes to a file, as that of a container does.

    ``seconds_to_ready`` is from the start of the process to the first 200 of ``ready_path``.
    """

    def __init__(self, command: list[str], ready_path: str) -> None:
        self.host, self.port = "127.0.0.1", free_port()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("VAESERVE_")}
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, *command, "--port", str(self.port)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        try:
            self._wait(ready_path, started + START_SECONDS)
        except BaseException:
            self.stop()
            raise
        self.seconds_to_ready = time.perf_counter() - started

    def _wait(self, path: str, deadline: float) -> None:
        while not self._answers(path):
            if self._process.poll() is not None or time.perf_counter() > deadline:
                self._log.seek(0)
                raise ServerFailedError(self._log.read()[-2000:].decode(errors="replace"))
            time.sleep(POLL_SECONDS)

    def _answers(self, path: str) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=START_SECONDS)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except ConnectionError:
            return False
        finally:
            connection.close()

    def cpu_seconds(self) -> float:
        """CPU time of the process and its workers so far, each by its own clock (clock_getcpuclockid(3))."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self._processes())

    def memory(self, what: str = "VmRSS") -> int:
        """Resident bytes now (VmRSS), or the most there ever were (VmHWM), summed over the process and its workers."""
        return sum(_status(pid, what) for pid in self._processes())

    def _processes(self) -> list[int]:
        """The process and all that descend from it."""
        found = [self._process.pid]
        for pid in found:
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        return found

    def stop(self) -> None:
        """End the processes: at once, for nothing is under way."""
        for pid in reversed(self._processes() if self._process.poll() is None else []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def _status(pid: int, what: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":"))


def hello_server(workers: int = 1) -> Server:
    """A bare ASGI hello under uvicorn, with the parser, the event loop and the processes that the service has."""
    command = ["-m", "uvicorn", "bench.hello:app", "--http", "httptools", "--loop", "uvloop", "--ws", "none"]
    return Server(
        [*command, "--lifespan", "off", "--no-access-log", "--log-level", "warning", "--workers", str(workers)], "/"
    )


def vae_server(repository: Path, workers: int = 1) -> Server:
    """``vaeserve serve`` of that folder by so many processes; every protection as it is by default."""
    command = ["-m", "service", "serve", "--repository", str(repository.resolve()), "--workers", str(workers)]
    return Server(command, "/readyz")
