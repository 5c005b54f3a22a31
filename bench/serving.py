"""The service against raw ONNX Runtime, in one run: every verb, input format, batch and number of connections.

    python -m bench.serving [--repository exported] [--model mnist] [--seconds 0.3] [--rounds 5] [--json FILE]

The real ``vaeserve serve`` runs as a process of its own with its default protections. In every round, and side by side
in a shuffled order, run raw ONNX Runtime on the same graphs (bench.raw), a bare HTTP answer to a body of the same size
(bench.hello), and the service with each kind of request; a ratio is taken within its round, and its median over the
rounds is the result, so that a drift of the machine's speed hits both sides. The limit that a service made of these two
could reach, if nothing overlapped, is 1 / (1 / bare HTTP + 1 / raw ONNX Runtime) requests/s. Beside the rates stands
the ratio of CPU time: what raw ONNX Runtime takes for the same images on one thread, over what the server took. Rates
suffer when neighbours want the cores, CPU time hardly does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.progress import track

from bench.load import Load, Target, drive
from bench.raw import ALONE, Layout, RawModel, Work, calls_per_second, cpu_per_call, layouts
from bench.report import print_report
from bench.requests import VERBS, Case, cases, check_answers, hello_request
from bench.servers import Server, hello_server, vae_server
from service.bundle import REFERENCE, Bundle, open_bundle
from service.repository import find_bundles

TRIALS = 3  # blocks of each layout of raw ONNX Runtime before one is chosen
Client = Callable[[Target, int, float], Load]


@dataclass(frozen=True)
class Group:
    """What is compared: one verb on ``batch`` images from so many connections."""

    verb: str
    batch: int
    connections: int
    cases: list[Case]
    hello: Target
    raw: dict[Layout, Work]


@dataclass
class Bench:
    """Everything that a round needs."""

    client: Client
    server: Server
    groups: list[Group]
    layout: dict[int, Layout]
    seconds: float


@dataclass(frozen=True)
class Row:
    """One block of a case: its load, the server's CPU seconds, and what stood beside it in the round.

    ``raw`` and ``raw_cpu``: images/s of raw ONNX Runtime, and its CPU seconds for the images of one request; ``http``:
    requests/s of bare HTTP.
    """

    load: Load
    server_cpu: float
    raw: float
    raw_cpu: float
    http: float

    def images(self, batch: int) -> float:
        """Images/s."""
        return self.load.rate * batch

    def of_raw(self, batch: int) -> float:
        """Images/s over those of raw ONNX Runtime."""
        return self.images(batch) / self.raw

    def of_limit(self, batch: int) -> float:
        """Requests/s over those of a service that is only bare HTTP and raw ONNX Runtime, one after the other."""
        return self.load.rate * (1 / self.http + batch / self.raw)

    def of_cpu(self) -> float:
        """The share of the server's CPU time that raw ONNX Runtime takes for the same images."""
        return self.raw_cpu * self.load.requests / self.server_cpu


def find_bundle(repository: Path, model: str) -> Bundle:
    """The newest version of that model. Ends the program, in words, where there is none."""
    found = [open_bundle(path) for path in find_bundles(repository)]
    versions = {int(bundle.manifest.version): bundle for bundle in found if bundle.manifest.name == model}
    if not versions:
        names = sorted({bundle.manifest.name for bundle in found})
        sys.exit(f"no model {model!r} in {repository}; found: {', '.join(names) or 'none'}")
    return versions[max(versions)]


def reference_pixels(bundle: Bundle, batch: int) -> np.ndarray:
    """``batch`` of the bundle's own reference images, uint8 [N,C,H,W]: real ones compress as real ones do."""
    pixels = np.rint(bundle.arrays(REFERENCE)["x"] * 255).astype(np.uint8)
    return pixels[np.arange(batch) % len(pixels)]


