"""The command ``vaeserve score``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from service.commands.console import SOME_BAD_FILES, DeviceOption, RepositoryOption, exit_on_error, progress_bar, say
from service.commands.environment import settings_with, validated
from service.errors import ConfigurationError
from service.settings import Settings

if TYPE_CHECKING:
    from service.repository.score_parameters import ScoreParameters


def score(
    files: Annotated[
        list[Path], typer.Argument(help="Images, or tables (.csv, .npy) of vectors or signals; or folders of them")
    ],
    out: Annotated[Path | None, typer.Option(help="Write .csv, .jsonl or .parquet; default: CSV on the screen")] = None,
    model: Annotated[str | None, typer.Option(help="Model to score with; default: the default model")] = None,
    false_positive_rate: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of inliers that may be called anomalous")
    ] = None,
    score: Annotated[str | None, typer.Option(help="One of the bundle's scores; default: its default score")] = None,
    estimator: Annotated[
        str | None, typer.Option(help="elbo, iwae or reconstruction, instead of the score's own")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Posterior samples a row, instead of the score's own")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random number, instead of the score's own")] = None,
    also: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Further scores, commas between, or all: columns NAME_score …"),
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="NAME", help="Compare with this group of the calibration images only")
    ] = None,
    maps: Annotated[
        Path | None, typer.Option(help="Folder for pictures that show where each image is anomalous, as PNG")
    ] = None,
    map_kind: Annotated[
        str | None, typer.Option(help="anomaly (default, where the bundle has it), distortion or corruption")
    ] = None,
    map_picture: Annotated[str | None, typer.Option(help="heat-map (default) or overlay, over the image")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Skip images of another size, do not resize them")] = False,
    repository: RepositoryOption = None,
    device: DeviceOption = None,
) -> None:
    """Score images or tables offline, exactly as the service would. Exit code 3 if some files could not be read."""
    from service.repository.score_parameters import ScoreParameters

    options: dict[str, object] = {"score": score, "estimator": estimator, "k": k, "seed": seed, "strict": strict}
    options |= {"also": also, "group": group, "false_positive_rate": false_positive_rate}
    options |= {"map": maps is not None, "map_kind": map_kind, "map_picture": map_picture}
    with exit_on_error():
        parameters = validated(lambda: ScoreParameters.model_validate(options))
        settings = settings_with(repository=repository, device=device)
        if maps is None and (map_kind or map_picture):
            raise ConfigurationError("--map-kind and --map-picture are of --maps FOLDER, which is not given")
        bad = _score(settings, files, out, model, parameters, maps)
    if bad:
        raise typer.Exit(SOME_BAD_FILES)


def _score(
    settings: Settings,
    paths: list[Path],
    out: Path | None,
    model: str | None,
    parameters: ScoreParameters,
    maps: Path | None,
) -> int:
    """Score the files and write the results, with progress on stderr; return how many files could not be read."""
    from service.commands.offline_scoring import BadFile, fields_of, find_files, open_sink, plan_pictures, score_files
    from service.formats.images import own_file_limits
    from service.logs import configure_logs
    from service.repository.model_repository import load_one
    from service.repository.resolving import further_scores, missing_verdicts

    configure_logs("warning", "console")
    console, scored, bad = Console(stderr=True), 0, 0
    served = load_one(settings, model)
    rule = served.manifest.preprocessing
    files = find_files(paths, rule)
    if maps is not None and rule.kind != "image":
        raise ConfigurationError(f"--maps: {served.manifest.name} is a model of {rule.kind}s, which are no pictures")
    pictures = None if maps is None else plan_pictures(files, paths, maps)
    reasons = missing_verdicts(served, parameters, settings.false_positive_rate)
    fields = fields_of(rule, further_scores(served.manifest, parameters))
    total = len(files) if rule.kind == "image" else None  # a table's rows are not known before it is read
    with open_sink(out, sys.stdout, fields) as write, progress_bar(console, total, "scoring") as advance:
        limits = own_file_limits(settings.max_image_bytes, settings.max_image_pixels)
        for row in score_files(served, files, parameters, settings.false_positive_rate, limits, pictures):
            if isinstance(row, BadFile):
                bad += 1
                say(console, f"skipped {row}")
            else:
                scored += 1
                write(row)
            advance()
    console.print(f"{scored} scored, {bad} skipped", highlight=False)
    for reason in reasons if scored else []:
        say(console, f"note: {reason}")
    return bad
