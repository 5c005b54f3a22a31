"""Layouts of a service, processes × ONNX Runtime threads each: which come into question, and which one is chosen.

More threads make one computation shorter, more processes compute and speak HTTP side by side. Nothing is measured here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

MEMORY_SHARE = 0.75
"""Of the memory allowed that processes may take as measured: request bodies and the largest batches come on top."""
TIE = 0.05
"""Share of the best that layouts may lack to be as good: one measurement differs from the next by as much."""

DOUBTFUL_TIE = 0.4
"""The same of a brief measurement, or one beside others that took the CPUs: it knows little of what requests cost in
Python, which only processes do side by side, or met a busy moment."""
STARVED = 0.75
"""Share of the time on a CPU below which processes that always compute have been kept from it, by others."""

MiB = 2**20
MOST_PROCESSES, MOST_THREADS = 256, 1024


class Layout(BaseModel):
    """So many processes, each with so many threads to a session."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    processes: int = Field(ge=1, le=MOST_PROCESSES)
    threads: int = Field(ge=1, le=MOST_THREADS)

    def __str__(self) -> str:
        return f"{self.processes} × {self.threads}"


class Rate(BaseModel):
    """Of one workload: images a second of all processes together under load, and seconds of a request that is alone.

    ``cpu``: share of that time under load in which a process was on a CPU, of the process that was so least.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    images_per_second: float = Field(gt=0, allow_inf_nan=False)
    latency: float = Field(gt=0, allow_inf_nan=False)
    cpu: float = Field(ge=0, allow_inf_nan=False)


class Measured(BaseModel):
    """One layout's rates by workload, and the most memory that one of its processes held, in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Layout
    rates: dict[str, Rate] = Field(min_length=1)
    process_bytes: int = Field(gt=0)


class Choice(NamedTuple):
    """The layout chosen, why in words, and the share of the best of every layout that was measured."""

    layout: Layout
    why: str
    shares: dict[Layout, float]


def starved(measured: Sequence[Measured]) -> float | None:
    """The share of their time that the processes of the largest layout had a CPU, if others took more than a little."""
    largest = max(measured, key=lambda each: each.layout.processes)
    share = statistics.median(rate.cpu for rate in largest.rates.values())
    return share if share < STARVED else None


def candidates(cpus: int, most: int) -> list[Layout]:
    """Layouts that share out all ``cpus`` with at most ``most`` processes: 1, …, a quarter, half, as many as CPUs.

    >>> [str(layout) for layout in candidates(6, 6)], [str(layout) for layout in candidates(8, 3)]
    (['1 × 6', '3 × 2', '6 × 1'], ['1 × 8', '2 × 4', '3 × 2'])
    """
    counts = {1, min(cpus, most)}
    part = cpus
    while part > 1:
        counts |= {part} if part <= most else set()
        part //= 2
    return [Layout(processes=count, threads=min(cpus // count, MOST_THREADS)) for count in sorted(counts)]


def most_processes(process_bytes: int, memory: int) -> int:
    """How many processes of that size fit into ``memory`` bytes, at least 1 and at most MOST_PROCESSES."""
    return min(max(1, int(MEMORY_SHARE * memory) // process_bytes), MOST_PROCESSES)


def choose(measured: Sequence[Measured], cpus: int, memory: int, tie: float = TIE) -> Choice:
    """The layout of ``cpus`` that computes most, of those measured that fit into ``memory`` bytes.

    How much a layout computes is the geometric mean, over the workloads, of its images/s over the best layout's. Of
    those that are within ``tie`` of the best the one with the most processes is taken: what was not measured of a
    request, its sockets and their parser, runs side by side in processes only.
    """
    most = most_processes(max(each.process_bytes for each in measured), memory)
    shares = _shares(measured)
    fitting = [each.layout for each in measured if each.layout.processes <= most] or [
        min((each.layout for each in measured), key=lambda layout: layout.processes)
    ]
    best = max(shares[layout] for layout in fitting)
    alike = [layout for layout in fitting if shares[layout] >= (1 - tie) * best]
    chosen = max(alike, key=lambda layout: layout.processes)
    reasons = [_comparison(chosen, shares)]
    if len(alike) > 1:
        reasons.append(f"of what is within {tie:.0%}, more processes answer more requests side by side")
    if most < cpus:
        reasons.append(f"{memory / MiB:.0f} MiB of memory hold no more than {most}")
    return Choice(chosen, "; ".join(reasons), shares)


def _comparison(chosen: Layout, shares: Mapping[Layout, float]) -> str:
    others = ", ".join(f"{layout} {share:.2f}" for layout, share in shares.items() if layout != chosen)
    return f"{shares[chosen]:.2f} of the best images/s" + (f" ({others})" if others else "")


def _shares(measured: Sequence[Measured]) -> dict[Layout, float]:
    """Geometric mean of each layout's images/s over the best ones', by layout."""
    workloads = measured[0].rates.keys()
    best = {name: max(each.rates[name].images_per_second for each in measured) for name in workloads}
    return {each.layout: _mean(each.rates, best) for each in measured}


def _mean(rates: Mapping[str, Rate], best: Mapping[str, float]) -> float:
    logs = [math.log(rates[name].images_per_second / best[name]) for name in best]
    return math.exp(sum(logs) / len(logs))
