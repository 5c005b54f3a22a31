"""The service of this checkout against that of an older one, in alternating blocks of one run.

    python -m bench.against --base ../older --base-python ../older/.venv-serve-cpu/bin/python

Both serve the same bundles and get the same bytes from the same load generator, one block each in turn, the first of a
round being another each time; their answers must be the same before anything is timed. Both are up all the while, so
that blocks can be short and a drift of the machine's speed hits both alike; what the idle one takes of a CPU is part of
the result. Memory is read with only one of them up, since pages that both map would count half in each.

Rates are measured once for each number of workers. With one, the load generator has another CPU for itself; with as
many as there are CPUs it shares them, as a caller on the same machine does.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.bodies import FORMATS
from bench.floors import MEMORY_MIB, P99_MS, PEAK_CONNECTIONS, START_SECONDS, Line, Row, markdown, rows
from bench.load import Load, LoadError, Target, drive
from bench.open_loop import OpenLoad, arrivals, drive_open
from bench.raw import reference_pixels
from bench.requests import ask, request
from bench.run import SHIPPED, cpu_name, folder_of, progress
from bench.servers import Installation, Server, add_base, add_service, sides, vae_server
from bench.stage import find_bundle, load_process
from bench.table import MIB, total_pss
from service.resources import available_cpus

OLD, NEW = 0, 1
STRETCH = 4  # blocks of the open loop are so many times as long as others: a p99 needs many requests
PEAK_BLOCKS = 3  # whose median is the peak
MEMORY_WORKERS = 2
Sides = tuple[Installation, Installation]
Elsewhere = Callable[..., Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """Blocks of ``seconds``, ``rounds`` of them for each row and side, and so many ``starts`` of each side."""

    seconds: float
    rounds: int
    starts: int


FULL, BRIEF = Effort(0.5, 7, 5), Effort(0.2, 3, 3)


@dataclass(frozen=True)
class Block:
    """What one side did: requests/s; CPU seconds a request, of the server and of the client; ``idle``: CPU seconds a
    second of the other server, which had nothing to do."""

    rate: float
    server_cpu: float
    client_cpu: float
    idle: float


@dataclass
class Pair:
    """Both services on one folder of bundles, the old one first, and the process of the load."""

    folder: Path
    workers: int
    servers: tuple[Server, Server]
    elsewhere: Elsewhere
    _requests: dict[Row, bytes] = field(default_factory=dict)

    def target(self, row: Row, side: int) -> Target:
        """The row's request to one of them."""
        if row not in self._requests:
            pixels = reference_pixels(find_bundle(self.folder, row.model), row.images)
            path = f"/v1/models/{row.model}/{row.verb}"
            self._requests[row] = request(path, row.answer, *FORMATS[row.format](pixels))
        return Target(self.servers[side].host, self.servers[side].port, self._requests[row])

    def block(self, row: Row, side: int, seconds: float) -> Block:
        """Keep one side busy."""
        before = [server.cpu_seconds() for server in self.servers]
        load: Load = self.elsewhere(drive, self.target(row, side), row.connections, seconds * row.long)
        spent = [server.cpu_seconds() - start for server, start in zip(self.servers, before, strict=True)]
        return Block(load.rate, spent[side] / load.requests, load.cpu / load.requests, spent[1 - side] / load.seconds)


@contextmanager
def pair(folder: Path, workers: int, installations: Sides, elsewhere: Elsewhere) -> Iterator[Pair]:
    """Start both, and end them."""
    with ExitStack() as stack:
        old, new = (stack.enter_context(vae_server(folder, workers, installation=side)) for side in installations)
        yield Pair(folder, workers, (old, new), elsewhere)


def in_turn(rounds: int, name: str) -> Iterator[int]:
    """Both sides in each round, the first being the other one each time; with a bar on stderr."""
    for index in progress([*range(rounds)], name):
        yield from (OLD, NEW) if index % 2 == 0 else (NEW, OLD)


