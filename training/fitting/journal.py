"""The log of a running training: a progress bar, history.csv and TensorBoard events."""

from __future__ import annotations

import csv
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, float]

SHOWN_EVERY = 2.0
"""Seconds after which a step shows where the loop stands, however few steps there were."""
FORETOLD_AFTER = 10.0
"""Seconds of training after which a line says how long it may take, if no epoch has ended before."""


class Journal:
    """Progress and metrics of one run. Silent on all ranks but the first.

    ``history`` is the whole list of epoch rows: history.csv is rewritten from it, so that a resumed run leaves the
    same file as one that was never interrupted. The bar is for terminals; elsewhere there are only the lines.
    """

    def __init__(self, folder: Path, total_steps: int, first_step: int, enabled: bool, console: Console | None) -> None:
        self._folder = folder
        self._enabled = enabled
        console = console or Console(stderr=True)
        self._writer: SummaryWriter | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not (enabled and console.is_terminal),
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("fit", total=total_steps, completed=first_step, status="", left="")
        self._total, self._first, self._done = total_steps, first_step, first_step
        self._started = self._shown = time.perf_counter()
        self._foretold = False

    def __enter__(self) -> Self:
        if self._enabled:
            from torch.utils.tensorboard import SummaryWriter  # heavy, and only the first rank needs it

            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(self._folder / "tensorboard"))
        self._started = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:  # at its end, if need be before the last step
            done = max(1, self._done)
            self._progress.update(self._task, total=done, completed=done, left="")
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def is_due(self, step: int) -> bool:
        """Whether to show this step: each one that asks for the sums makes a GPU wait."""
        return step % 20 == 0 or time.perf_counter() - self._shown > SHOWN_EVERY

    def step(self, step: int, elbo: float, rate: float, distortion: float, images_per_second: float) -> None:
        """Show where the loop stands; nats an image, of the samples drawn so far in this epoch."""
        terms = f"sampled elbo {elbo:.2f} rate {rate:.2f} distortion {distortion:.2f}"
        status = f"{terms} {images_per_second:,.0f} examples/s"
        self._done, self._shown = step, time.perf_counter()
        left = f"at most {_clock(self.seconds_left())} left"
        self._progress.update(self._task, completed=step, status=status, left=left)
        if self._shown - self._started > FORETOLD_AFTER:
            self._foretell()

    def seconds_left(self) -> float:
        """What the steps that are left take at the speed of those since the start, validations among them.

        It is the most: without a better bound for long enough the run ends before its last step.
        """
        taken = self._done - self._first
        return (time.perf_counter() - self._started) / max(1, taken) * (self._total - self._done)

    def _foretell(self) -> None:
        """Say once how long it may take, where it is worth a line."""
        if not self._foretold and self.seconds_left() > FORETOLD_AFTER:
            self.say(f"fit: at most {_clock(self.seconds_left())} left for {self._total - self._done:,} steps")
        self._foretold = True

    def epoch(self, history: list[Row]) -> None:
        """Record the newest row of ``history``."""
        if not self._enabled or not history:
            return
        row = history[-1]
        self.say(
            f"epoch {row['epoch']:.0f}  train elbo {row['train_elbo_sampled']:.2f} (sampled)  "
            f"validation bound {row['bound']:.3f}  rate {row['rate']:.2f}  distortion {row['distortion']:.2f}  "
            f"{row['images_per_second']:,.0f} examples/s"
            + (f"  skipped {row['skipped']:.0f}" if row["skipped"] else "")
        )
        self._done = int(row["step"])
        self._foretell()
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(name, value, int(row["step"]))
        write_history(self._folder / "history.csv", history)

    def say(self, text: str) -> None:
        """A line above the progress bar, whatever the terminal's width."""
        if self._enabled:
            self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning above the progress bar."""
        if self._enabled:
            self._progress.console.print(f"[yellow]warning:[/] {text}", highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def write_history(path: Path, history: list[Row]) -> None:
    """Write all rows, atomically."""
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    temporary.replace(path)
