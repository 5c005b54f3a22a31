"""Several worker processes behind one port, and the process that starts, restarts and stops them.

The supervisor loads no model: it holds the port, the folder of the metrics and the watches of drift. Workers are forks
of another process, the nursery (service/server/nursery.py), so that no lock or thread of this one comes with them, and
are children of this one. Each has a listening socket of its own (service/server/address.py), and listens once its
models are loaded and warm.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import ConfigurationError, WorkerFailed
from service.logs import configure_logs, get_logger
from service.server.address import bind_shared, claim, refuse_taken
from service.server.adoption import Child, adopt_orphans, end_children
from service.server.channel import Message, connected_pair, encode, receive_waiting
from service.server.forker import Forker, Started, fork_nursery
from service.settings import Settings

if TYPE_CHECKING:
    from service.server.shared_drift import DriftKeeper

STARTUP_FAILURE = 3  # uvicorn's exit code where it cannot listen
FIRST_DELAY, MOST_DELAY = 0.1, 30.0  # seconds before a worker is started again; doubled with each time
READ_EVERY = 0.04  # seconds; the kernel keeps some 280 small messages of a worker meanwhile
WATCH_EVERY = 1.0  # seconds
STEADY_SECONDS = 60.0  # a worker that has served so long is started again as the first time


def serve_with_workers(settings: Settings, first: Started | None = None) -> int:
    """Serve with settings.workers processes until told to stop; the exit code. ``first``: a nursery that is there.

    Raises:
        ConfigurationError: this system does not spread connections over processes.
        WorkerFailed: no worker could start; the text says why.
    """
    if sys.platform != "linux":
        raise ConfigurationError("setting workers: only Linux spreads connections over several processes; give 1")
    first = first or fork_nursery()
    if first is None:  # this is the nursery or a worker, and ends
        return 0
    configure_logs(settings.log_level, settings.log_format)
    try:
        refuse_taken(settings.host, settings.port)
        held = bind_shared(settings.host, settings.port)
        locks = claim(held)
    except OSError as error:
        first.end()
        get_logger().error(str(error))
        return STARTUP_FAILURE
    with _metrics_folder() as folder:
        supervisor = Supervisor(settings.model_copy(update={"port": held[0].getsockname()[1]}), folder, first)
        try:
            asyncio.run(supervisor.run())
        finally:
            end_children()
    for each in held + locks:
        each.close()
    if supervisor.cut_short is not None:
        signal.raise_signal(supervisor.cut_short)
    return 0


@contextmanager
def _metrics_folder() -> Iterator[Path]:
    """A folder in memory where there is such a place: the numbers change with each request, and none is to be kept."""
    memory = Path("/dev/shm")  # noqa: S108 - mkdtemp makes a folder of its own there, for this user alone
    folder = tempfile.mkdtemp(prefix="vaeserve-", dir=memory if os.access(memory, os.W_OK) else None)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Process:
    """A running worker: its number, this end of its line, and what it has said.

    ``silent``: for how many looks of the supervisor nothing has come from it.
    """

    number: int
    child: Child
    line: socket.socket
    ready: bool = False
    failure: str | None = None
    silent: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    answers: set[asyncio.Task[None]] = field(default_factory=set)
    answering: asyncio.Lock = field(default_factory=asyncio.Lock)


class Supervisor:
    """Keeps settings.workers processes alive on settings.port, whose number must be known.

    ``nursery`` is the first one, if there is one already. ``cut_short`` is the signal that asked for an end at once:
    before all served, or once more while draining.
    """

    def __init__(self, settings: Settings, metrics: Path, nursery: Started | None = None) -> None:
        self.cut_short: signal.Signals | None = None
        self._settings = settings
        self._metrics = metrics
        self._first = nursery
        self._forker: Forker | None = None
        self._processes: dict[int, Process] = {}
        self._questions: list[tuple[Process, Message]] = []
        self._stopping = asyncio.Event()
        self._served = False
        self._rests = False

    async def run(self) -> None:
        """Start the workers and keep them until a signal says stop.

        Raises:
            WorkerFailed: a worker could not start, and no other serves.
            BundleError: there are no bundles, or one that cannot be read.
        """
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self._stop, signum)
        assert isinstance(self._settings.workers, int)
        get_logger().info(
            "starting", host=self._settings.host, port=self._settings.port, workers=self._settings.workers
        )
        adopt_orphans()
        orders = {"settings": self._settings.model_dump(mode="json"), "metrics": str(self._metrics)}
        self._forker = Forker(self._first, orders, self._settings.hang_timeout or None)
        keepers = [asyncio.create_task(self._keep(number)) for number in range(self._settings.workers)]
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*keepers)
        finally:
            for task in (*keepers, watch):
                task.cancel()
            await self._kill()

    @cached_property
    def _drift(self) -> DriftKeeper:
        """Made when a worker tells of rows or asks: what it imports would delay the start."""
        from service.server.shared_drift import DriftKeeper

        return DriftKeeper(self._settings.drift_window, self._settings.drift_level)

    async def _keep(self, number: int) -> None:
        """One worker after another in the same place."""
        delay, loop = FIRST_DELAY, asyncio.get_running_loop()
        while not self._stopping.is_set():
            try:
                process, started = await self._start(number), loop.time()
            except (OSError, WorkerFailed) as error:  # such as no memory: those that serve, serve on
                if self._stopping.is_set():
                    return
                if not self._others_serve():
                    why = str(error) if isinstance(error, WorkerFailed) else f"a worker cannot be started: {error}"
                    raise WorkerFailed(why) from error
                get_logger().error("worker not started", worker=number, reason=str(error), wait=delay)
                await self._pause(delay)
                delay = min(2 * delay, MOST_DELAY)
                continue
            await process.gone.wait()
            code = await process.child.wait()
            await self._forget(process)
            if self._stopping.is_set():
                return
            if not process.ready and not self._others_serve():
                raise WorkerFailed(process.failure or f"a worker ended before it served, with exit code {code}")
            delay = FIRST_DELAY if loop.time() - started > STEADY_SECONDS else delay
            get_logger().error(
                "worker ended", worker=number, pid=process.child.pid, exit_code=code, reason=process.failure, wait=delay
            )
            await self._pause(delay)
            delay = min(2 * delay, MOST_DELAY)

    async def _watch(self) -> None:
        while self._settings.hang_timeout:
            await asyncio.sleep(WATCH_EVERY)
            for process in list(self._processes.values()):
                self._look_at(process)

    def _look_at(self, process: Process) -> None:
        """Kill a worker whose event loop stands still: it would keep its connections, and answer none.

        What counts is how often the supervisor has found it silent, not the clock: that goes on while all are frozen.
        """
        self._read(process)
        if not process.ready or process.gone.is_set() or self._stopping.is_set():
            return
        process.silent += 1
        if process.silent * WATCH_EVERY > self._settings.hang_timeout:
            process.silent = 0
            process.failure = f"its event loop stood still for {self._settings.hang_timeout:g} s (setting hang_timeout)"
            process.child.kill()

    async def _start(self, number: int) -> Process:
        assert self._forker is not None
        ours, theirs = connected_pair()
        try:
            with theirs:
                child = await self._forker.fork(theirs)
        except BaseException:
            ours.close()
            raise
        process = Process(number, child, ours)
        self._processes[number] = process
        if not self._rests:
            self._listen([process])
        if self._stopping.is_set():
            child.send_signal(signal.SIGTERM)  # the others have been told already
        await self._send(process, [self._orders(number)])
        get_logger().info("worker started", worker=number, pid=child.pid)
        return process

    def _orders(self, number: int) -> Message:
        assert self._forker is not None
        return {
            "settings": self._settings.model_dump(mode="json"),
            "worker": number,
            "metrics": str(self._metrics),
            "bundles": self._forker.bundles,
        }

    def _listen(self, processes: Iterable[Process]) -> None:
        """Read as soon as something comes, then not before READ_EVERY seconds: what comes together costs less."""
        for process in processes:
            if not process.gone.is_set():
                asyncio.get_running_loop().add_reader(process.line, self._read_all)

    def _read_all(self) -> None:
        loop, processes = asyncio.get_running_loop(), list(self._processes.values())
        for process in processes:
            loop.remove_reader(process.line)
        try:
            for process in processes:
                self._read(process)
        finally:
            self._rests = True
            loop.call_later(READ_EVERY, self._rested)

    def _rested(self) -> None:
        self._rests = False
        self._listen(self._processes.values())

    def _read(self, process: Process) -> None:
        messages, gone = receive_waiting(process.line)
        if messages:
            process.silent = 0
        if rows := [message for message in messages if message["kind"] == "rows"]:
            self._drift.take(rows)
        for message in messages:
            self._take(process, message)
        if gone and not process.gone.is_set():
            asyncio.get_running_loop().remove_reader(process.line)
            process.gone.set()

    def _take(self, process: Process, message: Message) -> None:
        if message["kind"] == "ready":
            self._welcome(process)
        elif message["kind"] == "failed":
            process.failure = message["text"]
        elif message["kind"] not in ("rows", "alive"):
            self._questions.append((process, message))
            asyncio.get_running_loop().call_soon(self._answer)

    def _welcome(self, process: Process) -> None:
        process.ready = True
        if self._served:
            get_logger().info("worker serves again", worker=process.number, pid=process.child.pid)
        elif sum(each.ready for each in self._processes.values()) == self._settings.workers:
            self._served = True
            get_logger().info(
                "serving", host=self._settings.host, port=self._settings.port, workers=self._settings.workers
            )

    def _answer(self) -> None:
        """Answer the questions, after all that the workers told before they were asked."""
        questions, self._questions = self._questions, []
        for each in list(self._processes.values()):
            self._read(each)
        for process, question in questions:
            task = asyncio.create_task(self._send(process, list(self._drift.answers(question))))
            process.answers.add(task)
            task.add_done_callback(process.answers.discard)

    async def _send(self, process: Process, messages: list[Message]) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):  # the worker has ended, and with it who asked
            async with process.answering:
                for message in messages:
                    await loop.sock_sendall(process.line, encode(message))

    def _others_serve(self) -> bool:
        return self._served and any(each.ready for each in self._processes.values())

    async def _forget(self, process: Process) -> None:
        del self._processes[process.number]
        for answer in process.answers:
            answer.cancel()
        await asyncio.gather(*process.answers, return_exceptions=True)  # before their socket is closed under them
        process.line.close()
        for file in self._metrics.glob(f"gauge_live*_{process.child.pid}.db"):
            file.unlink()  # what a dead process has in flight counts no more; its counters still do

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    def _stop(self, signum: signal.Signals) -> None:
        """Hand the signal on: each worker drains, or stops at once, as a process alone does."""
        if not self._served or (self._stopping.is_set() and signum == signal.SIGTERM):
            self.cut_short = signum
        self._stopping.set()
        if self._forker is not None:
            self._forker.end()
        for process in self._processes.values():
            process.child.send_signal(signum if process.ready else signal.SIGTERM)

    async def _kill(self) -> None:
        if self._forker is not None:
            self._forker.end()
            await self._forker.ended()
        for process in self._processes.values():
            process.child.kill()
            await process.child.wait()