def compare(both: Pair, chosen: Sequence[Row], effort: Effort) -> list[Result]:
    """All rounds of the rows: a line and the blocks of both sides for each. Raises LoadError."""
    for row in chosen:
        if ask(both.target(row, OLD), row.name) != ask(both.target(row, NEW), row.name):
            raise LoadError(f"{row.name}: the two services answer differently")
        for side in (OLD, NEW):
            both.block(row, side, 0)
    blocks: dict[Row, tuple[list[Block], list[Block]]] = {row: ([], []) for row in chosen}
    for index, side in enumerate(in_turn(effort.rounds * len(chosen), f"{both.folder.name}, {both.workers} worker(s)")):
        row = chosen[index // 2 % len(chosen)]
        blocks[row][side].append(both.block(row, side, effort.seconds))
    return [_compared(row, both.workers, *sides) for row, sides in blocks.items()]


def _compared(row: Row, workers: int, old: list[Block], new: list[Block]) -> Result:
    ratios = [ours.rate / theirs.rate for ours, theirs in zip(new, old, strict=True)]
    words = [
        f"{statistics.median(block.rate for block in side):.0f}/s, "
        f"{1e3 * statistics.median(block.server_cpu for block in side):.2f} ms CPU"
        for side in (old, new)
    ]
    line = Line(row.name, workers, *_span(ratios), *words, floor=row.floor, aim=row.aim)
    return {"line": line, "old": list(map(asdict, old)), "new": list(map(asdict, new))}


def _span(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def p99_at_half(both: Pair, row: Row, effort: Effort) -> Result:
    """p99 in an open loop at half of each side's own peak, over PEAK_CONNECTIONS connections at most."""
    peaks = [
        statistics.median(both.block(row, side, effort.seconds).rate for _ in range(PEAK_BLOCKS)) for side in (OLD, NEW)
    ]
    p99: tuple[list[float], list[float]] = ([], [])
    late = []
    for index, side in enumerate(in_turn(effort.rounds, f"open loop, {both.workers} worker(s)")):
        moments = arrivals(peaks[side] / 2, STRETCH * effort.seconds, seed=index // 2)
        load: OpenLoad = both.elsewhere(drive_open, both.target(row, side), PEAK_CONNECTIONS, moments.tolist())
        p99[side].append(1e3 * float(np.percentile(load.latencies or [np.nan], 99)))
        late.append(1e3 * load.late)
    words = [f"{statistics.median(p99[side]):.1f} ms at {peaks[side] / 2:.0f}/s" for side in (OLD, NEW)]
    name = f"{row.model}: p99 of {row.verb} at half of the peak, open loop, ms"
    line = Line(name, both.workers, *_span(p99[NEW]), *words, floor=P99_MS, fewer=True)
    return {"line": line, "old": p99[OLD], "new": p99[NEW], "client_late_p99_ms": late}


def memory(
    installations: Sides, folder: Path, chosen: Sequence[Row], elsewhere: Elsewhere, seconds: float
) -> list[Result]:
    """PSS after a load of the rows: of all processes over the workers, and of the largest process."""
    found = []
    for side in installations:
        with vae_server(folder, MEMORY_WORKERS, installation=side) as server:
            both = Pair(folder, MEMORY_WORKERS, (server, server), elsewhere)
            for row in chosen:
                both.block(row, NEW, seconds)
            found.append(server.memory())
    largest = [max(process["pss"] for process in (each["first"], *each["others"])) / MIB for each in found]
    of_all = [total_pss(each) / MEMORY_WORKERS / MIB for each in found]
    names = ("memory a worker: PSS of all processes over the workers, MiB", "PSS of the largest process, MiB")
    return [
        {"line": _size(names[0], of_all, MEMORY_MIB), "old": found[OLD], "new": found[NEW]},
        {"line": _size(names[1], largest, None), "old": largest[OLD], "new": largest[NEW]},
    ]


def _size(name: str, sizes: list[float], floor: float | None) -> Line:
    words = [f"{size:.0f} MiB" for size in sizes]
    return Line(name, MEMORY_WORKERS, *_span(sizes[NEW:]), *words, floor=floor, fewer=True, digits=0)


def starts(installations: Sides, folder: Path, workers: int, count: int) -> Result:
    """Seconds from the start of the process to the first 200 of /readyz."""
    found: tuple[list[float], list[float]] = ([], [])
    for side in in_turn(count, f"starts, {workers} worker(s)"):
        with vae_server(folder, workers, installation=installations[side]) as server:
            found[side].append(server.seconds_to_ready)
    words = [f"{statistics.median(seconds):.2f} s" for seconds in found]
    name = f"start to ready, bundles of {folder.name}/, s"
    line = Line(name, workers, *_span(found[NEW]), *words, floor=START_SECONDS, fewer=True)
    return {"line": line, "old": found[OLD], "new": found[NEW]}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything: ``rates``, ``p99``, ``memory`` and ``starts`` hold results, each with its Line."""
    effort, started = arguments.effort, time.perf_counter()
    both = sides(arguments)
    for side in both:
        side.compile()
    chosen = [row for row in rows(arguments.model, arguments.big) if arguments.only in row.name]
    folders = {row.model: arguments.repository or folder_of(row.model) for row in chosen}
    shipped, light = arguments.repository or SHIPPED, rows(arguments.model if arguments.repository else "mnist", False)
    report: dict[str, Any] = {"rates": [], "p99": [], "memory": [], "starts": []}
    with load_process() as elsewhere:
        for workers in arguments.workers:
            for folder in dict.fromkeys(folders.values()):
                with pair(folder, workers, both, elsewhere) as here:
                    report["rates"] += compare(here, [row for row in chosen if folders[row.model] == folder], effort)
                    if folder == folders[chosen[0].model] and not arguments.only:
                        report["p99"].append(p99_at_half(here, chosen[0], effort))
        if not arguments.only:
            report["memory"] = memory(both, shipped, light, elsewhere, effort.seconds)
            report["starts"] = [starts(both, shipped, workers, effort.starts) for workers in arguments.workers]
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "old_commit": both[OLD].commit,
        "new_commit": both[NEW].commit,
        "cpu": cpu_name(),
        "cores": available_cpus(),
        **asdict(effort),
        "took_seconds": time.perf_counter() - started,
        **_shares(report["rates"]),
    }
    return {"facts": facts, **report}


def _shares(rates: list[Result]) -> dict[str, float]:
    """Of one CPU: what the load generator took where it took most, and the server that had nothing to do."""
    blocks = [block for result in rates for side in ("old", "new") for block in result[side]]
    return {
        "client_share": max(block["client_cpu"] * block["rate"] for block in blocks),
        "idle_share": statistics.median(block["idle"] for block in blocks),
    }


def lines(report: dict[str, Any]) -> list[Line]:
    """Of all results, in their order."""
    return [result["line"] for part in ("rates", "p99", "memory", "starts") for result in report[part]]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=__doc__.partition("\n")[0])
    add_base(parser)
    add_service(parser)
    parser.add_argument("--model", default="mnist", help="whose rows are measured: mnist, conv … (mnist)")
    parser.add_argument("--repository", type=Path, help="folder of all bundles (exported, but for conv and big)")
    parser.add_argument(
        "--workers", nargs="+", type=int, help="numbers of workers (1 and one a CPU; one a CPU if brief)"
    )
    parser.add_argument("--only", default="", help="rates of the rows whose name holds this text, and nothing else")
    parser.add_argument("--seconds", type=float, help=f"of one block ({FULL.seconds}; {BRIEF.seconds} if brief)")
    parser.add_argument("--rounds", type=int, help=f"blocks of each row and side ({FULL.rounds}; {BRIEF.rounds})")
    parser.add_argument("--starts", type=int, help=f"of each side ({FULL.starts}; {BRIEF.starts})")
    parser.add_argument("--brief", action="store_true", help="a rough look within two minutes, without the big model")
    parser.add_argument("--to", type=Path, help="folder for against-COMMIT-DATE.json and .md; else only printed")
    arguments = parser.parse_args(argv)
    if not any(arguments.only in row.name for row in rows(arguments.model)):
        parser.error(f"--only {arguments.only}: no row has it in its name")
    arguments.big = not arguments.brief and arguments.repository is None
    if arguments.workers is None:
        cpus = available_cpus()
        arguments.workers = [cpus] if arguments.brief else sorted({1, cpus})
    effort = asdict(BRIEF if arguments.brief else FULL)
    given = {name: getattr(arguments, name) for name in effort if getattr(arguments, name) is not None}
    arguments.effort = Effort(**effort | given)
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write."""
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # servers are ended, not left behind
    report = run(arguments)
    table = markdown(lines(report), report["facts"])
    print(table)
    if arguments.to is not None:
        arguments.to.mkdir(parents=True, exist_ok=True)
        facts = report["facts"]
        path = arguments.to / f"against-{facts['old_commit'].rstrip('+')}-{facts['date'][:10]}"
        path.with_suffix(".md").write_text(table)
        path.with_suffix(".json").write_text(json.dumps(report, indent=1, default=asdict) + "\n")


if __name__ == "__main__":
    main()
