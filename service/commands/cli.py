"""The command line: ``vaeserve serve | score | calibrate | check | models | autotune``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from pydantic import ValidationError
from pydantic_settings import CliApp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.commands.environment import GivenSettings, check_environment
from service.errors import ConfigurationError, VaeserveError
from service.imports import import_fastapi
from service.settings import Settings

if TYPE_CHECKING:
    from service.commands.recalibration import RecalibrationOutcome, RecalibrationPlan
    from service.repository.score_parameters import ScoreParameters
    from service.server.forker import Started

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Serve latent variable models: latents, samples and calibrated anomaly scores.",
)

T = TypeVar("T")

ERROR, SOME_BAD_FILES = 1, 3
UNCUT = 10_000  # columns: a name cut to the terminal's width is no name

RepositoryOption = Annotated[
    Path | None, typer.Option(help="Folder of bundles, NAME/VERSION/ each; default: setting repository (exported)")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or auto; default: setting device (cpu)")]


def main(nursery: Started | None = None) -> None:
    """Run the command line; a ``nursery`` that has been started already is for ``serve``, or ends."""
    try:
        app(obj=nursery)
    finally:
        if nursery is not None:
            nursery.end()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Serve the bundles of a folder over HTTP (vaeserve serve --help lists every setting).",
)
def serve(context: typer.Context) -> None:
    """Read settings from flags and environment, load every bundle, serve until told to stop."""
    with _errors_in_words():
        settings = _with_workers(read_settings(context.args)).for_each_worker()
        nursery: Started | None = context.obj
        if settings.workers == 1:
            if nursery is not None:
                nursery.end()
            _serve_alone(settings)
            return
        from service.server.supervisor import serve_with_workers

        if code := serve_with_workers(settings, nursery):
            raise typer.Exit(code)


def _with_workers(settings: Settings) -> Settings:
    if settings.workers != "auto":
        return settings
    from service.logs import configure_logs
    from service.server.auto import decide

    configure_logs(settings.log_level, settings.log_format)
    return decide(settings)


def _serve_alone(settings: Settings) -> None:
    import_fastapi()
    from service.api.app import create_app
    from service.logs import configure_logs, get_logger
    from service.repository.model_repository import load_repository
    from service.server.draining import build_server, spare_collections

    configure_logs(settings.log_level, settings.log_format)
    server = build_server(create_app(settings, load_repository(settings)), settings)
    get_logger().info("starting", host=settings.host, port=settings.port, device=settings.device)
    spare_collections()
    try:
        server.run()
    except KeyboardInterrupt:
        return
    if not server.started:
        raise typer.Exit(ERROR)


@app.command()
def autotune(
    model: Annotated[str | None, typer.Option(help="Compute with this model only; default: with each one")] = None,
    seconds: Annotated[
        float, typer.Option(min=0.01, max=3600, help="To measure each layout, beside the time to load the bundles")
    ] = 5.0,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; default: setting autotune_file, or autotune.json in the repository"),
    ] = None,
    repository: RepositoryOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure how many processes and threads serve best on this machine, for vaeserve serve --workers auto."""
    from service.server import autotune as tuning
    from service.server.tuned import place, write_tuned

    with _errors_in_words():
        settings = _settings(repository=repository, device=device, autotune_file=output)
        file, screen = place(settings), Console(width=UNCUT)
        with Console(stderr=True).status("measuring") as status:
            tuned = tuning.autotune(settings, model, seconds, lambda layout: status.update(f"measuring {layout}"))
        screen.print(tuning.table_of(tuned))
        typer.echo(f"chosen: {tuned.choice} (processes × threads of each), {tuned.why}")
        try:
            write_tuned(tuned, file)
            typer.echo(f"written to {file}: vaeserve serve --workers auto takes it")
        except OSError as error:
            reason = f"{file} cannot be written: {error.strerror}"
            if output is not None:
                raise ConfigurationError(reason) from error
            typer.echo(f"not written: {reason}; give --output, and the setting autotune_file to serve")


