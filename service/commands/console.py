"""What the commands have in common: options, exit codes, errors in one line, bars of progress."""

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
UNCUT = 10_000  # columns: a name cut to the terminal's width is no name

RepositoryOption = Annotated[
    Path | None, typer.Option(help="Folder of bundles, NAME/VERSION/ each; default: setting repository (exported)")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or auto; default: setting device (cpu)")]


@contextmanager
def errors_in_words() -> Iterator[None]:
    """Print a domain error as one line and exit 1; anything else is a defect and keeps its traceback."""
    try:
        yield
    except VaeserveError as error:
        typer.echo(f"vaeserve: {error}", err=True)
        raise typer.Exit(ERROR) from error


@contextmanager
def progress_bar(console: Console, total: int | None, verb: str) -> Iterator[Callable[..., None]]:
    """Show a bar while the body runs; the function that is yielded moves it by so many rows, one by default."""
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda rows=1: progress.advance(task, rows)


def say(console: Console, line: str) -> None:
    """Print a line as it is: paths hold brackets, and are not to be broken."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
