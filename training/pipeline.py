"""The stages in a row: fit, evaluate, export, calibrate, report, publish. Each says what it does, on stderr."""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from service.calibration.conformal import min_calibration_size
from service.scores.fitting import MIN_ROWS
from training.config import Config
from training.data.backbone import settled
from training.data.folders import cut_off
from training.data.load import NAMED
from training.errors import TrainingError
from training.evaluation.evaluate import evaluate, summary
from training.export.calibrate import calibrate, images_to_score, suspects
from training.export.divergence import refuse_diverged
from training.export.provenance import commit, machine, versions
from training.export.staging import export
from training.fitting.checkpoint import FILE as CHECKPOINT
from training.fitting.checkpoint import load_checkpoint
from training.fitting.corruption import CorruptionTraining, check_corruption
from training.fitting.data_defaults import DATA_DEFAULTS, adapted, as_before
from training.fitting.devices import make_fabric, set_threads
from training.fitting.fit import Fitted, fit
from training.fitting.loop import standing
from training.publishing import publish
from training.reporting.card import duration
from training.reporting.report import report
from training.runs import FIT, METRICS, FitRecord, Launch, Run, write_text

SPLIT = "test"
DEFAULT_RATE = 0.05
"""The false-positive rate that vaeserve judges by where a request asks for none."""


def fit_stage(config: Config, folder: Path, launch: Launch, restart: bool, console: Console) -> tuple[Run, Fabric]:
    """Train, or go on with, the run in ``folder``. Raises CheckpointError when that is one of another configuration.

    Under torchrun the first process prepares folder and data before the others look at them.
    """
    fabric = make_fabric(config)
    run, first = Run(folder, settled(config)), fabric.is_global_zero
    with _leaving_no_trace(folder, first):
        with fabric.rank_zero_first():
            if first and restart:
                run.discard()
            run = _with_data_defaults(run, launch)
            if first:
                _prepare(run)
                _announce(run, config, console)
            dataset = run.dataset
        if first:
            _describe(run, console)
        fitted = fit(run.config, dataset, folder, fabric, console)
    if fabric.is_global_zero and not run.has_record:
        record = FitRecord(
            launch=launch,
            fingerprint=dataset.fingerprint,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=commit(),
            machine=machine(),
            versions=versions(),
        )
        write_text(folder / FIT, record.model_dump_json(indent=2) + "\n")
        say(console, f"fit: {_kept(fitted)}, {duration(fitted.state.seconds)}")
    if fabric.is_global_zero and run.config.corruption is not None:
        corruption_stage(run, fabric, console)
    return run, fabric


def corruption_stage(run: Run, fabric: Fabric, console: Console) -> None:
    """Train, or go on with, the network of the section ``corruption``. Raises CheckpointError."""
    training = CorruptionTraining(run.config, run.dataset, run.folder, fabric, commit())
    if training.resumed:
        say(console, f"corruption: {standing(training)}")
    with progress_bar(console, "corruption", training.total_steps) as advance:
        training.run(advance)
    found = f"cross-entropy {training.state.cross_entropy:.4f} nats a pixel on validation"
    say(console, f"corruption: {found}, {duration(training.state.seconds)}")


def _kept(fitted: Fitted) -> str:
    """Which weights a training kept, and their bound on the validation split."""
    state, unit = fitted.state, fitted.model.likelihood.unit_of_error
    if math.isfinite(state.best_bound):
        when = f" (epoch {state.best_epoch})" if fitted.history else ""
        return f"best on validation {state.best_bound:.3f} {unit}{when}"
    if not state.best_epoch:
        return "no validation gave a finite bound, and the weights are those before training"
    bound = next(row["bound"] for row in reversed(fitted.history) if row["epoch"] == state.best_epoch)
    return f"{bound:.3f} {unit} on validation at the last epoch, {state.best_epoch}; the annealing had not ended"


@contextmanager
def _leaving_no_trace(folder: Path, first: bool) -> Iterator[None]:
    """A training that is refused before its first checkpoint leaves no folder that was not there before."""
    existed = folder.exists()
    try:
        yield
    except (TrainingError, OSError):
        if first and not existed and not (folder / CHECKPOINT).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _with_data_defaults(run: Run, launch: Launch) -> Run:
    """The run with the defaults of its data, or of its checkpoint where it goes on: see fitting.data_defaults.

    Raises CheckpointError: the checkpoint is of another configuration.
    """
    chosen, stored = launch.chosen_keys, load_checkpoint(run.folder)
    if stored is None:
        return run.configured(adapted(run.config, run.dataset, chosen))
    config = as_before(run.config, stored["identity"], chosen)
    load_checkpoint(run.folder, config)  # another run's features are not replaced before it is refused
    return run.configured(config)


def _prepare(run: Run) -> None:
    """A folder that fits the configuration, refused if its checkpoint is of another one."""
    load_checkpoint(run.folder, run.config)
    check_corruption(run.config, run.dataset)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.save_config()


def _announce(run: Run, asked: Config, console: Console) -> None:
    """What is about to be read, and what was made of the configuration."""
    say(console, f"data: {run.config.data.source}")
    if run.config.backbone:
        say(console, f"backbone: {run.config.backbone.path}, sha256 {run.config.backbone.sha256}")
    for default in DATA_DEFAULTS:
        before, now = default.of(asked), default.of(run.config)
        if now != before:
            say(console, f"{default.key}: {now} instead of the preset's {before}, {default.why}")


