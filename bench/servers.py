"""Servers under measurement: real processes on free ports, their CPU time and memory. Linux only (/proc)."""

from __future__ import annotations

import argparse
import compileall
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bench.memory import name, pss, rss

ROOT = Path(__file__).parents[1]
"""The checkout that this is."""
START_SECONDS = 120
STOP_SECONDS = 5  # in which a server ends that is told to; told twice
POLL_SECONDS = 0.005


class ServerFailedError(RuntimeError):
    """The server ended, or never became ready; the text is what it logged last."""


@dataclass(frozen=True)
class Command:
    """What to run: ``{port}`` in the arguments and in the environment's values is the port to listen on.

    ``ready_path`` answers 200 once the server serves.
    """

    arguments: tuple[str, ...]
    ready_path: str
    python: str = sys.executable
    folder: Path = ROOT
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Installation:
    """A checkout of the service, and the interpreter of an environment that has what it imports."""

    checkout: Path = ROOT
    python: str = sys.executable

    @property
    def commit(self) -> str:
        """Short hash of the checkout's commit, with a + if its files differ from it."""
        git = ["git", "-C", str(self.checkout)]
        try:
            head = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True, stderr=subprocess.DEVNULL)
            dirty = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        return head.strip() + ("+" if dirty else "")

    def compile(self) -> None:
        """Write the bytecode of its modules, which every installed package has: else a start includes compiling."""
        compileall.compile_dir(self.checkout / "service", quiet=1)


class Server:
    """A command that listens on a port of 127.0.0.1; its log goes to a file, as that of a container does.

    ``seconds_to_ready`` is from the start of the process to the first 200 of ``ready_path``.
    """

    def __init__(self, command: Command) -> None:
        self.host, self.port = "127.0.0.1", free_port()
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VAESERVE_")}
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [command.python, *(part.replace("{port}", str(self.port)) for part in command.arguments)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=inherited | {name: value.replace("{port}", str(self.port)) for name, value in command.environment},
            cwd=command.folder,
            start_new_session=True,
        )
        try:
            self._wait(command.ready_path, started + START_SECONDS)
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
        except (ConnectionError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def exit_code(self, seconds: float = 0) -> int | None:
        """Of the process that was started, waited for as long; None while it runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def cpu_seconds(self) -> float:
        """CPU time of the process and its descendants so far, each by its own clock (clock_getcpuclockid(3))."""
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self.processes())

    def memory(self) -> dict[str, Any]:
        """Bytes, PSS and RSS: ``first`` of the process that was started, ``others`` of each that descends from it, with
        the name that it goes by."""
        first, *others = self.processes()
        return {
            "first": {"pss": pss(first), "rss": rss(first)},
            "others": [{"name": name(pid), "pss": pss(pid), "rss": rss(pid)} for pid in others],
        }

    def processes(self) -> list[int]:
        """The process and all that descend from it."""
        found = [self._process.pid]
        for pid in found:
            with contextlib.suppress(FileNotFoundError):  # it, or a thread of it, has just ended
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found

    def stop(self) -> None:
        """End the processes, which have nothing under way: by SIGINT, so that they tidy up, then SIGTERM; what is left
        of them and of the session is killed."""
        left = self.processes() if self._process.poll() is None else []
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._process.send_signal(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        for pid in reversed(left):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def interpreter(text: str) -> str:
    """The absolute path of an interpreter, which in an environment is a link and stays one. A bare name stays, too."""
    return os.path.abspath(text) if os.sep in text else text


def add_service(parser: argparse.ArgumentParser) -> None:
    """The flags that say which service is run, and by which interpreter."""
    parser.add_argument("--checkout", type=Path, default=ROOT, help="of the service (this one)")
    help_text = "its interpreter; where memory is read not this one, since pages that others map, too, count in parts"
    parser.add_argument("--python", type=interpreter, default=sys.executable, help=help_text)


def add_base(parser: argparse.ArgumentParser) -> None:
    """The flags that say which older service it is compared with."""
    parser.add_argument("--base", type=Path, required=True, help="checkout of the older service")
    parser.add_argument("--base-python", type=interpreter, default=sys.executable, help="its interpreter")


def sides(arguments: argparse.Namespace) -> tuple[Installation, Installation]:
    """The older service and the newer one."""
    older = Installation(arguments.base.resolve(), arguments.base_python)
    return older, Installation(arguments.checkout.resolve(), arguments.python)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def uvicorn_command(
    app: str, workers: int, *, ready_path: str, environment: Mapping[str, str] | None = None
) -> Command:
    """An ASGI app under uvicorn, with the parser, the event loop and the processes that the service has."""
    arguments = ["-m", "uvicorn", app, "--http", "httptools", "--loop", "uvloop", "--ws", "none", "--lifespan", "off"]
    quiet = ["--no-access-log", "--log-level", "warning", "--workers", str(workers), "--port", "{port}"]
    return Command((*arguments, *quiet), ready_path, environment=tuple((environment or {}).items()))


def hello_server(workers: int = 1) -> Server:
    """A bare ASGI hello."""
    return Server(uvicorn_command("bench.hello:app", workers, ready_path="/"))


def vae_server(
    repository: Path,
    workers: int = 1,
    device: str = "cpu",
    installation: Installation = Installation(),
    flags: Sequence[str] = (),
) -> Server:
    """``vaeserve serve`` of that folder by so many processes; every protection as by default, but for ``flags``."""
    arguments = ["-m", "service", "serve", "--repository", str(repository.resolve()), "--workers", str(workers)]
    return Server(
        Command(
            (*arguments, "--device", device, "--port", "{port}", *flags),
            "/readyz",
            python=installation.python,
            folder=installation.checkout,
            environment=(("PYTHONPATH", str(installation.checkout)),),
        )
    )
