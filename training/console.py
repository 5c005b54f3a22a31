"""The stages of training.pipeline before a user's eyes: a line for what came of each, and how far a long one has come.

All is said on the console that is handed in, standard error in ``vaetrain``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from lightning.fabric import Fabric
from rich.console import Console

from training import pipeline
from training.config import Config
from training.evaluation.evaluate import summary
from training.export.divergence import refuse_diverged
from training.fitting.fit import Fitted
from training.fitting.loop import describe_progress
from training.pipeline import DEFAULT_RATE, DataFacts, Prepared
from training.progress import ConsoleTrack
from training.reporting.card import duration
from training.runs import METRICS, Launch, Run

SKIPPED = 10  # files that are named


def say(console: Console, text: str) -> None:
    """One line, whatever the terminal's width, its brackets and numbers left as they are."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def fit_stage(config: Config, folder: Path, launch: Launch, restart: bool, console: Console) -> tuple[Run, Fabric]:
    """Train, or go on with, the run in ``folder``. Raises CheckpointError when that is one of another configuration.

    Of several processes the first one speaks, and trains the network of the section ``corruption``.
    """
    prepared = pipeline.prepare(config, folder, launch, restart, ConsoleTrack(console))
    if prepared.first:
        for text in _about_run(prepared):
            say(console, text)
        for text in _about_data(pipeline.data_facts(prepared.run)):
            say(console, text)
    trained = pipeline.train(prepared, console)
    if prepared.first and not trained.was_done:
        say(console, f"fit: {_kept(trained.fitted)}, {duration(trained.fitted.state.seconds)}")
    if prepared.first and config.corruption is not None:
        _corruption_stage(prepared, console)
    return prepared.run, prepared.fabric


def _corruption_stage(prepared: Prepared, console: Console) -> None:
    training = pipeline.corruption_training(prepared)
    if training.resumed:
        say(console, f"corruption: {describe_progress(training)}")
    pipeline.train_corruption(training, ConsoleTrack(console))
    found = f"cross-entropy {training.state.cross_entropy:.4f} nats a pixel on validation"
    say(console, f"corruption: {found}, {duration(training.state.seconds)}")


def _about_run(prepared: Prepared) -> Iterator[str]:
    """What was read, and what was made of the configuration."""
    config = prepared.run.config
    yield f"data: {config.data.source}"
    if config.backbone:
        yield f"backbone: {config.backbone.path}, sha256 {config.backbone.sha256}"
    for change in prepared.changes:
        why = change.default.why if change.now < change.before else "with which the run began"
        yield f"{change.default.key}: {change.now} instead of the preset's {change.before}, {why}"


def _about_data(facts: DataFacts) -> Iterator[str]:
    """Rows and splits, files that were left out, what is cut off, and which split is too small."""
    run, dataset = facts.run, facts.run.dataset
    whole_images, kind = dataset.whole_images, dataset.preprocessing.kind
    sizes = ", ".join(f"{name} {len(indices):,}" for name, indices in dataset.splits.items())
    what = f"{kind}s" if whole_images is None else "crops"
    of = " of features" if run.backbone else ""
    among = "" if whole_images is None else f" of {len(whole_images.kept):,} images"
    yield f"{len(dataset):,} {what}{of} {'×'.join(map(str, dataset.describe()['shape']))}{among}: {sizes}"
    for path, reason in dataset.skipped[:SKIPPED]:
        yield f"skipped {path}: {reason}"
    if facts.cut_off is not None:
        median, most = facts.cut_off
        height, width = run.input_rule.shape[1:]
        yield (
            f"data.fit = cover scales images to {height}×{width} and cuts off what is beyond at two edges: "
            f"{median:.0%} of an image's pixels in the median, {most:.0%} at most; contain keeps all and pads, stretch "
            "distorts (--set data.fit=contain)"
        )
    yield from _about_small_splits(facts)


def _about_small_splits(facts: DataFacts) -> Iterator[str]:
    """The setting to raise for a split that is too small."""
    rows = f"{facts.run.input_rule.kind}s"
    if few := facts.few_to_calibrate:
        yield (
            f"calibration: {few.found} {rows} are too few for verdicts at a false-positive rate of {DEFAULT_RATE:.0%}, "
            f"the default, which needs {few.needed}: raise data.calibration, {few.fraction:g} here"
        )
    if few := facts.few_to_fit_scores:
        noun = "crops" if facts.run.dataset.whole_images else rows
        yield (
            f"validation: {few.found} {noun} are too few to fit the anomaly scores, which needs {few.needed}, and the "
            "bound (or the reconstruction error) will be the score: raise data.validation, "
            f"{few.fraction:g} here"
        )


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


def evaluate_stage(run: Run, console: Console, **asked: int | str | None) -> dict[str, float]:
    """Metrics of the test split, also as metrics.json; ``asked`` replaces fields of the run's EvaluateConfig."""
    metrics = pipeline.measure(run, ConsoleTrack(console), **asked)
    say(console, f"evaluate: {summary(metrics)}")
    return metrics


def export_stage(run: Run, console: Console) -> Path:
    """The staged bundle, uncalibrated."""
    path = pipeline.write_staged(run, ConsoleTrack(console))
    say(console, f"export: {path}, verified")
    return path


def calibrate_stage(run: Run, console: Console) -> Path:
    """The staged bundle, calibrated."""
    found = pipeline.calibrate_staged(run, ConsoleTrack(console))
    say(console, f"calibrate: {found.path}, verified")
    if found.warning:
        say(console, f"calibrate: {found.warning}")
    for name in found.suspects:
        say(console, f"look at {name}")
    return found.path


def report_stage(run: Run, console: Console) -> Path:
    """Figures and report.html."""
    path = pipeline.write_report(run, ConsoleTrack(console))
    say(console, f"report: {path}")
    return path


def publish_stage(
    run: Run, root: Path, console: Console, version: str | None = None, publish_anyway: bool = False
) -> Path:
    """The bundle under ``root``. Raises ModelDiverged, unless it is to be published anyway."""
    with console.status("publish"):
        found = pipeline.publish_run(run, root, version, publish_anyway)
    say(console, f"publish: {found.path}, {found.bytes / 1e6:.1f} MB, verified")
    return found.path


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
