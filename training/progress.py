"""Where a stage stands, in one line: what is done, what is left, and when it ends.

    calibrate: 12,000 of 50,000 images, 0:42 left, ends 14:03

On a terminal the line stands beside a bar; elsewhere it is written now and then, once the stage has taken a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Advance = Callable[[int], None]
"""Called with how many more are done."""

FIRST_LINE, NEXT_LINE = 5.0, 15.0
"""Seconds from a stage's start to its first line, and between two lines, where there is no terminal."""
SHOWN_EVERY = 0.1
"""Seconds between two changes of a bar: most calls only count."""


class Track(Protocol):
    """What shows the progress of a stage of ``total`` images (or what ``noun`` says), ``done`` of them before."""

    def __call__(
        self, name: str, total: int, noun: str = "images", done: int = 0
    ) -> AbstractContextManager[Advance]: ...


@contextmanager
def untracked(name: str, total: int, noun: str = "images", done: int = 0) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda more: None


@dataclass
class Pace:
    """Counts what is done of a stage, and foretells its end from the speed since the start; times in seconds."""

    total: int
    noun: str
    done: int
    started: float

    def __post_init__(self) -> None:
        self.first = self.done

    def seconds_left(self, now: float) -> float | None:
        """What the rest takes, or None before anything was done."""
        if self.done == self.first:
            return None
        return (now - self.started) / (self.done - self.first) * (self.total - self.done)

    def line(self, now: float, clock: datetime) -> str:
        """What is done, what is left and when it ends; ``clock`` is the time of day."""
        text, left = f"{self.done:,} of {self.total:,} {self.noun}", self.seconds_left(now)
        if left is None:
            return text
        end = clock + timedelta(seconds=left)
        when = f"{end:%H:%M}" if end.date() == clock.date() else f"{end:%Y-%m-%d %H:%M}"
        return f"{text}, {in_clock(left)} left, ends {when}"


def in_clock(seconds: float) -> str:
    """Minutes and seconds, m:ss, from an hour on h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


@dataclass(frozen=True)
class ConsoleTrack:
    """Tracks stages on a console: by a bar that is gone with its stage, or by lines that stay."""

    console: Console
    clock: Callable[[], float] = time.monotonic

    @contextmanager
    def __call__(self, name: str, total: int, noun: str = "images", done: int = 0) -> Iterator[Advance]:
        pace = Pace(total, noun, done, self.clock())
        if self.console.is_terminal:
            with self._bar(name, pace) as advance:
                yield advance
        else:
            yield self._lines(name, pace)

    @contextmanager
    def _bar(self, name: str, pace: Pace) -> Iterator[Advance]:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"))
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(name, total=pace.total, completed=pace.done, line=pace.line(0, datetime.now()))
            shown = pace.started

            def advance(more: int) -> None:
                nonlocal shown
                pace.done += more
                now = self.clock()
                if now - shown >= SHOWN_EVERY or pace.done == pace.total:
                    shown = now
                    progress.update(task, completed=pace.done, line=pace.line(now, datetime.now()))

            yield advance

    def _lines(self, name: str, pace: Pace) -> Advance:
        due = pace.started + FIRST_LINE

        def advance(more: int) -> None:
            nonlocal due
            pace.done += more
            now = self.clock()
            if now >= due and pace.done < pace.total:
                due = now + NEXT_LINE
                text = f"{name}: {pace.line(now, datetime.now())}"
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

        return advance
