"""What a run says while it runs: a progress bar, history.csv and TensorBoard events."""

from __future__ import annotations

import csv
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Row = dict[str, float]


class Journal:
    """Progress and metrics of one run. Silent on all ranks but the first.

    ``history`` is the whole list of epoch rows: history.csv is rewritten from it, so that a resumed run leaves the
    same file as one that was never interrupted.
    """

    def __init__(self, folder: Path, total_steps: int, first_step: int, enabled: bool, console: Console | None) -> None:
        self._folder = folder
        self._enabled = enabled
        self._writer: SummaryWriter | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            disable=not enabled,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("fit", total=total_steps, completed=first_step, status="")

    def __enter__(self) -> Self:
        if self._enabled:
            from torch.utils.tensorboard import SummaryWriter  # heavy, and only the first rank needs it

            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(self._folder / "tensorboard"))
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def step(self, step: int, elbo: float, rate: float, distortion: float, images_per_second: float) -> None:
        """Show where the loop stands; nats an image."""
        status = f"elbo {elbo:.2f} rate {rate:.2f} distortion {distortion:.2f} {images_per_second:,.0f} examples/s"
        self._progress.update(self._task, completed=step, status=status)

    def epoch(self, history: list[Row]) -> None:
        """Record the newest row of ``history``."""
        if not self._enabled or not history:
            return
        row = history[-1]
        self._progress.console.print(
            f"epoch {row['epoch']:.0f}  train elbo {row['train_elbo']:.2f}  validation bound {row['bound']:.3f}  "
            f"rate {row['rate']:.2f}  distortion {row['distortion']:.2f}  {row['images_per_second']:,.0f} examples/s"
            + (f"  skipped {row['skipped']:.0f}" if row["skipped"] else ""),
            highlight=False,
        )
        if self._writer is not None:
            for name, value in row.items():
                self._writer.add_scalar(name, value, int(row["step"]))
        write_history(self._folder / "history.csv", history)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self._enabled:
            self._progress.console.print(text, highlight=False)

    def warn(self, text: str) -> None:
        """Print a warning above the progress bar."""
        if self._enabled:
            self._progress.console.print(f"[yellow]warning:[/] {text}", highlight=False)


def write_history(path: Path, history: list[Row]) -> None:
    """Write all rows, atomically."""
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    temporary.replace(path)
