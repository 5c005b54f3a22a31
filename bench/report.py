"""The tables of a benchmark, in Markdown so that they can be pasted: the plan's rows first, then ratios."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.table import find, judged, over

Report = dict[str, Any]
Result = dict[str, Any]
WIDTH = 170  # of the tables, also where the output is no terminal
LIMIT = (
    "L is the limit that bare HTTP and raw onnxruntime compose, 1 / (1 / HTTP + n / ORT) requests/s for n images a "
    "request; ORT is at its best batch and layout, for one connection with one request at a time."
)
OTHERS = (
    "\nOther servers of the same encoder, over c·n: c connections, n images a request. n=1: requests/s over L; n=64: "
    "images/s over raw onnxruntime; ours beside them, in the same rounds. Latency and CPU a request over 64·1"
)
REFERENCES = (
    "What it is compared with: images/s of raw onnxruntime in p processes × t threads, at its best batch and alone "
    "with one request's images, CPU ms an image; requests/s of bare HTTP and of both limits"
)
DEVICES = (
    "Octets in, npy out, c connections, n images a request; gpu over cpu in the same rounds; of raw: over raw "
    "onnxruntime's best on that device; apart: the largest difference between both answers, over the largest number"
)
CELLS = "requests/s over L · images/s over raw onnxruntime at its best · its share of the server's CPU time"


def print_report(report: Report, console: Console | None = None) -> None:
    """Print what came out, and on what it was measured."""
    console = console or Console(width=WIDTH, highlight=False)
    for part in _parts(report):
        if isinstance(part, Table):
            console.print(part)
        else:
            console.print(part, markup=False, soft_wrap=True)


def _parts(report: Report) -> Iterator[Table | str]:
    yield _goals(report)
    yield LIMIT
    yield from _heading(report)
    for section in ("cells", "big"):
        if results := report.get(section):
            yield f"\n{results[0]['model']}: {CELLS}; c connections, n images a request"
            yield _ratios(results)
            yield REFERENCES
            yield _references(results)
            yield "Rates, latencies, CPU a request"
            yield _details(results)
    if rivals := report.get("rivals"):
        yield OTHERS
        yield _rivals(rivals)
        yield from (f"{each['name']} left out: {each['left_out']}" for each in rivals if "left_out" in each)
    if curve := report.get("curve"):
        peak = f"{curve['peak_requests_per_second']:.0f}"
        yield f"\nOpen loop, {curve['request']}: peak of a closed loop {peak} requests/s"
        yield _curve(curve)
    if growth := report.get("growth"):
        yield "\nGrowth of cost"
        yield _growth(growth)
    if gpu := report.get("gpu"):
        yield from _gpu(gpu)


def _goals(report: Report) -> Table:
    table = _table("row", "floor", "aim", "measured", "", text=1)
    for row in judged(report):
        table.add_row(*row.values())
    return table


def _heading(report: Report) -> Iterator[str]:
    facts, settings = report["facts"], report["settings"]
    yield (
        f"{facts['date']}, commit {facts['commit']}; {facts['cpu']}, {facts['cores']} cores; Python {facts['python']}, "
        f"onnxruntime {facts['onnxruntime']}"
    )
    yield (
        f"{settings['workers']} process(es) of each server; {settings['rounds']} rounds of {settings['seconds']:g} s a "
        f"block; {report['took_seconds']:.0f} s in all"
    )
    for section, reason in report.get("failed", {}).items():
        yield f"{section} failed: {reason}"
    for name, start in report.get("start", {}).items():
        ready, imports = start["ready_seconds"], start["import_seconds"]
        yield f"cold start, {name}: {ready:.2f} s to ready, imports alone {imports:.2f} s"
    for when, memory in report.get("memory", {}).items():
        others = "".join(f", {process['name']} {_size(process)}" for process in memory["others"])
        yield f"memory {when} the load, PSS (RSS): the process that was started {_size(memory['first'])}{others}"


def _size(found: dict[str, int]) -> str:
    return f"{found['pss'] / 2**20:.0f} ({found['rss'] / 2**20:.0f}) MiB"


def _table(*columns: str, text: int) -> Table:
    """A table whose first ``text`` columns are words, the others numbers."""
    table = Table(box=box.MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text else "right", no_wrap=True)
    return table


def _ratios(results: list[Result]) -> Table:
    """A row for each kind of request, a column for each number of connections and batch."""
    loads = sorted({(result["batch"], result["connections"]) for result in results})
    kinds = dict.fromkeys((result["verb"], result["request"], result["answer"]) for result in results)
    table = _table("verb", "request", "answer", *(f"c={c}, n={n}" for n, c in loads), text=3)
    for verb, request, answer in kinds:
        labels = {"verb": verb, "request": request, "answer": answer}
        cells = [find(results, batch=batch, connections=connections, **labels) for batch, connections in loads]
        table.add_row(verb, request, answer, *(_ratio(cell) for cell in cells))
    return table


def _ratio(cell: Result | None) -> str:
    if cell is None:
        return ""
    return " · ".join(f"{cell[name]:.2f}" for name in ("of_limit", "of_raw", "of_cpu"))


def _references(results: list[Result]) -> Table:
    """Raw ONNX Runtime and bare HTTP, once for each verb, batch and number of connections."""
    best, alone = ("ORT best/s", "p × t", "batch", "ms"), ("ORT alone/s", "p × t", "ms")
    table = _table("verb", "n", "c", "HTTP/s", *best, *alone, "L of best", "L of one", text=1)
    groups = {(result["verb"], result["batch"], result["connections"]): result for result in results}
    for (verb, batch, connections), result in groups.items():
        table.add_row(
            verb, str(batch), str(connections), f"{result['http_requests_per_second']:.0f}",
            *_raw(result["raw_best"], str(result["raw_best"]["batch"])), *_raw(result["raw_one"]),
            f"{result['limit_of_best']:.0f}", f"{result['limit_of_one']:.0f}",
        )  # fmt: skip
    return table


def _raw(block: Result, *batch: str) -> tuple[str, ...]:
    return f"{block['images_per_second']:.0f}", block["layout"], *batch, f"{block['cpu_ms_an_image']:.3f}"


def _details(results: Iterable[Result]) -> Table:
    numbers = ("images/s", "p50 ms", "p99 ms", "server CPU ms", "client CPU ms", "requests")
    table = _table("verb", "request", "answer", "n", "c", *numbers, text=3)
    for result in results:
        table.add_row(
            *(result[name] for name in ("verb", "request", "answer")),
            str(result["batch"]),
            str(result["connections"]),
            f"{result['images_per_second']:.0f}",
            *(f"{result[name]:.2f}" for name in ("p50_ms", "p99_ms", "server_cpu_ms")),
            f"{result['client_cpu_ms']:.3f}",
            str(result["requests"]),
        )
    return table


def _rivals(rivals: list[Report]) -> Table:
    """A row for each server and wire; ours beside each of them, since it was measured in the same rounds."""
    loads = ("64·1", "1·1", "4·64")
    columns = (*loads, "over ours", "p50 ms", "p99 ms", "CPU ms", *(f"ours {load}" for load in loads), "CPU ms")
    table = _table("server", "version", "wire", *columns, text=3)
    for rival in rivals:
        results = rival.get("results", [])
        wires = dict.fromkeys(each["wire"] for each in results if each["server"] == rival["name"])
        for wire in wires:
            theirs, ours = (
                [find(results, server=server, wire=wire, connections=c, batch=n) for c, n in ((64, 1), (1, 1), (4, 64))]
                for server in (rival["name"], "vaeserve")
            )
            many, own = theirs[0], ours[0]
            assert many is not None
            assert own is not None
            table.add_row(
                rival["name"], rival["version"], wire, *_shares(theirs),
                f"{over(many, own):.3f}",
                *(f"{many[name]:.2f}" for name in ("p50_ms", "p99_ms", "server_cpu_ms")),
                *_shares(ours), f"{own['server_cpu_ms']:.2f}",
            )  # fmt: skip
    return table


def _shares(results: list[Result | None]) -> list[str]:
    return ["" if each is None else f"{each['of_limit' if each['batch'] == 1 else 'of_raw']:.3f}" for each in results]


def _curve(curve: Report) -> Table:
    names = ("p50_ms", "p90_ms", "p99_ms", "p99.9_ms")
    table = _table("of the peak", "offered/s", "answered/s", *names, "refused", "client late p99 ms", text=0)
    for point in curve["points"]:
        table.add_row(
            f"{point['fraction']:.2f}",
            f"{point['offered_per_second']:.0f}",
            f"{point['answered_per_second']:.0f}",
            *(f"{point[name]:.2f}" for name in names),
            str(point["refused"]),
            f"{point['client_late_p99_ms']:.2f}",
        )
    return table


def _growth(growth: list[Result]) -> Table:
    table = _table("grows", "to", "server CPU ms a request", "raw onnxruntime, CPU ms", "over raw", text=1)
    for point in growth:
        service, raw = point["server_cpu_ms"], point["raw_cpu_ms"]
        table.add_row(point["grows"], str(point["value"]), f"{service:.3f}", f"{raw:.3f}", f"{service / raw:.2f}")
    return table


def _gpu(gpu: Report) -> Iterator[Table | str]:
    if "none" in gpu:
        yield f"\nGPU: there was none, nothing was measured on one. {gpu['none']}"
        return
    yield f"\nCPU and GPU side by side ({gpu['device']}). {DEVICES}"
    yield _devices(gpu)
    table = _table(
        "raw onnxruntime", "verb", "cpu images/s", "p × t", "batch", "gpu images/s", "batch", "gpu/cpu", text=2
    )
    for each in gpu["raw"]:
        cpu, other = each["cpu"], each["gpu"]
        numbers = (f"{cpu['images_per_second']:.0f}", cpu["layout"], str(cpu["batch"]))
        others = (f"{other['images_per_second']:.0f}", str(other["batch"]), f"{each['gpu_over_cpu']:.2f}")
        table.add_row(each["model"], each["verb"], *numbers, *others)
    yield table


def _devices(gpu: Report) -> Table:
    """A row for each verb and load of a model: the service on the CPU, on the GPU, one over the other."""
    side = ("images/s", "p50 ms", "p99 ms", "of raw")
    columns = (*(f"{device} {name}" for device in ("cpu", "gpu") for name in side), "gpu/cpu", "apart")
    table = _table("model", "verb", "n", "c", *columns, text=2)
    for row in gpu["results"]:
        raw = find(gpu["raw"], model=row["model"], verb=row["cpu"]["verb"])
        assert raw is not None
        cells = [_side(row[device], raw[device]["images_per_second"]) for device in ("cpu", "gpu")]
        name, load = (row["model"], row["cpu"]["verb"]), (str(row["cpu"]["batch"]), str(row["cpu"]["connections"]))
        table.add_row(*name, *load, *cells[0], *cells[1], f"{over(row['gpu'], row['cpu']):.2f}", f"{row['apart']:.0e}")
    return table


def _side(result: Result, raw: float) -> list[str]:
    rate = result["images_per_second"]
    return [f"{rate:.0f}", f"{result['p50_ms']:.2f}", f"{result['p99_ms']:.2f}", f"{rate / raw:.2f}"]
