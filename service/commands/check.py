"""The command ``vaeserve check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.console import ERROR, exit_on_error


def check(path: Annotated[Path, typer.Argument(help="A bundle: the folder that holds manifest.json")]) -> None:
    """Verify a bundle and say what is wrong with it, in words. The exit code is 1 if anything is."""
    from service.inference.sessions import Runtime
    from service.inference.verification import verify_bundle

    with exit_on_error():
        report = verify_bundle(path, Runtime("cpu"))
        typer.echo(str(report))
        if not report.ok:
            raise typer.Exit(ERROR)
