"""Raw ONNX Runtime in processes of its own: how many images/s in which layout of processes and threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from bench.raw import RawModel, Work, reference_pixels, to_unit
from service.bundle.files import open_bundle

BATCHES = (1, 8, 32, 64, 128, 256)
"""Tried when the best is looked for."""
MAX_SECONDS_A_CALL = 0.5
"""Batches whose single call takes longer are left out of the search: so large they win nothing."""
TRIALS = 3  # half-length blocks of each candidate; the best one counts, for neighbours can only slow it down
MIN_CALLS = 2


class Layout(NamedTuple):
    """So many processes, each with so many threads in the pool of each session."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes} × {self.threads}"


class Block(NamedTuple):
    """What ONNX Runtime did in one block: ``cpu_per_image`` in seconds, of all its threads."""

    images_per_second: float
    cpu_per_image: float
    layout: Layout
    batch: int


def measure(work: Work, batch: int, seconds: float) -> tuple[int, float, float]:
    """(images, seconds, CPU seconds) of calling ``work`` for ``seconds``, at least twice."""
    calls, cpu, started = 0, time.process_time(), time.perf_counter()
    while calls < MIN_CALLS or time.perf_counter() - started < seconds:
        work()
        calls += 1
    return calls * batch, time.perf_counter() - started, time.process_time() - cpu


def _member(line: Connection, path: Path, threads: int, device: str) -> None:
    """One process of a crew: answers (verb, batch, seconds) with what ``measure`` says."""
    bundle = open_bundle(path)
    model, works = RawModel(bundle, threads, device), dict[tuple[str, int], Work]()
    with contextlib.suppress(EOFError):  # the other end is gone: so are we
        line.send("ready")
        while True:
            verb, batch, seconds = line.recv()
            if (verb, batch) not in works:
                works[verb, batch] = model.verb(verb, to_unit(reference_pixels(bundle, batch)))
                works[verb, batch]()
            line.send("set")
            line.recv()
            line.send(measure(works[verb, batch], batch, seconds))


class Crew:
    """The processes of one layout, each with the bundle's graphs loaded on that device."""

    def __init__(self, path: Path, layout: Layout, device: str = "cpu") -> None:
        self.layout = layout
        context = multiprocessing.get_context("spawn")
        self._lines: list[Connection] = []
        self._processes = []
        for _ in range(layout.processes):
            here, there = context.Pipe()
            process = context.Process(target=_member, args=(there, path, layout.threads, device), daemon=True)
            process.start()
            there.close()
            self._lines.append(here)
            self._processes.append(process)
        for line in self._lines:
            line.recv()

    def block(self, verb: str, batch: int, seconds: float) -> Block:
        """All processes at once, each its own calls of ``batch`` images."""
        for line in self._lines:
            line.send((verb, batch, seconds))
        for line in self._lines:
            line.recv()
        for line in self._lines:
            line.send("go")
        done = [line.recv() for line in self._lines]
        images = sum(count for count, _, _ in done)
        rate = sum(count / elapsed for count, elapsed, _ in done)
        return Block(rate, sum(cpu for _, _, cpu in done) / images, self.layout, batch)

    def stop(self) -> None:
        """End the processes."""
        for line, process in zip(self._lines, self._processes, strict=True):
            line.close()
            process.terminate()
            process.join()


class RawRuntime:
    """Raw ONNX Runtime on one bundle: the layouts worth trying, and the best of them for each verb.

    ``tried``: images/s of every candidate, by verb.
    """

    def __init__(self, path: Path, cores: int, device: str = "cpu") -> None:
        layouts = dict.fromkeys([Layout(1, 1), Layout(cores, 1), Layout(1, cores)])
        self._crews = {layout: Crew(path, layout, device) for layout in layouts}
        self._best: dict[str, tuple[Layout, int]] = {}
        self.tried: dict[str, list[Block]] = {}

    def best(self, verb: str, seconds: float) -> Block:
        """One block of the verb in its best layout at its best batch, which the first call looks for."""
        if verb not in self._best:
            self.tried[verb] = list(self._try(verb, seconds))
            found = max(self.tried[verb], key=lambda block: block.images_per_second)
            self._best[verb] = found.layout, found.batch
        layout, batch = self._best[verb]
        return self._crews[layout].block(verb, batch, seconds)

    def one(self, verb: str, batch: int, seconds: float) -> Block:
        """A single caller with ``batch`` images a call, with one thread and with all: the faster of both.

        Both are tried each time, since threads that spin gain much on idle cores and lose more beside a neighbour. The
        CPU time is the lesser of both: it is that of the work, not of the spinning.
        """
        alone = [crew for layout, crew in self._crews.items() if layout.processes == 1]
        blocks = [crew.block(verb, batch, seconds / len(alone)) for crew in alone]
        fastest = max(blocks, key=lambda block: block.images_per_second)
        return fastest._replace(cpu_per_image=min(block.cpu_per_image for block in blocks))

    def _try(self, verb: str, seconds: float) -> Iterable[Block]:
        for layout in self._crews:
            for batch in BATCHES:
                blocks = [self._crews[layout].block(verb, batch, seconds / 2) for _ in range(TRIALS)]
                fastest = max(blocks, key=lambda block: block.images_per_second)
                yield fastest
                if batch * layout.processes / fastest.images_per_second > MAX_SECONDS_A_CALL:
                    break

    def stop(self) -> None:
        """End all processes."""
        for crew in self._crews.values():
            crew.stop()

    def __enter__(self) -> RawRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
