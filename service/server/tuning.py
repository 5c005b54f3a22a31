"""Measuring layouts by real processes that compute in parallel: for ``vaeserve autotune``, and briefly at a start."""

from __future__ import annotations

import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from service.bundle.files import find_bundles
from service.bundle.manifest import MANIFEST, parse_manifest
from service.errors import MeasurementFailed
from service.server.channel import MOST_BYTES, connected_pair, encode
from service.server.interpreters import fresh_interpreter
from service.server.layouts import Layout, Measured, Rate, candidates, most_processes
from service.settings import Settings

STEP_SECONDS = 300.0  # for the longest step at length: many bundles loaded, a large batch scored
ROUNDS = 3  # of each measurement: the median is taken
BRIEF_SECONDS = 0.9  # for the whole of a brief one
BRIEF_RUN_SECONDS = 0.02  # of one workload
HEADSTART, HEADSTART_EACH = 0.002, 0.0002  # seconds until all processes have heard that they are to start

CONNECTIONS, CONNECTIONS_OF_BATCHES = 8, 2  # for each thread of a process under load
MOST_CONNECTIONS = 32  # to a process: fewer than its queue takes by default
MEMORY = {"memory": True}

Work = dict[str, Any]
"""What the processes are to prepare, as service/server/probe.py reads it."""


