"""A process that computes what a worker would, as often as it can, while others of its kind do the same.

service/server/tuning.py starts it, and asks over a socket, one order at a time: prepare so many threads, or run a
workload for a given time. The clock is the system's monotonic one, which all processes share.
"""

from __future__ import annotations

import socket
import statistics
import time
from asyncio import Runner
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

MOST_BYTES = 2**17
GRAPH_ROWS = (1, 8)


class Workload(NamedTuple):
    """Computations of ``rows`` rows. ``repeat(connections, until)``: at least one; seconds of each, end of the last."""

    rows: int
    repeat: Callable[[int, float], tuple[list[float], float]]


Workloads = dict[int, dict[str, Workload]]
"""By threads and name."""


def main(descriptor: int) -> None:
    """Answer orders until the other end is gone."""
    end = socket.socket(fileno=descriptor)
    workloads: Workloads = {}
    with ExitStack() as stack:
        while data := end.recv(MOST_BYTES):
            try:
                answer = _obey(orjson.loads(data), workloads, stack)
            except Exception as error:  # noqa: BLE001 - told to who asked, who goes on without a measurement
                answer = {"failed": f"{error or type(error).__name__}"[:1000]}
            end.send(orjson.dumps(answer))


def _obey(order: dict[str, Any], workloads: Workloads, stack: ExitStack) -> dict[str, Any]:
    if "memory" in order:
        return {"bytes": _most_resident()}
    if "workload" in order:
        workload = workloads[order["threads"]][order["workload"]]
        return _run(workload, order["connections"], order["start"], order["seconds"])
    made = _of_graphs(order) if "graphs" in order else _of_service(order, stack)
    workloads[order["threads"]] = made
    return {"workloads": {name: workload.rows for name, workload in made.items()}}


def _of_graphs(order: dict[str, Any]) -> dict[str, Workload]:
    """One graph after the other, on random rows, without what the service does around them: made in a moment."""
    from service.bundle.operators import check_operators
    from service.inference.batch_invariance import TWO_PATHS
    from service.inference.sessions import Runtime

    runtime, sessions = Runtime("cpu", order["threads"]), []
    for path in order["graphs"]:
        data = Path(path).read_bytes()
        serial = TWO_PATHS & check_operators(data).keys()
        sessions.append(runtime.session(data, threads=1 if serial else None))

    def workload(rows: int) -> Workload:
        feeds = [{each.name: _random(each.shape, rows) for each in session.get_inputs()} for session in sessions]

        def compute() -> None:
            for session, feed in zip(sessions, feeds, strict=True):
                session.run(None, feed)

        compute()
        return Workload(rows, lambda connections, until: _repeat(compute, until))

    return {f"graphs {rows}": workload(rows) for rows in GRAPH_ROWS}


def _random(shape: list[int | str], rows: int) -> np.ndarray:
    """Float32 in [0, 1) of a graph's input: its first axis are the rows, others without a number are one long."""
    sizes = [size if isinstance(size, int) else 1 for size in shape[1:]]
    return np.random.RandomState(0).random_sample((rows, *sizes)).astype(np.float32)


def _repeat(compute: Callable[[], None], until: float) -> tuple[list[float], float]:
    latencies: list[float] = []
    now = time.monotonic()
    while not latencies or now < until:
        compute()
        before, now = now, time.monotonic()
        latencies.append(now - before)
    return latencies, now


def _of_service(order: dict[str, Any], stack: ExitStack) -> dict[str, Workload]:
    """Requests to a worker's app with all bundles loaded; its log goes where this process' stderr goes."""
    from service.logs import configure_logs
    from service.server.rehearsal import Asked, rehearsal, repeat, requests_for
    from service.settings import Settings

    layout = {"workers": order["processes"], "threads": order["threads"]}
    settings = Settings(**{**order["settings"], **layout})
    configure_logs(settings.log_level, settings.log_format)
    runner = stack.enter_context(Runner())
    app = runner.run(rehearsal(settings).__aenter__())

    def workload(asked: Asked) -> Workload:
        return Workload(asked.rows, lambda connections, until: runner.run(repeat(app, asked, connections, until)))

    return {name: workload(asked) for name, asked in runner.run(requests_for(app, order["models"])).items()}


def _run(workload: Workload, connections: int, start: float, seconds: float) -> dict[str, Any]:
    """Compute from ``start`` for ``seconds``."""
    time.sleep(max(0.0, start - time.monotonic()))
    on_cpu = time.process_time()
    latencies, end = workload.repeat(connections, start + seconds)
    return {
        "images_per_second": workload.rows * len(latencies) / (end - start),
        "latency": statistics.median(latencies),
        "cpu": (time.process_time() - on_cpu) / (end - start),
    }


def _most_resident() -> int:
    """Bytes that this process has held at most."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
