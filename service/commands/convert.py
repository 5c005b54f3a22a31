"""The command ``vaeserve convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.console import exit_on_error
from service.errors import BundleError, ConfigurationError


def convert(
    bundles: Annotated[list[Path], typer.Argument(help="Bundles of format 3 or 4: the folders NAME/VERSION")],
    to: Annotated[
        Path | None, typer.Option(help="Folder of bundles to write to; default: the one that each bundle is in")
    ] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Replace each bundle under its own version, once the new one is verified")
    ] = False,
) -> None:
    """Rewrite bundles of formats 3 and 4 in the present format, with the same scores, bitwise.

    A new bundle keeps its name, and its version where that is free in the folder that it is written to; otherwise it
    takes the next free version. The old bundle stays as it is, unless --in-place says otherwise. Each new bundle is
    verified before it is put in its place: what fails leaves nothing behind.

    It needs the package onnx: pip install 'vaeserve[convert]'.
    """
    with exit_on_error():
        if to is not None and in_place:
            raise ConfigurationError("--to and --in-place: expected one of them, or neither")
        for folder in bundles:
            typer.echo(_converted(folder, to, in_place))


def _converted(folder: Path, to: Path | None, in_place: bool) -> str:
    """Convert one bundle, and say in a line what came of it. Raises BundleError, which names the folder."""
    try:
        from service.commands.conversion import convert_bundle
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise ConfigurationError(
            "vaeserve convert needs the package onnx, which nothing else here does: pip install 'vaeserve[convert]'"
        ) from error
    try:
        outcome = convert_bundle(folder, to, in_place)
    except BundleError as error:
        raise type(error)(f"{folder} is not converted: {error}") from error
    if outcome is None:
        return f"{folder} is of the present format already"
    version, path = outcome
    kept = "" if in_place else f"; no server takes {folder}: remove it from a folder of bundles that is served"
    return f"{path}: converted from format {version}, verified{kept}"
