"""The command line: ``vaetrain fit | evaluate | export | calibrate | report | publish | compare | presets``.

Imports of torch wait inside the commands, so that ``vaetrain --help`` answers at once.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from service.errors import VaeserveError
from training.errors import TrainingError

if TYPE_CHECKING:
    from training.config import Config
    from training.runs import Launch, Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Train latent variable models of images and write bundles that vaeserve serves.",
)
console = Console(stderr=True)

ERROR, INTERRUPTED = 2, 130

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, as fit leaves it: runs/NAME")]
AnywayOption = Annotated[
    bool, typer.Option("--publish-anyway", help="Also a model that is worse than the best constant: it has diverged")
]
ToOption = Annotated[Path, typer.Option(metavar="DIR", help="Folder of bundles, NAME/VERSION each")]


def main() -> None:
    """Entry point of ``vaetrain``. OpenMP reads how its threads wait when torch is loaded: asleep, not spinning."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


@app.command()
def fit(
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, mnist, fashion-mnist, a folder of images, an .npy, .npz, .csv, .parquet file; default: digits"
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A frozen ONNX feature extractor before the model, which is of its features"),
    ] = None,
    backbone_output: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its tensor that is the features; default: its only output")
    ] = None,
    backbone_normalise: Annotated[
        Literal["imagenet"] | None,
        typer.Option(help="What its pixels are normalised by; default: nothing, or --set backbone.mean=… and std"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A name that `vaetrain presets` lists, or a .toml file; default: by the data")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: the data's")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For example model.latent_dim=16; repeatable")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="VAETRAIN_DATA_DIR", help="Where data sets lie or are downloaded to; default: the cache"),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what the run's folder holds")] = False,
    to: ToOption = Path("exported"),
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Stop after the training")] = False,
    publish_anyway: AnywayOption = False,
) -> None:
    """Train a model and publish it: fit, evaluate, export, calibrate, report, publish. Goes on where it was stopped."""
    with _errors_in_words():
        from training.console import all_stages, fit_stage
        from training.runs import default_name

        before = _backbone(backbone, backbone_output, backbone_normalise)
        launch, config = _configure(data, preset, name, overrides or [], data_dir, before)
        folder = run_dir or Path("runs") / (config.name or default_name(config.data.source))
        run, fabric = fit_stage(config, folder, launch, restart, console)
        _leave_group()
        if fabric.is_global_zero and not fit_only:
            _show_served(all_stages(run, to, console, publish_anyway), to)


