"""A process that imports and loads what all workers need, once, and forks every worker off itself.

So a worker shares these pages of memory with the others, and one in place of a dead one serves in a moment. A fork
copies the thread that asks for it and no other, yet all locks that the others hold. Hence a worker goes on from a fork
only where the kernel counts a single thread in the nursery, and else is a fresh interpreter. Models are loaded here
where their sessions have one thread, which is the caller's; those that have more are loaded by every worker.

A worker is forked twice: the process between ends at once, and the supervisor adopts it (service/server/adoption.py).
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from service.errors import VaeserveError
from service.imports import import_fastapi
from service.server.channel import MOST_BYTES, Message, encode
from service.server.interpreters import fresh_interpreter
from service.settings import Settings

if TYPE_CHECKING:
    from service.repository.model_repository import ModelRepository

FAILED = 1
QUIET_SECONDS = 1.0  # in which threads that were joined must have left the process
PID_BYTES = 4


def main(descriptor: int) -> None:
    """Fork a worker for each order that comes over that end of the line, until the other end is gone.

    The first message holds the settings, the folder of the metrics, and the digests that the bundles must have by
    NAME/VERSION, or null. This returns once in the nursery, and once in each worker, when that is to end.
    """
    _settle(descriptor)
    nursery = Nursery(socket.socket(fileno=descriptor))
    gc.disable()  # what is made now stays
    import service.inference.model  # noqa: F401 - while the supervisor takes its port

    data = nursery.line.recv(MOST_BYTES)
    if not data:
        return
    orders = orjson.loads(data)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = orders["metrics"]  # read when prometheus_client is imported
    try:
        nursery.prepare(Settings(**orders["settings"]), orders["bundles"])
    except (VaeserveError, OSError) as error:
        nursery.tell({"kind": "failed", "text": str(error)})
        sys.exit(FAILED)
    worker = nursery.watch()
    if worker is not None:
        from service.server.worker import serve

        serve(worker, nursery.repository)
    elif not nursery.forked:  # else the workers do it, as the supervisor would have
        shutil.rmtree(orders["metrics"], ignore_errors=True)


def _settle(descriptor: int) -> None:
    """A group of its own (a terminal's Ctrl-C is for the supervisor), nothing to read, no descriptor but the line."""
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for other in map(int, os.listdir("/proc/self/fd")):
        if other > 2 and other != descriptor:
            with suppress(OSError):  # the one that the list was read from
                os.close(other)
    name_process("nursery")


class Nursery:
    """Its end of the line to the supervisor, and what it has loaded.

    ``repository`` is None where each worker loads the bundles; ``forked`` tells whether there has been one.
    """

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.repository: ModelRepository | None = None
        self.forked = False

    def tell(self, message: Message) -> None:
        """Send a message, in vain where the supervisor is gone."""
        with suppress(OSError):
            self.line.send(encode(message))

    def prepare(self, settings: Settings, bundles: dict[str, str] | None) -> None:
        """Import all, load the bundles if they can be forked, and tell their digests.

        Raises:
            BundleError, ConfigurationError, DeviceUnavailable: see load_repository.
        """
        from service.bundle.files import bundle_digests
        from service.logs import configure_logs, get_logger

        configure_logs(settings.log_level, settings.log_format)
        digests = bundle_digests(settings.repository) if bundles is None else bundles
        import uvicorn.lifespan.on
        import uvicorn.loops.auto  # noqa: F401 - uvloop's, where that is there

        import_fastapi()
        import service.server.worker  # noqa: F401 - and with it the whole app
        from service.repository.model_repository import load_repository

        if settings.threads == 1 and settings.device == "cpu":
            self.repository = load_repository(settings, digests)
        gc.freeze()  # a collection would write to every object, and so copy all pages
        gc.enable()
        if not _falls_quiet():
            get_logger().warning("workers share no memory", reason=f"{threads_of_process()} threads in the nursery")
        self.tell({"kind": "prepared", "bundles": digests})

    def watch(self) -> socket.socket | None:
        """Fork a worker for every socket that comes; in a worker that socket, None in the nursery at the end."""
        while True:
            data, received, *_ = socket.recv_fds(self.line, MOST_BYTES, 1)
            if not data:
                return None
            end, alone = socket.socket(fileno=received[0]), threads_of_process() == 1
            try:
                pid = _fork()
            except OSError as error:
                self.tell({"kind": "failed", "text": error.strerror})
            else:
                if pid == 0:
                    return self._become_worker(end, alone)
                self.forked = True
                self.tell({"kind": "forked", "pid": pid})
            end.close()

    def _become_worker(self, end: socket.socket, alone: bool) -> socket.socket:
        """Go on as a worker; as a fresh interpreter, unless the nursery was ``alone`` with its thread."""
        self.line.close()
        os.setpgid(0, 0)
        if not alone:
            os.set_inheritable(end.fileno(), True)
            command = fresh_interpreter("service.server.worker", end.fileno())
            os.execv(command[0], command)  # noqa: S606 - this interpreter, this package
        return end


def _fork() -> int:
    """The pid of a new process, which has gone to the supervisor; 0 in there. Raises OSError."""
    reading, writing = os.pipe()
    try:
        between = os.fork()
        if between == 0:
            return _fork_again(writing)
        _, status = os.waitpid(between, 0)
        if code := os.waitstatus_to_exitcode(status):
            raise OSError(abs(code), os.strerror(abs(code)))
        return int.from_bytes(os.read(reading, PID_BYTES), "little")
    finally:
        os.close(reading)
        os.close(writing)


def _fork_again(writing: int) -> int:
    """0 in the grandchild. The child writes its pid and ends."""
    try:
        pid = os.fork()
    except OSError as error:
        os._exit(error.errno or FAILED)
    if pid:
        os.write(writing, pid.to_bytes(PID_BYTES, "little"))
        os._exit(0)
    return 0


def threads_of_process() -> int:
    """Threads of this process by the kernel's count, those that Python knows nothing of too."""
    return len(os.listdir("/proc/self/task"))


def _falls_quiet() -> bool:
    """Whether this thread is the only one, once those that were joined have left."""
    deadline = time.monotonic() + QUIET_SECONDS
    while threads_of_process() > 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    return threads_of_process() == 1


def name_process(name: str) -> None:
    """What lists of processes call this one, in at most 15 letters."""
    Path("/proc/self/comm").write_text(name)
