"""The command ``vaeserve calibrate``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from service.commands.console import RepositoryOption, exit_on_error, progress_bar, say
from service.commands.environment import settings_with
from service.errors import ConfigurationError
from service.settings import Settings

if TYPE_CHECKING:
    from service.bundle.input_rules import InputRule
    from service.commands.calibration_data import CalibrationData
    from service.commands.recalibration import RecalibrationOutcome, RecalibrationPlan


def calibrate(
    model: Annotated[str, typer.Argument(help="Name of the model: its latest version is taken")],
    files: Annotated[list[Path], typer.Argument(help="Good images (or tables of good rows), or folders of them")],
    groups: Annotated[
        bool, typer.Option("--groups", help="A calibration for each subfolder too: score with group=SUBFOLDER")
    ] = False,
    fit_share: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of the rows that fits the scores anew; 0: keep the bundle's")
    ] = 0.3,
    trim: Annotated[
        str | None, typer.Option(help="Share of the highest scores to leave out; auto: those that look like outliers")
    ] = None,
    false_positive_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fail unless the calibration can answer this rate")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Folder of bundles to write to; default: where the model is")] = None,
    repository: RepositoryOption = None,
) -> None:
    """Write the model's next version, its verdicts calibrated on your own good images. Nothing is trained."""
    with exit_on_error():
        settings = settings_with(repository=repository)
        _calibrate(settings, model, files, groups, _plan(fit_share, trim, false_positive_rate), to)


def _plan(fit_share: float, trim: str | None, false_positive_rate: float | None) -> RecalibrationPlan:
    """Make a plan of the command's options. Raises ConfigurationError for a share that is no number."""
    from service.commands.recalibration import RecalibrationPlan

    try:
        share = trim if trim in (None, "auto") else float(trim)
    except ValueError:
        raise ConfigurationError(f"--trim is {trim!r}, expected a share such as 0.02, or auto") from None
    return RecalibrationPlan(fit_share, share, false_positive_rate)


def _calibrate(
    settings: Settings, model: str, paths: list[Path], grouped: bool, plan: RecalibrationPlan, to: Path | None
) -> None:
    """Calibrate the model on the files below ``paths``, with progress on stderr, and say what came of it."""
    from service.bundle.input_rules import ArrayPreprocessing
    from service.commands.offline_scoring import find_files
    from service.commands.recalibration import recalibrate
    from service.formats.folders import printable
    from service.repository.model_repository import load_one

    console = Console(stderr=True)
    bundle = load_one(settings, model).model.bundle
    rule = bundle.manifest.preprocessing
    files = find_files(paths, rule)
    if grouped and isinstance(rule, ArrayPreprocessing):
        raise ConfigurationError("--groups: subfolders are groups of images; a table has none")
    rows, read = _read_rows(files, rule, settings, console)
    groups = _group_names(read, paths) if grouped else None
    with progress_bar(console, None, "calibrating") as advance:
        outcome = recalibrate(bundle, rows, groups, to or settings.repository, plan, advance)
    for note in outcome.notes:
        say(console, f"note: {note}")
    for index in outcome.suspects if rule.kind == "image" else []:
        say(console, f"look at {printable(read[index])}")
    for line in _describe(outcome, rows.noun, settings.false_positive_rate):
        say(console, line)


def _read_rows(
    files: list[Path], rule: InputRule, settings: Settings, console: Console
) -> tuple[CalibrationData, list[Path]]:
    """Read the data to calibrate on, and return it with the files that hold it; say which files cannot be read."""
    from service.bundle.input_rules import ArrayPreprocessing
    from service.commands.calibration_data import ModelRows, open_whole_images
    from service.commands.offline_scoring import read_images, read_tables
    from service.formats.images import own_file_limits
    from service.pixels import unit_levels

    if isinstance(rule, ArrayPreprocessing):
        return ModelRows(read_tables(files, rule), lambda x: x), files
    limits = own_file_limits(settings.max_image_bytes, settings.max_image_pixels)
    if rule.tiling is not None:
        rows: CalibrationData
        rows, read, bad = open_whole_images(files, rule, limits)
    else:
        pixels, read, bad = read_images(files, rule, limits)
        rows = ModelRows(pixels, unit_levels, "images")
    for file in bad:
        say(console, f"skipped {file}")
    return rows, read


def _group_names(files: list[Path], roots: list[Path]) -> list[str | None]:
    """Name the group of each file, its subfolder. Raises ConfigurationError if no file lies in a subfolder."""
    from service.commands.offline_scoring import group_of
    from service.formats.folders import printable

    names = [group_of(path, roots) for path in files]
    if not any(names):
        raise ConfigurationError(
            f"--groups: no image lies in a subfolder of {', '.join(map(printable, roots))}: "
            "expected a subfolder for each group"
        )
    return names


def _describe(outcome: RecalibrationOutcome, noun: str, rate: float) -> Iterator[str]:
    """Yield lines that say what a calibration, and that of each group, rests on, and whether it can answer ``rate``."""
    from service.calibration.conformal import min_calibration_size

    def smallest_p_value(n: int) -> str:
        few = f"; too few for the default false-positive rate, {rate:g}, which needs {min_calibration_size(rate)}"
        return f"smallest p-value {1 / (n + 1):.3g}{few if n < min_calibration_size(rate) else ''}"

    n = outcome.n
    yield f"{outcome.path}: {n} {noun} calibrate, {outcome.n_fit} fitted the scores; {smallest_p_value(n)}"
    for group, n in outcome.groups.items():
        yield f"group {group}: {n} {noun}; {smallest_p_value(n)}"
    yield "a running server loads new versions when it is started again"
