"""One run of everything that is asked for, and its command line."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
from rich.console import Console
from rich.progress import track

from bench.bodies import FORMATS
from bench.curve import curve
from bench.devices import side_by_side
from bench.growth import growth
from bench.load import LoadError
from bench.models import SETS, repository
from bench.report import print_report
from bench.requests import VERBS
from bench.rivals.measure import rivals
from bench.servers import Installation, ServerFailedError
from bench.serving import BIG, FULL, Selection, cells, cold_start, memory
from bench.stage import Effort, Stage, find_bundle, stage
from service.resources import available_cpus

SHIPPED = Path("exported")
SECTIONS = ("start", "cells", "rivals", "curve", "big", "growth", "gpu")
Report = dict[str, Any]


def progress(steps: list[int], name: str) -> Iterable[int]:
    """The steps, with a bar on stderr."""
    return track(steps, description=name, console=Console(stderr=True))


def facts(folder: Path, model: str) -> Report:
    """What was measured, on what, and when."""
    bundle = find_bundle(folder, model)
    return {
        "model": f"{bundle.manifest.name}/{bundle.manifest.version}",
        "digest": bundle.digest,
        "score": bundle.manifest.default_score,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": Installation().commit,
        "cpu": cpu_name(),
        "cores": available_cpus(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


def cpu_name() -> str:
    """What the kernel calls the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def run(arguments: argparse.Namespace) -> Report:
    """Everything that was asked for; every section starts what it needs, and ends it. One that fails is noted."""
    effort, wanted = Effort(arguments.seconds, arguments.rounds, arguments.workers), arguments.sections
    folder = arguments.repository or folder_of(arguments.model)
    made = {name: repository(name) for name in ("big", "growth") if name in wanted}
    report: Report = {"facts": facts(folder, arguments.model), "settings": vars(effort)}
    started = time.perf_counter()
    if "start" in wanted:
        with noted(report, "start"):
            places = {"shipped": SHIPPED, "the measured model": folder}
            report["start"] = {
                name: cold_start(place, effort.workers, arguments.starts)
                for name, place in places.items()
                if place.is_dir()
            }
    if {"cells", "rivals", "curve"} & set(wanted):
        with noted(report, "service"), stage(folder, arguments.model, effort) as here:
            of_one_model(report, here, arguments)
    if "big" in wanted:
        with noted(report, "big"), stage(made["big"], "big", effort) as big:
            report["big"] = [result for part in BIG for result in cells(big, part, progress)]
    if "growth" in wanted:
        with noted(report, "growth"):
            report["growth"] = growth(made["growth"], effort, progress)
    if "gpu" in wanted:
        with noted(report, "gpu"):
            places = {arguments.model: folder} | {name: made[name] for name in ("big",) if name in made}
            report["gpu"] = side_by_side(places, effort, progress)
    return {**report, "took_seconds": time.perf_counter() - started}


def of_one_model(report: Report, here: Stage, arguments: argparse.Namespace) -> None:
    """The sections that ask one service of one model."""
    before = memory(here)
    if "cells" in arguments.sections:
        with noted(report, "cells"):
            report["cells"] = cells(here, selection(arguments), progress)
            report["memory"] = {"before": before, "after": memory(here)}
    if "curve" in arguments.sections:
        with noted(report, "curve"):
            report["curve"] = curve(here, progress)
    if "rivals" in arguments.sections:
        with noted(report, "rivals"):
            report["rivals"] = rivals(here, progress)
    report["tried"] = {
        verb: [{**block._asdict(), "layout": str(block.layout)} for block in blocks]
        for verb, blocks in here.arena.raw.tried.items()
    }


@contextmanager
def noted(report: Report, section: str) -> Iterator[None]:
    """A server that fails, or a process that ends (EOFError), takes its section along, not what the others found."""
    try:
        yield
    except (LoadError, ServerFailedError, TimeoutError, EOFError) as error:
        report.setdefault("failed", {})[section] = f"{type(error).__name__}: {error}"


def folder_of(model: str) -> Path:
    """Where a model lies that is asked for by name: made for the benchmark, or shipped."""
    made = next((name for name, models in SETS.items() if model in models), None)
    return SHIPPED if made is None else repository(made)


def selection(arguments: argparse.Namespace) -> Selection:
    """The cells that were asked for."""
    chosen = FULL if arguments.full else Selection()
    loads = chosen.loads
    if arguments.connections or arguments.batches:
        many, images = arguments.connections or (1, 16, 64), arguments.batches or (1, 64)
        loads = [(connections, batch) for batch in images for connections in many]
    return Selection(arguments.verbs, arguments.formats or chosen.formats, loads)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the service against the machine's limit: bare HTTP and raw onnxruntime, in the same run.",
    )
    parser.add_argument("--model", default="conv", help="conv or big, made on the spot, or one in --repository (conv)")
    parser.add_argument("--repository", type=Path, help="folder of bundles (exported, but for conv and big)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure; all")
    parser.add_argument("--full", action="store_true", help="every wire format, and batches over 16 and 64 connections")
    parser.add_argument("--verbs", nargs="+", default=list(VERBS), choices=list(VERBS))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), help="wire formats of images")
    parser.add_argument("--connections", nargs="+", type=int, help="kept busy at once, in place of the selection's")
    parser.add_argument("--batches", nargs="+", type=int, help="images a request, in place of the selection's")
    parser.add_argument("--workers", type=int, default=available_cpus(), help="processes of every server (one a core)")
    parser.add_argument("--seconds", type=float, default=0.3, help="of one block (0.3)")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each measured thing (3)")
    parser.add_argument("--starts", type=int, default=3, help="cold starts (3)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--figure", type=Path, help="draw the curve to this file, a PNG")
    arguments = parser.parse_args(argv)
    for name in ("rounds", "starts", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: at least 1 expected")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # servers are ended, not left behind
    report = run(arguments)
    print_report(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.figure and "curve" in report:
        from bench.figure import draw

        draw(report["curve"], arguments.figure)


if __name__ == "__main__":
    main()
