"""``vaeserve serve --workers auto``: how many processes and threads, decided once, before anything is loaded.

A choice that ``vaeserve autotune`` has written is taken if it was made under these conditions, else what a brief
measurement says, else as many processes as there are CPUs. Nothing here keeps the service from starting.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from service.bundle.files import find_bundles
from service.errors import MeasurementFailed
from service.logs import get_logger
from service.resources import available_cpus, available_memory
from service.server.layouts import DOUBTFUL_TIE, Layout, MiB, choose, most_processes, starved
from service.server.tuned import conditions, place, usable
from service.server.tuning import graph_bytes, measure_briefly
from service.settings import Settings

PROCESS_BYTES = 100 * MiB  # of a worker without bundles
BYTES_OF_GRAPHS = 4  # a worker holds so much for each byte of its graphs: weights, packed weights, what it computes


class Decision(NamedTuple):
    """A layout, what it rests on (``autotune``, ``measurement`` or ``quota``), and why, in words."""

    layout: Layout
    by: str
    why: str


def decide(settings: Settings) -> Settings:
    """The same settings with ``workers`` and ``threads`` as numbers; the log says in one line why these."""
    decision = _decide(settings)
    workers, threads = decision.layout.processes, decision.layout.threads
    get_logger().info("workers chosen", workers=workers, threads=threads, by=decision.by, why=decision.why)
    return settings.model_copy(update={"workers": workers, "threads": threads})


def _decide(settings: Settings) -> Decision:
    cpus, memory = available_cpus(), available_memory()
    most = most_processes(_estimated_bytes(settings.repository), memory)
    short = f"; {memory / MiB:.0f} MiB of memory hold no more than {most}" if most < cpus else ""
    if sys.platform != "linux":
        return Decision(Layout(processes=1, threads=settings.threads or cpus), "quota", "several processes need Linux")
    if settings.threads:
        processes = min(max(1, cpus // settings.threads), most)
        return Decision(
            Layout(processes=processes, threads=settings.threads), "quota", f"{cpus} CPUs, threads are set{short}"
        )
    if cpus == 1:
        return Decision(Layout(processes=1, threads=1), "quota", "one CPU")
    by_quota = Layout(processes=min(cpus, most), threads=max(1, cpus // min(cpus, most)))
    return _tuned(settings, by_quota, most, short)


def _tuned(settings: Settings, by_quota: Layout, most: int, short: str) -> Decision:
    """By the written choice or a measurement, else ``by_quota``."""
    written = _written(settings)
    if isinstance(written, Layout):
        return Decision(written, "autotune", str(place(settings)))
    stale = f"; {written}" if written else ""
    if settings.device != "cpu":
        return Decision(by_quota, "quota", f"only the CPU is measured at a start{short}{stale}")
    if most == 1:
        return Decision(by_quota, "quota", short.removeprefix("; ") + stale)
    try:
        measured = measure_briefly(settings, available_cpus(), most)
        if (share := starved(measured)) is not None:
            raise MeasurementFailed(f"others took the CPUs: {share:.0%} of the time was ours")
        choice = choose(measured, available_cpus(), available_memory(), DOUBTFUL_TIE)
    except Exception as error:  # noqa: BLE001 - whatever it is, the service can do without
        return Decision(by_quota, "quota", f"the measurement failed: {error}{short}{stale}")
    return Decision(choice.layout, "measurement", choice.why + short + stale)


def _written(settings: Settings) -> Layout | str | None:
    try:
        return usable(place(settings), conditions(settings))
    except OSError as error:  # bundles that cannot be read: whoever loads them says so
        return str(error)


def _estimated_bytes(repository: Path) -> int:
    """What a worker will hold, before any has been seen."""
    try:
        graphs = sum(map(graph_bytes, find_bundles(repository)))
    except OSError:
        graphs = 0
    return PROCESS_BYTES + BYTES_OF_GRAPHS * graphs