def make_groups(bundle: Bundle, server: Server, hello: Server, arguments: argparse.Namespace) -> list[Group]:
    """Every combination that was asked for."""
    models = {threads: RawModel(bundle, threads) for threads in {1, len(os.sched_getaffinity(0))}}
    groups = []
    for verb in arguments.verbs:
        for batch in arguments.batches:
            pixels = reference_pixels(bundle, batch)
            x = (pixels / np.float32(255)).astype(np.float32)
            work = {threads: model.verb(verb, x) for threads, model in models.items()}
            made = cases(bundle.manifest.name, verb, pixels, (server.host, server.port))
            check_answers(made)
            bare = Target(hello.host, hello.port, hello_request(0 if verb == "sample" else pixels.nbytes))
            for connections in arguments.connections:
                raw = {layout: work[layout.threads] for layout in layouts(connections)}
                groups.append(Group(verb, batch, connections, made, bare, raw))
    return groups


def warm_up(bench: Bench, progress: Callable[..., Iterable[Any]]) -> None:
    """Two requests a connection of every kind, and the best layout of raw ONNX Runtime for each group."""
    for index, group in progress(list(enumerate(bench.groups)), description="warming up"):
        for target in [group.hello, *(case.target for case in group.cases)]:
            bench.client(target, group.connections, 0)
        trials = [
            (layout, calls_per_second(work, layout.callers, bench.seconds))
            for _ in range(TRIALS)
            for layout, work in group.raw.items()
        ]
        # The best block of each: neighbours on the machine can only slow a block down.
        rates = {layout: max(rate for tried, rate in trials if tried == layout) for layout in group.raw}
        bench.layout[index] = max(rates, key=lambda layout: rates[layout])


def measure(bench: Bench, index: int, order: np.random.RandomState) -> dict[Case, Row]:
    """One block of everything in a group, shuffled."""
    group, layout = bench.groups[index], bench.layout[index]
    loads: dict[Case | None, tuple[Load, float]] = {}
    raw = raw_cpu = 0.0
    for item in order.permutation(len(group.cases) + 2):
        if item == 0:
            raw = calls_per_second(group.raw[layout], layout.callers, bench.seconds) * group.batch
            raw_cpu = cpu_per_call(group.raw[ALONE], bench.seconds)
            continue
        case = group.cases[item - 2] if item > 1 else None
        before = bench.server.cpu_seconds()
        load = bench.client(case.target if case else group.hello, group.connections, bench.seconds)
        loads[case] = load, bench.server.cpu_seconds() - before
    http = loads.pop(None)[0].rate
    return {case: Row(load, cpu, raw, raw_cpu, http) for case, (load, cpu) in loads.items() if case}


def summarise(group: Group, layout: Layout, case: Case, rows: list[Row]) -> dict[str, Any]:
    """Medians of one case over its rounds; latencies over all its requests."""
    requests = sum(row.load.requests for row in rows)
    latencies = np.concatenate([row.load.latencies for row in rows]) * 1e3
    return {
        "verb": group.verb,
        "batch": group.batch,
        "connections": group.connections,
        "request": case.format,
        "answer": case.answer,
        "of_raw": statistics.median(row.of_raw(group.batch) for row in rows),
        "of_limit": statistics.median(row.of_limit(group.batch) for row in rows),
        "of_cpu": statistics.median(row.of_cpu() for row in rows),
        "images_per_second": statistics.median(row.images(group.batch) for row in rows),
        "p50_ms": float(np.percentile(latencies, 50)),
        "p99_ms": float(np.percentile(latencies, 99)),
        "server_cpu_ms": 1e3 * sum(row.server_cpu for row in rows) / requests,
        "client_cpu_ms": 1e3 * sum(row.load.cpu for row in rows) / requests,
        "requests": requests,
        "raw_images_per_second": statistics.median(row.raw for row in rows),
        "raw_cpu_ms": 1e3 * statistics.median(row.raw_cpu for row in rows),
        "raw_layout": layout._asdict(),
        "http_requests_per_second": statistics.median(row.http for row in rows),
        "rounds": {
            "of_raw": [row.of_raw(group.batch) for row in rows],
            "of_limit": [row.of_limit(group.batch) for row in rows],
            "of_cpu": [row.of_cpu() for row in rows],
        },
    }


