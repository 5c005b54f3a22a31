"""What a comparison with an older commit measures: its rows, the floor and aim of each, and the table of results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PEAK_CONNECTIONS = 64
BATCH = 64
"""Images a request of the rows of batches."""
FEW = 4
"""Connections that send batches: enough to keep two workers busy."""
P99_MS, MEMORY_MIB, START_SECONDS = 10.0, 100.0, 1.3
"""At most: p99 at half of the peak, PSS of all processes over the workers, start with the shipped bundles."""


@dataclass(frozen=True)
class Row:
    """One kind of request whose rate is compared: to ``model``, with ``images`` in ``format`` over ``connections``.

    ``floor`` and ``aim`` are of the new rate over the old; None: printed only. ``long``: how many times as long its
    blocks are, since a request of it takes as many times as long as others.
    """

    model: str
    verb: str
    format: str
    answer: str
    connections: int
    images: int = 1
    floor: float | None = None
    aim: float | None = None
    long: float = 1

    @property
    def name(self) -> str:
        """In words."""
        many = f"{self.images} images" if self.images > 1 else "1 image"
        kind = f"{self.format} → {self.answer}"
        return f"{self.model}: {self.verb}, {many}, {kind}, {self.connections} connection{'s' * (self.connections > 1)}"


def rows(model: str, with_big: bool = True) -> list[Row]:
    """All rows, with the measured model's first. The model of PPCA computes almost nothing: it has no floor."""
    octets, png, numbers = ("octet-stream", "npy"), ("png", "json"), ("json numbers", "json")
    scored = ("octet-stream", "json")
    singles = [(PEAK_CONNECTIONS, 0.50, 0.65), (16, 0.42, 0.55), (1, 0.60, 0.80)]
    found = [Row(model, "encode", *octets, connections, 1, floor, aim) for connections, floor, aim in singles]
    found += [Row(model, "encode", *kind, connections, 1, 0.55) for kind in (png, numbers) for connections in (16, 1)]
    found += [Row(model, "score", *scored, connections, 1, 0.90, 0.95, 2) for connections in (1, 16, PEAK_CONNECTIONS)]
    for connections in (FEW, 1):
        found.append(Row(model, "encode", *octets, connections, BATCH, 0.88, 0.95, 2))
        found.append(Row(model, "score", *scored, connections, BATCH, 0.88, 0.95, 2))
    if with_big:
        loads = [("encode", *octets, FEW, BATCH), ("encode", *octets, 1, 1), ("score", *scored, 1, 1)]
        found += [Row("big", *load, 0.88, 0.95, 2) for load in loads]
    if model != "ppca":
        found += [Row("ppca", "encode", *octets, connections) for connections in (PEAK_CONNECTIONS, 16, 1)]
        found += [Row("ppca", "score", *scored, connections) for connections in (PEAK_CONNECTIONS, 16, 1)]
    return found


@dataclass(frozen=True)
class Line:
    """One result: what it is of, the median of its rounds with their least and most, and what stands for the old one.

    ``old``, ``new``: both in words. ``fewer``: the floor is the most that is allowed.
    """

    name: str
    workers: int
    value: float
    least: float
    most: float
    old: str
    new: str
    floor: float | None = None
    aim: float | None = None
    fewer: bool = False
    digits: int = 2

    @property
    def verdict(self) -> str:
        """Whether the floor, and the aim, is met; nothing without a floor."""
        if self.floor is None:
            return ""
        if not self._meets(self.floor):
            return MISSED
        return "aim met" if self.aim is not None and self._meets(self.aim) else "met"

    def _meets(self, goal: float) -> bool:
        return self.value <= goal if self.fewer else self.value >= goal

    def cells(self) -> list[str]:
        """Of the table."""
        sign = "≤" if self.fewer else "≥"
        goals = ["" if goal is None else f"{sign} {self._shown(goal)}" for goal in (self.floor, self.aim)]
        span = f"{self._shown(self.value)} ({self._shown(self.least)}–{self._shown(self.most)})"
        return [self.name, str(self.workers), span, *goals, self.verdict, self.old, self.new]

    def _shown(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


MISSED = "**missed**"
COLUMNS = ("row", "workers", "median (min–max)", "floor", "aim", "", "old", "new")


def markdown(lines: Sequence[Line], facts: dict[str, Any]) -> str:
    """The table, beneath what was measured on what."""
    judged = [line for line in lines if line.floor is not None]
    missed = [line for line in judged if line.verdict == MISSED]
    text = [
        f"# {facts['new_commit']} against {facts['old_commit']}",
        "",
        f"`make bench-against BASE=<checkout of {facts['old_commit']}>`",
        "",
        f"{facts['date']}; {facts['cpu']}, {facts['cores']} cores;",
        f"{facts['rounds']} rounds of alternating blocks of {facts['seconds']:g} s or more,",
        f"{facts['took_seconds']:.0f} s in all. Rows of rates: the new rate over the old one, the median of the rounds",
        "and their least and most. Other rows: the new value, in the unit that is named.",
        f"The load generator took at most {facts['client_share']:.2f} of a CPU, the service that was idle",
        f"{facts['idle_share']:.3f}.",
        "",
        f"**{len(missed)} of {len(judged)} floors missed.**",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(line.cells()) + " |" for line in lines),
    ]
    return "\n".join(text) + "\n"