class Probes:
    """So many processes, to be used with ``with``.

    Each method raises MeasurementFailed where a step is not done at ``deadline()``, on the monotonic clock, or fails.
    """

    def __init__(self, count: int, deadline: Callable[[], float]) -> None:
        self._deadline = deadline
        self._ends: list[socket.socket] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._workloads: dict[Layout, dict[str, int]] = {}
        try:
            for _ in range(count):
                self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Probes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        ours, theirs = connected_pair()
        self._ends.append(ours)
        with theirs:
            child = subprocess.Popen(  # noqa: S603 - this interpreter, this package
                fresh_interpreter("service.server.probe", theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._children.append(child)

    def prepare(self, layout: Layout, work: Work) -> None:
        """Have ``work`` ready in the processes of ``layout``, beside what was prepared for others."""
        answers = self._ask(layout.processes, {**work, **layout.model_dump()})
        self._workloads[layout] = answers[0]["workloads"]
        if not self._workloads[layout]:
            raise MeasurementFailed("there is no model to compute")

    def measure(self, layout: Layout, seconds: float) -> Measured:
        """Run each workload that was prepared for ``layout`` for ``seconds``."""
        workloads = self._workloads[layout]
        rates = {workload: self._rate(layout, workload, rows, seconds) for workload, rows in workloads.items()}
        held = max(answer["bytes"] for answer in self._ask(layout.processes, MEMORY))
        return Measured(layout=layout, rates=rates, process_bytes=held)

    def _rate(self, layout: Layout, workload: str, rows: int, seconds: float) -> Rate:
        """One process alone, asked by one, for a fifth of the time; then all together, each asked by its share."""
        connections = layout.threads * (CONNECTIONS if rows == 1 else CONNECTIONS_OF_BATCHES)
        order = {"workload": workload, "threads": layout.threads}
        alone = self._run(1, order, 1, seconds / 5)
        loaded = self._run(layout.processes, order, min(connections, MOST_CONNECTIONS), seconds * 4 / 5)
        together = sum(answer["images_per_second"] for answer in loaded)
        cpu = min(answer["cpu"] for answer in loaded)
        return Rate(images_per_second=together, latency=alone[0]["latency"], cpu=cpu)

    def _run(self, count: int, order: Work, connections: int, seconds: float) -> list[dict[str, Any]]:
        start = time.monotonic() + HEADSTART + HEADSTART_EACH * count
        return self._ask(count, {**order, "connections": connections, "start": start, "seconds": seconds})

    def _ask(self, count: int, order: Work) -> list[dict[str, Any]]:
        """Each one's answer to the order."""
        try:
            for end in self._ends[:count]:
                end.settimeout(self._left())
                end.send(encode(order))
            return [self._answer(end) for end in self._ends[:count]]
        except TimeoutError:
            raise MeasurementFailed("it took too long") from None
        except OSError as error:
            raise MeasurementFailed(f"a measuring process cannot be reached: {error}") from error

    def _answer(self, end: socket.socket) -> dict[str, Any]:
        end.settimeout(self._left())
        data = end.recv(MOST_BYTES)
        if not data:
            raise MeasurementFailed("a measuring process has ended")
        answer: dict[str, Any] = orjson.loads(data)
        if "failed" in answer:
            raise MeasurementFailed(answer["failed"])
        return answer

    def _left(self) -> float:
        left = self._deadline() - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def close(self) -> None:
        """End all processes."""
        for end in self._ends:
            end.close()
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()


def measure_at_length(
    settings: Settings, models: Sequence[str], cpus: int, memory: int, seconds: float, told: Callable[[Layout], None]
) -> list[Measured]:
    """The layouts of ``cpus``, fewest processes first, as far as they fit into ``memory`` bytes by what a process held.

    ``models`` are computed, all bundles are loaded. Each layout is measured for ``seconds`` in all, beside the time it
    takes to load them, in ROUNDS with fresh processes: a neighbour's load changes with time. ``told`` hears before what
    is measured.

    Raises:
        MeasurementFailed: also for a bundle that cannot be loaded.
    """
    work = {"settings": settings.model_dump(mode="json"), "models": list(models)}
    of_each_run = seconds / (4 * len(models) * ROUNDS)
    found: dict[Layout, list[Measured]] = {}

    def measure(layout: Layout) -> None:
        told(layout)
        with Probes(layout.processes, lambda: time.monotonic() + STEP_SECONDS) as probes:
            probes.prepare(layout, work)
            found.setdefault(layout, []).append(probes.measure(layout, of_each_run))

    measure(candidates(cpus, 1)[0])
    held = max(rounds[0].process_bytes for rounds in found.values())
    layouts = candidates(cpus, most_processes(held, memory))
    for layout in layouts[1:] + layouts * (ROUNDS - 1):
        measure(layout)
    return [_median(rounds) for rounds in found.values()]


def _median(rounds: Sequence[Measured]) -> Measured:
    """Of each rate the median, and the most memory."""

    def of(workload: str) -> Rate:
        rates = [each.rates[workload] for each in rounds]
        return Rate(**{name: statistics.median(getattr(rate, name) for rate in rates) for name in Rate.model_fields})

    rates = {workload: of(workload) for workload in rounds[0].rates}
    return Measured(layout=rounds[0].layout, rates=rates, process_bytes=max(each.process_bytes for each in rounds))


def measure_briefly(settings: Settings, cpus: int, most: int) -> list[Measured]:
    """One, half and all of ``most`` processes, in less than BRIEF_SECONDS: the encoder and the decoder of one bundle.

    Only those are loaded, without the rest of a service, by as many processes as the largest layout has.

    Raises:
        MeasurementFailed: also where it takes too long.
        OSError: no process is to be had, or no bundle to be read.
    """
    deadline = time.monotonic() + BRIEF_SECONDS
    layouts = candidates(cpus, most)
    if len(layouts) > 3:
        layouts = [layouts[0], layouts[-2], layouts[-1]]
    with Probes(layouts[-1].processes, lambda: deadline) as probes:
        work = {"graphs": [str(path) for path in _typical_graphs(settings)]}  # while they start
        for layout in layouts:
            probes.prepare(layout, work)
        rounds = [[probes.measure(layout, BRIEF_RUN_SECONDS) for layout in layouts] for _ in range(ROUNDS)]
    return [_median(of_layout) for of_layout in zip(*rounds, strict=True)]


def _typical_graphs(settings: Settings) -> list[Path]:
    """Encoder and decoder of the default model's largest bundle, or of the largest of all.

    Raises MeasurementFailed where there is none.
    """
    folders = find_bundles(settings.repository)
    folders = [each for each in folders if each.parent.name == settings.default_model] or folders
    if not folders:
        raise MeasurementFailed("there is no bundle")
    folder = max(folders, key=graph_bytes)
    graphs = parse_manifest((folder / MANIFEST).read_bytes()).graphs
    return [folder / graphs[role] for role in ("encoder", "decoder") if role in graphs]


def graph_bytes(folder: Path) -> int:
    """Size of a bundle's graphs as they lie there."""
    return sum(file.stat().st_size for file in folder.glob("*.onnx"))
