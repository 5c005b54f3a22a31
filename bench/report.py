"""The tables of a benchmark: ratios first, in Markdown so that they can be pasted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
WIDTH = 160  # of the tables, also where the output is no terminal
RATIOS = (
    "Images/s of the service over raw ONNX Runtime's · over the limit that bare HTTP and it compose · "
    "raw ONNX Runtime's share of the CPU time; for c connections and n images a request"
)


def print_report(report: dict[str, Any], console: Console | None = None) -> None:
    """Print what was measured, on what, and what came out."""
    console = console or Console(width=WIDTH, highlight=False)
    for line in (*_heading(report), ""):
        console.print(line, markup=False)
    results: list[Result] = report["results"]
    loads = sorted({(result["connections"], result["batch"]) for result in results})
    console.print(RATIOS, markup=False)
    console.print(_ratios(results, loads))
    console.print("What it is compared with", markup=False)
    console.print(_references(results))
    for connections in sorted({connections for connections, _ in loads}):
        console.print(
            f"{connections} connection{'s' * (connections > 1)}: rates, latencies, CPU a request", markup=False
        )
        console.print(_details(result for result in results if result["connections"] == connections))


def _heading(report: dict[str, Any]) -> list[str]:
    memory, start, score = report["memory"], report["start"], report["default_score"]
    return [
        f"{report['model']} (score: {score['estimator']}, k={score['k']}; {report['models_served']} model(s) served), "
        f"{report['date']}",
        f"{report['cpu']}, {report['cores']} cores; {report['workers']} process(es) each; Python {report['python']}, "
        f"onnxruntime {report['onnxruntime']}",
        f"{report['rounds']} rounds of {report['seconds']:g} s a block, {report['took']:.0f} s in all",
        f"start to ready {start['ready_seconds']:.2f} s, of which import {start['import_seconds']:.2f} s; "
        f"memory {_megabytes(memory['ready_bytes'])} when ready, {_megabytes(memory['loaded_bytes'])} after the load, "
        f"{_megabytes(memory['peak_bytes'])} at most",
    ]


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _table(*columns: str, text: int) -> Table:
    """A table whose first ``text`` columns are words, the others numbers."""
    table = Table(box=box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text else "right", no_wrap=True)
    return table


def _ratios(results: list[Result], loads: list[tuple[int, int]]) -> Table:
    """A row for each kind of request, a column for each number of connections and batch."""
    cells: dict[tuple[str, str, str], dict[tuple[int, int], str]] = {}
    for result in results:
        row = cells.setdefault((result["verb"], result["request"], result["answer"]), {})
        row[result["connections"], result["batch"]] = " · ".join(
            f"{result[ratio]:.2f}" for ratio in ("of_raw", "of_limit", "of_cpu")
        )
    table = _table("verb", "request", "answer", *(f"c={c}, n={b}" for c, b in loads), text=3)
    for kind, row in cells.items():
        table.add_row(*kind, *(row.get(load, "") for load in loads))
    return table


def _references(results: list[Result]) -> Table:
    """Raw ONNX Runtime and bare HTTP, once for each verb, batch and number of connections."""
    table = _table(
        "verb",
        "connections",
        "batch",
        "raw images/s",
        "callers × threads",
        "raw CPU ms",
        "bare HTTP requests/s",
        text=1,
    )
    groups = {(result["verb"], result["connections"], result["batch"]): result for result in results}
    for (verb, connections, batch), result in groups.items():
        layout = result["raw_layout"]
        raw, http = f"{result['raw_images_per_second']:.0f}", f"{result['http_requests_per_second']:.0f}"
        callers = f"{layout['callers']} × {layout['threads']}"
        table.add_row(verb, str(connections), str(batch), raw, callers, f"{result['raw_cpu_ms']:.2f}", http)
    return table


def _details(results: Iterable[Result]) -> Table:
    numbers = ("images/s", "p50 ms", "p99 ms", "server CPU ms", "client CPU ms", "requests")
    table = _table("verb", "request", "answer", "batch", *numbers, text=3)
    for result in results:
        table.add_row(
            *(result[name] for name in ("verb", "request", "answer")),
            str(result["batch"]),
            f"{result['images_per_second']:.0f}",
            *(f"{result[name]:.2f}" for name in ("p50_ms", "p99_ms", "server_cpu_ms")),
            f"{result['client_cpu_ms']:.3f}",
            str(result["requests"]),
        )
    return table
