"""Servers side by side: blocks of each, of bare HTTP and of raw ONNX Runtime, in a shuffled order, round by round.

A ratio is taken within its round, and its median over the rounds is the result, so that a drift of the machine's speed
hits both sides.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.crew import Block, RawRuntime
from bench.limit import Yardstick
from bench.load import Load, Target
from bench.servers import Server

OFTEN = 3
"""Rounds of what a row of the plan (bench.table) rests on, for each one of the rest."""
Client = Callable[[Target, int, float], Load]
Progress = Callable[[list[int], str], Iterable[int]]
Result = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """One kind of request to one server; ``labels`` say which in the result."""

    labels: Mapping[str, Any]
    target: Target
    server: Server


@dataclass(frozen=True)
class Group:
    """What is compared: subjects that answer one verb on ``batch`` images over so many connections.

    ``often``: how many rounds it has for each one of the arena's; ``long``: how many times as long its blocks are.
    """

    verb: str
    batch: int
    connections: int
    subjects: list[Subject]
    hello: Target
    often: int = 1
    long: float = 1


@dataclass(frozen=True)
class Row:
    """One block of a subject: its load, the server's CPU seconds, and what stood beside it in the round."""

    load: Load
    server_cpu: float
    beside: Yardstick

    @property
    def images_per_second(self) -> float:
        """Images/s."""
        return self.load.rate * self.beside.batch

    @property
    def of_raw(self) -> float:
        """Images/s over those of raw ONNX Runtime at its best."""
        return self.images_per_second / self.beside.best.images_per_second

    @property
    def of_limit(self) -> float:
        """Requests/s over the limit (bench.limit) of so many connections."""
        return self.load.rate / self.beside.limit

    @property
    def of_cpu(self) -> float:
        """The share of the server's CPU time that raw ONNX Runtime takes for the same images."""
        return self.beside.raw_cpu * self.load.requests / self.server_cpu


@dataclass
class Arena:
    """How blocks are run: the load's process, raw ONNX Runtime on the same graphs, and how long a block takes."""

    client: Client
    raw: RawRuntime
    seconds: float
    rounds: int
    order: np.random.RandomState = field(default_factory=lambda: np.random.RandomState(0))

    def measure(self, groups: list[Group], progress: Progress) -> list[Result]:
        """All rounds of all groups, summarised subject by subject."""
        for index in progress(list(range(len(groups))), "warming up"):
            self._warm_up(groups[index])
        rows: dict[tuple[int, int], list[Row]] = {}
        most = max((group.often for group in groups), default=1)
        turns = range(self.rounds * most)
        steps = [index for turn in turns for index, group in enumerate(groups) if turn % most < group.often]
        for index in progress(steps, "measuring"):
            for subject, row in enumerate(self._round(groups[index])):
                rows.setdefault((index, subject), []).append(row)
        return [
            summarise(group, subject, rows[index, place])
            for index, group in enumerate(groups)
            for place, subject in enumerate(group.subjects)
        ]

    def _warm_up(self, group: Group) -> None:
        """Two requests a connection of every kind, and the best of raw ONNX Runtime."""
        for target in [group.hello, *(subject.target for subject in group.subjects)]:
            self.client(target, group.connections, 0)
        self.raw.best(group.verb, self.seconds)
        self.raw.one(group.verb, group.batch, 0)

    def _round(self, group: Group) -> list[Row]:
        """One block of everything in a group, shuffled; a row for each subject."""
        loads: dict[int, tuple[Load, float]] = {}
        http, best, one, seconds = 0.0, None, None, self.seconds * group.long
        for item in self.order.permutation(len(group.subjects) + 3) - 3:
            if item == -3:
                best = self.raw.best(group.verb, seconds)
            elif item == -2:
                one = self.raw.one(group.verb, group.batch, seconds)
            elif item == -1:
                http = self.client(group.hello, group.connections, seconds).rate
            else:
                subject = group.subjects[item]
                before = subject.server.cpu_seconds()
                load = self.client(subject.target, group.connections, seconds)
                loads[item] = load, subject.server.cpu_seconds() - before
        assert best is not None
        assert one is not None
        beside = Yardstick(http, best, one, group.batch, group.connections)
        return [Row(*loads[place], beside) for place in range(len(group.subjects))]


def summarise(group: Group, subject: Subject, rows: list[Row]) -> Result:
    """Medians of one subject over its rounds; latencies over all its requests."""
    requests = sum(row.load.requests for row in rows)
    latencies = np.concatenate([row.load.latencies for row in rows]) * 1e3

    def median(value: Callable[[Row], float]) -> float:
        return statistics.median(map(value, rows))

    return {
        **subject.labels,
        "verb": group.verb,
        "batch": group.batch,
        "connections": group.connections,
        "of_limit": median(lambda row: row.of_limit),
        "of_raw": median(lambda row: row.of_raw),
        "of_cpu": median(lambda row: row.of_cpu),
        "images_per_second": median(lambda row: row.images_per_second),
        "p50_ms": float(np.percentile(latencies, 50)),
        "p99_ms": float(np.percentile(latencies, 99)),
        "server_cpu_ms": 1e3 * sum(row.server_cpu for row in rows) / requests,
        "client_cpu_ms": 1e3 * sum(row.load.cpu for row in rows) / requests,
        "requests": requests,
        "http_requests_per_second": median(lambda row: row.beside.http),
        "raw_best": _block([row.beside.best for row in rows]),
        "raw_one": _block([row.beside.one for row in rows]),
        "limit_of_best": median(lambda row: row.beside.of_best),
        "limit_of_one": median(lambda row: row.beside.of_one),
        "rounds": {
            name: [getattr(row, name) for row in rows] for name in ("of_limit", "of_raw", "of_cpu", "images_per_second")
        },
    }


def _block(blocks: list[Block]) -> Result:
    return {
        "images_per_second": statistics.median(block.images_per_second for block in blocks),
        "cpu_ms_an_image": 1e3 * statistics.median(block.cpu_per_image for block in blocks),
        "layout": str(statistics.mode(block.layout for block in blocks)),
        "batch": blocks[0].batch,
    }
