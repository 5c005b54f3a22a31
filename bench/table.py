"""The rows of the plan: what was to be reached, and what was measured. A row that was not measured says so."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.curve import HALF
from bench.rivals.measure import OURS
from bench.rivals.peers import NAIVE

Report = dict[str, Any]
MIB = 2**20


@dataclass(frozen=True)
class Goal:
    """A row: ``measure`` finds its value in a report, None where it was not measured. ``unit`` follows a number;
    ``fewer``: less is better."""

    name: str
    floor: float
    aim: float
    measure: Callable[[Report], float | None]
    unit: str = ""
    fewer: bool = False

    def verdict(self, value: float | None) -> str:
        """In a word."""
        if value is None:
            return "not measured"
        for name, goal in (("aim", self.aim), ("floor", self.floor)):
            if value <= goal if self.fewer else value >= goal:
                return f"{name} passed"
        return "missed"

    def shown(self, value: float | None) -> str:
        """A value with its unit."""
        if value is None:
            return ""
        digits = 2 if not self.unit else 0 if self.unit == "MiB" else 1
        return f"{value:.{digits}f}{'×' if self.unit == '×' else ' ' + self.unit if self.unit else ''}"


def find(results: list[Report], **labels: Any) -> Report | None:
    """The one result with these labels, or None."""
    return next((each for each in results if labels.items() <= each.items()), None)


def share(name: str, section: str, **labels: Any) -> Callable[[Report], float | None]:
    """A number of one cell."""

    def measured(report: Report) -> float | None:
        found = find(report.get(section, []), **labels)
        return None if found is None else found[name]

    return measured


def over(one: Report | None, other: Report | None) -> float | None:
    """Rate of one result over another's that was measured in the same rounds: the median of the rounds' ratios."""
    if one is None or other is None:
        return None
    rates = [each["rounds"]["images_per_second"] for each in (one, other)]
    return statistics.median(ours / theirs for ours, theirs in zip(*rates, strict=True))


def png_over_octets(report: Report) -> float | None:
    """Requests/s with PNG over those with uint8 octets, one image, 64 connections, answered in JSON."""
    cells, same = report.get("cells", []), {"verb": "encode", "batch": 1, "connections": 64, "answer": "json"}
    return over(find(cells, request="png", **same), find(cells, request="octet-stream", **same))


def json_over_naive(report: Report) -> float | None:
    """Requests/s in JSON over those of the naive server in the same rounds."""
    naive = find(report.get("rivals", []), name=NAIVE.name) or {}
    results, same = naive.get("results", []), {"wire": "JSON", "batch": 1, "connections": 64}
    return over(find(results, server=OURS, **same), find(results, server=NAIVE.name, **same))


def p99_at_half(report: Report) -> float | None:
    """p99 in ms at half of the peak rate, open loop."""
    found = find(report.get("curve", {}).get("points", []), fraction=HALF)
    return None if found is None else found["p99_ms"]


def memory_a_worker(report: Report) -> float | None:
    """MiB: PSS of all processes of the service after the whole load, over the workers."""
    after = report.get("memory", {}).get("after")
    return None if after is None else total_pss(after) / after["workers"] / MIB


def total_pss(memory: Report) -> int:
    """Bytes of a service's first process and of all others."""
    return int(memory["first"]["pss"] + sum(process["pss"] for process in memory["others"]))


def cold_start(report: Report) -> float | None:
    """Seconds from the start of the process to ready, with the bundles that are shipped."""
    return report.get("start", {}).get("shipped", {}).get("ready_seconds")


OCTETS = {"request": "octet-stream", "answer": "npy"}
ROWS = (
    Goal("single image, uint8, 64 connections, share of L", 0.70, 0.90,
         share("of_limit", "cells", verb="encode", batch=1, connections=64, **OCTETS)),
    Goal("single image, one connection, share of the L of one connection", 0.87, 0.95,
         share("of_limit", "cells", verb="encode", batch=1, connections=1, **OCTETS)),
    Goal("batch of 64, uint8, share of raw onnxruntime", 0.95, 1.0,
         share("of_raw", "cells", verb="encode", batch=64, connections=4, **OCTETS)),
    Goal("single image, PNG, 64 connections, share of the uint8 figure", 0.65, 0.80, png_over_octets),
    Goal("JSON in and out, 64 connections, against naive FastAPI", 8, 12, json_over_naive, "×"),
    Goal("score, single image, 16 connections, share of its L", 0.70, 0.90,
         share("of_limit", "cells", verb="score", batch=1, connections=16, request="octet-stream", answer="json")),
    Goal("big model, batch of 64, share of raw onnxruntime", 0.90, 1.0,
         share("of_raw", "big", verb="encode", batch=64, connections=4, **OCTETS)),
    Goal("p99 at half of the peak rate, open loop", 10, 4, p99_at_half, "ms", fewer=True),
    Goal("memory a worker (PSS)", 120, 90, memory_a_worker, "MiB", fewer=True),
    Goal("cold start, the shipped bundles", 1.0, 0.5, cold_start, "s", fewer=True),
)  # fmt: skip


def judged(report: Report) -> list[dict[str, str]]:
    """Every row with what was measured, in words."""
    rows = []
    for goal in ROWS:
        value = goal.measure(report)
        shown = {"floor": goal.shown(goal.floor), "aim": goal.shown(goal.aim), "measured": goal.shown(value)}
        rows.append({"row": goal.name, **shown, "verdict": goal.verdict(value)})
    return rows
