"""The command line: ``vaeserve serve | score | calibrate | check | models | convert``, each in a file of its own."""

from __future__ import annotations

import typer

from service.commands.calibrate import calibrate
from service.commands.check import check
from service.commands.console import exit_on_error
from service.commands.convert import convert
from service.commands.environment import REMOVED
from service.commands.models import models
from service.commands.score import score
from service.commands.serve import serve
from service.errors import ConfigurationError

ANY_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Serve latent variable models: latents, samples and calibrated anomaly scores.",
)


@app.command(hidden=True, context_settings=ANY_ARGUMENTS)
def autotune() -> None:
    """Refuse this command, which was removed, and name what replaces it."""
    with exit_on_error():
        raise ConfigurationError(f"the command autotune is no more: vaeserve serve {REMOVED['autotune_file']}")


app.command(
    context_settings=ANY_ARGUMENTS,
    help="Serve the bundles of a folder over HTTP (vaeserve serve --help lists every setting).",
)(serve)
for command in (models, check, score, calibrate, convert):
    app.command()(command)