def run_rounds(bench: Bench, rounds: int, progress: Callable[..., Iterable[Any]]) -> list[dict[str, Any]]:
    """All rounds of all groups, summarised case by case."""
    order = np.random.RandomState(0)
    rows: dict[tuple[int, Case], list[Row]] = {}
    steps = [index for _ in range(rounds) for index in range(len(bench.groups))]
    for index in progress(steps, description="measuring"):
        for case, row in measure(bench, index, order).items():
            rows.setdefault((index, case), []).append(row)
    return [
        summarise(group, bench.layout[index], case, rows[index, case])
        for index, group in enumerate(bench.groups)
        for case in group.cases
    ]


def import_seconds() -> float:
    """Time of ``import service.app`` in a fresh interpreter, by its own clock."""
    code = "import time; t = time.perf_counter(); import service.app; print(time.perf_counter() - t)"
    return float(subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[1]))


def cold_starts(repository: Path, workers: int, count: int) -> tuple[Server, dict[str, float]]:
    """Start the service so many times, keep the last; medians of the seconds that the starts took."""
    seconds, imports = [], [import_seconds() for _ in range(count)]
    for remaining in reversed(range(count)):
        server = vae_server(repository, workers)
        seconds.append(server.seconds_to_ready)
        if remaining:
            server.stop()
    return server, {"ready_seconds": statistics.median(seconds), "import_seconds": statistics.median(imports)}


def facts(bundle: Bundle, repository: Path) -> dict[str, Any]:
    """What was measured, on what, and when."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "model": f"{bundle.manifest.name}/{bundle.manifest.version}",
        "digest": bundle.digest,
        "models_served": len(list(find_bundles(repository))),
        "default_score": bundle.manifest.scores[bundle.manifest.default_score].model_dump(include={"estimator", "k"}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start everything, measure, and give the report."""
    bundle, started = find_bundle(arguments.repository, arguments.model), time.perf_counter()
    server, starts = cold_starts(arguments.repository, arguments.workers, arguments.starts)
    spawn = multiprocessing.get_context("spawn")
    with server, hello_server(arguments.workers) as hello, ProcessPoolExecutor(1, mp_context=spawn) as pool:
        idle = server.memory()

        def client(target: Target, connections: int, seconds: float) -> Load:
            return pool.submit(drive, target, connections, seconds).result()

        bench = Bench(client, server, make_groups(bundle, server, hello, arguments), {}, arguments.seconds)
        warm_up(bench, track)
        results = run_rounds(bench, arguments.rounds, track)
        memory = {"ready_bytes": idle, "loaded_bytes": server.memory(), "peak_bytes": server.memory("VmHWM")}
    settings = {
        "workers": arguments.workers,
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "took": time.perf_counter() - started,
    }
    return {**facts(bundle, arguments.repository), **settings, "start": starts, "memory": memory, "results": results}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=Path("exported"), help="folder of bundles (exported)")
    parser.add_argument("--model", default="mnist", help="the model to measure (mnist)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of one block (0.3)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each measured thing (5)")
    parser.add_argument("--verbs", nargs="+", default=list(VERBS), choices=list(VERBS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], help="images a request (1 64)")
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 16], help="kept busy at once (1 16)")
    parser.add_argument("--workers", type=int, default=1, help="processes of the service, and of bare HTTP (1)")
    parser.add_argument("--starts", type=int, default=3, help="cold starts of the service (3)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    arguments = parser.parse_args(argv)
    for name in ("rounds", "starts", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: at least 1 expected")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = parse(argv)
    report = run(arguments)
    print_report(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