@app.command()
def models(repository: RepositoryOption = None) -> None:
    """List the bundles of a folder."""
    from service.bundle.files import find_bundles, open_bundle

    with _errors_in_words():
        root = _settings(repository=repository).repository
        table = Table("model", "version", "family", "shape", "latents", "score", "calibration", "digest")
        for path in sorted(find_bundles(root)):
            bundle = open_bundle(path)
            manifest = bundle.manifest
            table.add_row(
                manifest.name,
                manifest.version,
                manifest.family,
                "×".join(map(str, manifest.preprocessing.natural)),
                str(manifest.signature.latent_dim),
                manifest.default_score,
                str(manifest.calibration.n) if manifest.calibration else "none",
                bundle.digest[:12],
            )
        if not table.row_count:
            raise ConfigurationError(f"no bundle under {root}: expected NAME/VERSION/manifest.json")
        Console(width=UNCUT).print(table)


@app.command()
def check(path: Annotated[Path, typer.Argument(help="A bundle: the folder that holds manifest.json")]) -> None:
    """Verify a bundle and say what is wrong with it, in words. Exit code 1 if anything is."""
    from service.inference.sessions import Runtime
    from service.inference.verification import verify_bundle

    with _errors_in_words():
        report = verify_bundle(path, Runtime("cpu"))
        typer.echo(str(report))
        if not report.ok:
            raise typer.Exit(ERROR)


@app.command()
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

    parameters = {"score": score, "estimator": estimator, "k": k, "seed": seed, "strict": strict}
    parameters |= {"also": also, "group": group}
    parameters |= {"map": maps is not None, "map_kind": map_kind, "map_picture": map_picture}
    with _errors_in_words():
        asked = _in_words(lambda: ScoreParameters(false_positive_rate=false_positive_rate, **parameters))  # type: ignore[arg-type]
        settings = _settings(repository=repository, device=device)
        if maps is None and (map_kind or map_picture):
            raise ConfigurationError("--map-kind and --map-picture are of --maps FOLDER, which is not given")
        bad = _score(settings, files, out, model, asked, maps)
    if bad:
        raise typer.Exit(SOME_BAD_FILES)


@app.command()
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
    with _errors_in_words():
        settings = _settings(repository=repository)
        _calibrate(settings, model, files, groups, _plan(fit_share, trim, false_positive_rate), to)


def _plan(fit_share: float, trim: str | None, false_positive_rate: float | None) -> RecalibrationPlan:
    from service.commands.recalibration import RecalibrationPlan

    try:
        share = trim if trim in (None, "auto") else float(trim)
    except ValueError:
        raise ConfigurationError(f"--trim is {trim!r}, expected a share such as 0.02, or auto") from None
    return RecalibrationPlan(fit_share, share, false_positive_rate)


