"""What the commands have in common: options, exit codes, errors in one line, progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from service.errors import VaeserveError

ERROR, SOME_BAD_FILES = 1, 3
MAX_COLUMNS = 10_000  # of a table: a name that is cut to the terminal's width is no name

RepositoryOption = Annotated[
    Path | None, typer.Option(help="Folder of bundles, NAME/VERSION/ each; default: setting repository (exported)")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or auto; default: setting device (cpu)")]


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an error of the service as one line and exit with code 1; others are defects and keep their traceback."""
    try:
        yield
    except VaeserveError as error:
        typer.echo(f"vaeserve: {error}", err=True)
        raise typer.Exit(ERROR) from error


@contextmanager
def progress_bar(console: Console, total: int | None, verb: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar, and yield a function that advances it by so many rows, one by default."""
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda rows=1: progress.advance(task, rows)


def say(console: Console, line: str) -> None:
    """Print a line as it is: brackets in paths are no markup, and long paths are not wrapped."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
