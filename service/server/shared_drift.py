"""Drift of the rows of all processes: workers tell ranks to one keeper, the supervisor, and ask it what the tests say.

A row is told before its request is answered, and the keeper reads what all workers have told before it answers: whoever
has read a score finds it in the next answer, whichever worker gives that. Telling never waits. Where the keeper cannot
keep up, rows are left out of the tests and counted (vaeserve_unwatched_rows_total).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np

from service.calibration.drift_monitor import Drift, Finding, Name, Place, Summary
from service.server.channel import Message, WorkerLine

MOST_WRITTEN = 512
ROWS = 2048  # of a message: two numbers of at most some 8 digits each


class ToldDrift:
    """A worker's view: tells rows, asks what the tests say. ``missed(n)`` is called for n rows that were not taken."""

    def __init__(self, line: WorkerLine, window: int, level: float, missed: Callable[[int], None]) -> None:
        self.window = window
        self.level = level
        self._line = line
        self._missed = missed

    def note(self, place: Place, above: np.ndarray, at_least: np.ndarray) -> None:
        """See DriftWatch."""
        for start in range(0, len(above), ROWS):
            part = slice(start, start + ROWS)
            rows = {"above": above[part], "at_least": at_least[part]}
            if not self._line.tell({"kind": "rows", "place": _written(place), **rows}):
                self._missed(len(above[part]))

    async def summary(self, place: Place) -> Summary:
        """See DriftWatch. Raises DeadlineExceeded too, if the keeper does not answer."""
        (answer,) = await self._line.ask({"kind": "summary", "place": _written(place)})
        return _summary(answer)

    async def summaries(self) -> list[tuple[Name, Summary]]:
        """See DriftWatch. Raises DeadlineExceeded if the keeper does not answer."""
        answers = await self._line.ask({"kind": "summaries"})
        return [(Name(*answer["name"]), _summary(answer)) for answer in answers]


class DriftKeeper:
    """The supervisor's part: takes rows, answers questions."""

    def __init__(self, window: int, level: float) -> None:
        self._drift = Drift(window, level)

    def take(self, messages: Iterable[Message]) -> None:
        """Note the rows of messages of kind "rows". Many at once: the first of a place costs as much as ten more."""
        rows: dict[Place, tuple[list[int], list[int]]] = {}
        for message in messages:
            above, at_least = rows.setdefault(_read(message["place"]), ([], []))
            above += message["above"]
            at_least += message["at_least"]
        for where, (above, at_least) in rows.items():
            self._drift.note(where, np.array(above, np.int64), np.array(at_least, np.int64))

    def answers(self, question: Message) -> Iterator[Message]:
        """What to send to who asked; the last one says that it is the last."""
        number = question["number"]
        if question["kind"] == "summary":
            seen = self._drift.seen(_read(question["place"]))
            yield {"number": number, "summary": asdict(seen.summary(self._drift.level))}
        else:
            for name, seen in self._drift:
                summary = asdict(seen.summary(self._drift.level))
                yield {"number": number, "name": list(asdict(name).values()), "summary": summary}
        yield {"number": number, "end": True}


@lru_cache(maxsize=MOST_WRITTEN)
def _written(where: Place) -> tuple[object, ...]:
    return (*asdict(where.name).values(), where.digest, where.n)


def _read(written: Sequence[Any]) -> Place:
    *name, digest, n = written
    return Place(Name(*name), digest, n)


def _summary(answer: Message) -> Summary:
    fields = answer["summary"]
    finding = fields.pop("finding")
    return Summary(**fields, finding=None if finding is None else Finding(**finding))