def _leave_group() -> None:
    """End the threads of a training by several processes: one that lives when its process ends may abort that."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _backbone(path: str | None, output: str | None, normalise: str | None) -> dict[str, Any]:
    """The configuration's ``backbone`` as the flags have it, and the flags; nothing without a file.

    Raises ConfigError: flags without a file.
    """
    from training.config import IMAGENET
    from training.errors import ConfigError

    flags = {"backbone_output": output, "backbone_normalise": normalise}
    if path is None:
        if any(flags.values()):
            raise ConfigError("--backbone-output and --backbone-normalise are about a --backbone: name its file")
        return {}
    section = {"path": path} | ({"output": output} if output else {}) | (IMAGENET if normalise else {})
    return {"section": section, "flags": {"backbone": path, **flags}}


def _configure(
    data: str | None,
    preset: str | None,
    name: str | None,
    overrides: list[str],
    data_dir: Path | None,
    backbone: Mapping[str, Any] | None = None,
) -> tuple[Launch, Config]:
    """What was asked for, and the configuration that it means. Raises ConfigError."""
    from training.config import DataConfig, load_config
    from training.runs import Launch

    source = data or DataConfig().source
    chosen = preset or ("features" if backbone else _preset_for(source, overrides))
    base: dict[str, Any] = {"data": {"source": source}} if data or not preset else {}
    if data_dir:
        base.setdefault("data", {})["directory"] = str(data_dir)
    if name:
        base["name"] = name
    if backbone:
        base["backbone"] = backbone["section"]
    flags = backbone["flags"] if backbone else {}
    launch = Launch(data=data, preset=chosen, name=name, overrides=overrides, **flags)
    return launch, load_config(chosen, overrides, base)


def _preset_for(source: str, overrides: list[str]) -> str | None:
    """The preset of the data's own name; ``images``, ``vectors`` or ``signals`` for a user's own data; or none."""
    from training.config import load_config, parse_override, presets
    from training.data.load import kind_of
    from training.data.named import NAMED

    if source in NAMED:
        return source if source in presets() else None
    of_data = [text for text in overrides if parse_override(text)[0][0] == "data"]
    return f"{kind_of(load_config(None, of_data, {'data': {'source': source}}).data)}s"


@app.command()
def evaluate(
    run: RunArgument,
    k: Annotated[int | None, typer.Option(min=1, max=100_000, help="Samples of the IWAE-k log-likelihood")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="First images of the test split only")] = None,
    gaps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Also split the inference gap, of the first N images; 100, say"),
    ] = None,
    precision: Annotated[
        Literal["32-true", "bf16-mixed"] | None,
        typer.Option(help="bf16-mixed: the decoder rounds, densities and sums do not; a quarter less time"),
    ] = None,
) -> None:
    """Measure the averaged weights on the test split; writes RUN/metrics.json."""
    with _errors_in_words():
        from training.console import evaluate_stage

        evaluate_stage(_opened(run), console, k=k, images=images, gaps=gaps, precision=precision)


@app.command()
def export(run: RunArgument) -> None:
    """Write the bundle, uncalibrated, to RUN/bundle, verified against torch."""
    with _errors_in_words():
        from training.console import export_stage

        export_stage(_opened(run), console)


@app.command()
def calibrate(run: RunArgument) -> None:
    """Add the scores of held-out images to the bundle in RUN/bundle."""
    with _errors_in_words():
        from training.console import calibrate_stage

        calibrate_stage(_opened(run), console)


@app.command()
def report(run: RunArgument) -> None:
    """Draw the figures and RUN/report/report.html."""
    with _errors_in_words():
        from training.console import report_stage

        report_stage(_opened(run), console)


@app.command()
def publish(
    run: RunArgument,
    to: ToOption = Path("exported"),
    version: Annotated[str | None, typer.Option(help="A whole number from 1; default: the next free one")] = None,
    publish_anyway: AnywayOption = False,
) -> None:
    """Write the calibrated bundle with its card to DIR/NAME/VERSION."""
    with _errors_in_words():
        from training.console import publish_stage

        _show_served(publish_stage(_opened(run), to, console, version, publish_anyway), to)


@app.command()
def compare(
    targets: Annotated[
        list[str], typer.Argument(metavar="PRESET_OR_RUN…", help="Presets to train, or folders of runs to take up")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="For every preset; repeatable")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Train every preset on this, as fit's --data; default: its own")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="VAETRAIN_DATA_DIR", help="Where data sets lie or are downloaded to; default: the cache"),
    ] = None,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the table and the figure")] = Path("runs/compare"),
) -> None:
    """Train presets or take up runs, and write one table and one rate–distortion figure of all."""
    with _errors_in_words():
        from training.compare import compare as compare_runs

        typer.echo(compare_runs(targets, overrides or [], data, data_dir, to, console))


@app.command(name="presets")
def list_presets() -> None:
    """List the configurations that come with the package, each with what it is."""
    from training.config import presets, summary_of

    width = max(map(len, presets()))
    for name in presets():
        typer.echo(f"{name:{width}}  {summary_of(name)}")


def _opened(folder: Path) -> Run:
    """The run in that folder, which shows on standard error how far the reading of its data has come."""
    from training.progress import ConsoleTrack
    from training.runs import Run

    return Run.open(folder, ConsoleTrack(console))


def _show_served(bundle: Path, root: Path) -> None:
    repository = [] if root == Path("exported") else ["--repository", str(root)]
    typer.echo(bundle)
    typer.echo(f"serve it: {shlex.join([_vaeserve(), 'serve', *repository])}")


def _vaeserve() -> str:
    """``vaeserve`` of this environment, so that it is found from the current folder: by name if the shell knows it."""
    own, known = Path(sys.executable).with_name("vaeserve"), shutil.which("vaeserve")
    if not own.exists() or (known and own.samefile(known)):
        return "vaeserve"
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)


@contextmanager
def _errors_in_words() -> Iterator[None]:
    """A domain error becomes one line and exit code 2, Ctrl-C says how to go on; a defect keeps its traceback."""
    try:
        yield
    except (TrainingError, VaeserveError, OSError) as error:
        typer.echo(f"vaetrain: {'; '.join(str(error).splitlines())}", err=True)
        raise typer.Exit(ERROR) from error
    except KeyboardInterrupt as error:
        words = shlex.join(["vaetrain", *(word for word in sys.argv[1:] if word != "--restart")])
        typer.echo(f"vaetrain: stopped; what was done is kept, the same command goes on: {words}", err=True)
        raise typer.Exit(INTERRUPTED) from error


if __name__ == "__main__":
    main()