def _calibrate(
    settings: Settings, model: str, paths: list[Path], grouped: bool, plan: RecalibrationPlan, to: Path | None
) -> None:
    from service.bundle.input_rules import ArrayPreprocessing
    from service.commands.calibration_data import CalibrationData, ModelRows, open_whole_images
    from service.commands.offline_scoring import find_files, group_of, read_images, read_tables
    from service.commands.recalibration import recalibrate
    from service.formats.images import ImageLimits
    from service.pixels import unit_levels
    from service.repository.model_repository import load_one

    console = Console(stderr=True)
    bundle = load_one(settings, model).model.bundle
    rule = bundle.manifest.preprocessing
    files, names = find_files(paths, rule), None
    if isinstance(rule, ArrayPreprocessing):
        if grouped:
            raise ConfigurationError("--groups: subfolders are groups of images; a table has none")
        rows: CalibrationData = ModelRows(read_tables(files, rule), lambda x: x)
        read = files
    else:
        limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
        if rule.tiling is not None:
            rows, read, bad = open_whole_images(files, rule, limits)
        else:
            pixels, read, bad = read_images(files, rule, limits)
            rows = ModelRows(pixels, unit_levels, "images")
        for file in bad:
            console.print(f"skipped {file.path}: {file.reason}", markup=False, highlight=False, soft_wrap=True)
        names = [group_of(path, paths) for path in read] if grouped else None
        if names is not None and not any(names):
            raise ConfigurationError(
                f"--groups: no image lies in a subfolder of {', '.join(map(str, paths))}: expected a subfolder for "
                "each group"
            )
    with _progress(console, None, "calibrating") as advance:
        done = recalibrate(bundle, rows, names, to or settings.repository, plan, advance)
    for note in done.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    for index in done.suspects if names is not None or not isinstance(rule, ArrayPreprocessing) else []:
        console.print(f"look at {read[index]}", markup=False, highlight=False, soft_wrap=True)
    for line in _calibrated(done, rows.noun, settings.false_positive_rate):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _calibrated(done: RecalibrationOutcome, noun: str, rate: float) -> Iterator[str]:
    """What a calibration rests on, all and by group, and which of them cannot answer the default rate."""
    from service.calibration.conformal import min_calibration_size

    def answers(n: int) -> str:
        few = f"; too few for the default false-positive rate, {rate:g}, which needs {min_calibration_size(rate)}"
        return f"smallest p-value {1 / (n + 1):.3g}{few if n < min_calibration_size(rate) else ''}"

    yield f"{done.path}: {done.n} {noun} calibrate, {done.n_fit} fitted the scores; {answers(done.n)}"
    for group, n in done.groups.items():
        yield f"group {group}: {n} {noun}; {answers(n)}"
    yield "a running server loads new versions when it is started again"


def _score(
    settings: Settings,
    paths: list[Path],
    out: Path | None,
    model: str | None,
    asked: ScoreParameters,
    maps: Path | None,
) -> int:
    """Score, write, show progress on stderr; the number of files that could not be read."""
    from service.commands.offline_scoring import BadFile, fields_of, find_files, open_sink, plan_pictures, score_files
    from service.formats.images import ImageLimits
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
    reasons = missing_verdicts(served, asked, settings.false_positive_rate)
    fields = fields_of(rule, further_scores(served.manifest, asked))
    total = len(files) if rule.kind == "image" else None  # a table's rows are not known before it is read
    with open_sink(out, sys.stdout, fields) as write, _progress(console, total) as advance:
        limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
        for row in score_files(served, files, asked, settings.false_positive_rate, limits, pictures):
            if isinstance(row, BadFile):
                bad += 1
                console.print(f"skipped {row.path}: {row.reason}", markup=False, highlight=False, soft_wrap=True)
            else:
                scored += 1
                write(row)
            advance()
    console.print(f"{scored} scored, {bad} skipped", highlight=False)
    for reason in reasons if scored else []:
        console.print(f"note: {reason}", markup=False, highlight=False, soft_wrap=True)
    return bad


@contextmanager
def _progress(console: Console, total: int | None, verb: str = "scoring") -> Iterator[Callable[..., None]]:
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(verb, total=total)
        yield lambda rows=1: progress.advance(task, rows)


def read_settings(flags: list[str]) -> Settings:
    """Settings from flags, else the environment, else the defaults. ``--help`` and unknown flags end the process.

    Raises:
        ConfigurationError: an unknown variable, or a value out of range; the text names the setting.
    """
    check_environment(os.environ)
    return _in_words(lambda: CliApp.run(GivenSettings, cli_args=flags))


def _settings(**overrides: object) -> Settings:
    check_environment(os.environ)
    given = {name: value for name, value in overrides.items() if value is not None}
    return _in_words(lambda: GivenSettings(**given))  # type: ignore[arg-type]


def _in_words(make: Callable[[], T]) -> T:
    try:
        return make()
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise ConfigurationError("; ".join(faults)) from error


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """Print a domain error as one line and exit 1; anything else is a defect and keeps its traceback."""
    try:
        yield
    except VaeserveError as error:
        typer.echo(f"vaeserve: {error}", err=True)
        raise typer.Exit(ERROR) from error