def _describe(run: Run, console: Console) -> None:
    """What was read: rows, splits, and files that were left out; what is cut off, and which split is too small."""
    dataset, whole_images = run.dataset, run.dataset.whole_images
    sizes = ", ".join(f"{name} {len(indices):,}" for name, indices in dataset.splits.items())
    kind, shape = dataset.preprocessing.kind, dataset.describe()["shape"]
    what = f"{kind}s" if whole_images is None else "crops"
    of = " of features" if run.backbone else ""
    among = "" if whole_images is None else f" of {len(whole_images.kept):,} images"
    say(console, f"{len(dataset):,} {what}{of} {'×'.join(map(str, shape))}{among}: {sizes}")
    for path, reason in dataset.skipped[:10]:
        say(console, f"skipped {path}: {reason}")
    for note in (_note_on_edges(run), *_notes_on_splits(run)):
        if note:
            say(console, note)


def _note_on_edges(run: Run) -> str | None:
    """What the rule ``cover`` cuts off of images of another shape."""
    cut = cut_off(run.config.data) if run.config.data.source not in NAMED else None
    if cut is None:
        return None
    median, most = cut
    return (
        f"data.fit = cover scales images to {run.input_rule.shape[1]}×{run.input_rule.shape[2]} and cuts off what is "
        f"beyond at two edges: {median:.0%} of an image's pixels in the median, {most:.0%} at most; contain keeps all "
        "and pads, stretch distorts (--set data.fit=contain)"
    )


def _notes_on_splits(run: Run) -> Iterator[str]:
    """Which split is too small for what it is for, with the setting to raise."""
    data, dataset, rows = run.config.data, run.dataset, f"{run.input_rule.kind}s"
    n, n_fit = len((dataset.whole_images or dataset).splits["calibration"]), len(dataset.splits["validation"])
    min_size = min_calibration_size(DEFAULT_RATE)
    if n < min_size:
        yield (
            f"calibration: {n} {rows} are too few for verdicts at a false-positive rate of {DEFAULT_RATE:.0%}, the "
            f"default, which needs {min_size}: raise data.calibration, {data.calibration:g} here"
        )
    if n_fit < MIN_ROWS:
        noun = "crops" if dataset.whole_images else rows
        yield (
            f"validation: {n_fit} {noun} are too few to fit the anomaly scores, which needs {MIN_ROWS}, and the bound "
            f"(or the reconstruction error) will be the score: raise data.validation, {data.validation:g} here"
        )


def evaluate_stage(run: Run, console: Console, **asked: int | str | None) -> dict[str, float]:
    """Metrics of the test split, also as metrics.json; ``asked`` replaces fields of the run's EvaluateConfig."""
    set_threads(run.config)
    options = run.config.evaluate.model_copy(update={name: value for name, value in asked.items() if value})
    total = min(len(run.dataset.splits[SPLIT]), options.images or len(run.dataset.splits[SPLIT]))
    device = "cuda" if run.config.run.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    model, started = copy.deepcopy(run.model).to(device), time.perf_counter()
    with progress_bar(console, f"evaluate, k = {options.k}", total) as advance:
        metrics, latents = evaluate(model, run.dataset, SPLIT, options, run.config.seed, advance)
    content: dict[str, Any] = {
        "split": SPLIT,
        "metrics": metrics,
        "latents": latents,
        "k": options.k,
        "images": options.images,
        "gaps": options.gaps,
        "precision": options.precision,
        "seconds": round(time.perf_counter() - started, 1),
        "weights": run.weights_digest,
    }
    write_text(run.folder / METRICS, json.dumps(content, indent=2) + "\n")
    say(console, f"evaluate: {summary(metrics)}")
    return metrics


def export_stage(run: Run, console: Console) -> Path:
    """The staged bundle, uncalibrated."""
    with console.status("export"):
        path = export(run)
    say(console, f"export: {path}, verified")
    return path


def calibrate_stage(run: Run, console: Console) -> Path:
    """The staged bundle, calibrated."""
    with progress_bar(console, "calibrate", images_to_score(run)) as advance:
        path = calibrate(run, advance)
    say(console, f"calibrate: {path}, verified")
    warning, names = suspects(run)
    if warning:
        say(console, f"calibrate: {warning}")
    for name in names:
        say(console, f"look at {name}")
    return path


def report_stage(run: Run, console: Console) -> Path:
    """Figures and report.html."""
    with console.status("report"):
        path = report(run)
    say(console, f"report: {path}")
    return path


def publish_stage(
    run: Run, root: Path, console: Console, version: str | None = None, publish_anyway: bool = False
) -> Path:
    """The bundle under ``root``. Raises ModelDiverged, unless it is to be published anyway."""
    if not publish_anyway:
        refuse_diverged(run)
    with console.status("publish"):
        path = publish(run, root, version)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    say(console, f"publish: {path}, {size / 1e6:.1f} MB, verified")
    return path


def all_stages(run: Run, root: Path, console: Console, publish_anyway: bool = False) -> Path:
    """Everything after fit; the published bundle. An evaluation that was done before, minutes of work, is kept.

    Raises ModelDiverged before any of it, unless the model is to be published anyway.
    """
    if not publish_anyway:
        refuse_diverged(run)
    if run.is_evaluated:
        say(console, f"evaluate: done before, {run.folder / METRICS}")
    else:
        evaluate_stage(run, console)
    export_stage(run, console)
    calibrate_stage(run, console)
    report_stage(run, console)
    return publish_stage(run, root, console, publish_anyway=True)  # as was found out above


def say(console: Console, text: str) -> None:
    """One line, whatever the terminal's width, its brackets and numbers left as they are."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(console: Console, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` images; yields the function that moves it on."""
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total)
        yield lambda done: progress.advance(task, done)
