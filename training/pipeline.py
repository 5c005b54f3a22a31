"""The stages of a training: each computes, writes what belongs in the run's folder, and returns what came of it.

They say nothing: training.console runs them before a user's eyes. ``track`` shows how far a long one has come.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console

from service.calibration.conformal import min_calibration_size
from service.scores.fitting import MIN_ROWS
from training.config import Config
from training.data.backbone import settled
from training.data.folders import cut_off
from training.data.named import NAMED
from training.errors import TrainingError
from training.evaluation.evaluate import evaluate
from training.export.calibrate import calibrate, images_to_score, suspects
from training.export.divergence import refuse_diverged
from training.export.provenance import commit, machine, versions
from training.export.staging import export, graphs_to_export
from training.fitting.checkpoint import FILE as CHECKPOINT
from training.fitting.checkpoint import load_checkpoint
from training.fitting.corruption import CorruptionTraining, check_corruption
from training.fitting.data_defaults import DATA_DEFAULTS, DataDefault, adapted, as_before
from training.fitting.devices import make_fabric, set_threads
from training.fitting.fit import Fitted, fit
from training.fitting.objectives import check_objective
from training.progress import Track, untracked
from training.publishing import publish
from training.reporting.report import report
from training.runs import FIT, METRICS, FitRecord, Launch, Run, write_text

SPLIT = "test"
DEFAULT_RATE = 0.05
"""The false-positive rate that vaeserve judges by where a request asks for none."""


@dataclass(frozen=True)
class Change:
    """A default that the data, or the run that goes on, changed from ``before`` to ``now``."""

    default: DataDefault
    before: int
    now: int


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be trained: folder, configuration and data stand. ``folder_is_new``: with this call."""

    run: Run
    fabric: Fabric
    launch: Launch
    changes: Sequence[Change]
    folder_is_new: bool

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.fabric.is_global_zero


@dataclass(frozen=True)
class TooFew:
    """A split of ``found`` rows (or images) that are fewer than the ``needed`` ones; its fraction is ``fraction``."""

    found: int
    needed: int
    fraction: float


@dataclass(frozen=True)
class DataFacts:
    """What was read. ``cut_off``: the median and the largest share of an image that the rule ``cover`` leaves out."""

    run: Run
    cut_off: tuple[float, float] | None
    few_to_calibrate: TooFew | None
    few_to_fit_scores: TooFew | None


@dataclass(frozen=True)
class Trained:
    """A training at its end; ``was_done``: before this call, too."""

    fitted: Fitted
    was_done: bool


@dataclass(frozen=True)
class Calibrated:
    """The staged bundle; a warning of bad images among the good ones, None: nothing, and what they are called."""

    path: Path
    warning: str | None
    suspects: Sequence[str]


@dataclass(frozen=True)
class Published:
    """The bundle under its version, and how large it is."""

    path: Path
    bytes: int


def prepare(config: Config, folder: Path, launch: Launch, restart: bool = False, track: Track = untracked) -> Prepared:
    """The run in ``folder`` with its data read, and what they change of ``config``.

    Under torchrun the first process prepares folder and data before the others look at them. Raises CheckpointError
    when the folder holds a run of another configuration, DataError, ConfigError.
    """
    check_objective(config)
    fabric, is_new = make_fabric(config), not folder.exists()
    first = fabric.is_global_zero
    run = Run(folder, settled(config), track if first else untracked)
    with leaving_no_trace(folder, first and is_new), fabric.rank_zero_first():
        if first and restart:
            run.discard()
        run = _with_data_defaults(run, launch)
        if first:
            load_checkpoint(run.folder, run.config)
            check_corruption(run.config, run.dataset)
            run.folder.mkdir(parents=True, exist_ok=True)
            run.save_config()
        _ = run.dataset  # read here, the first process before the others
    changes = [Change(default, default.of(config), default.of(run.config)) for default in DATA_DEFAULTS]
    return Prepared(run, fabric, launch, [change for change in changes if change.now != change.before], is_new)


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


@contextmanager
def leaving_no_trace(folder: Path, is_new: bool) -> Iterator[None]:
    """A training that is refused before its first checkpoint leaves no folder that was not there before."""
    try:
        yield
    except (TrainingError, OSError):
        if is_new and not (folder / CHECKPOINT).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def data_facts(run: Run) -> DataFacts:
    """What was read of the run's data, and which split is too small for what it is for."""
    data, dataset = run.config.data, run.dataset
    held_out = len((dataset.whole_images or dataset).splits["calibration"])
    calibration = TooFew(held_out, min_calibration_size(DEFAULT_RATE), data.calibration)
    validation = TooFew(len(dataset.splits["validation"]), MIN_ROWS, data.validation)
    return DataFacts(
        run,
        None if data.source in NAMED else cut_off(data),
        *(few if few.found < few.needed else None for few in (calibration, validation)),
    )


def train(prepared: Prepared, console: Console | None = None) -> Trained:
    """Train, or go on with, the prepared run, whose journal is written on ``console``; the first process records it.

    Raises CheckpointError, TrainingDiverged, DataError, ConfigError.
    """
    run = prepared.run
    with leaving_no_trace(run.folder, prepared.first and prepared.folder_is_new):
        fitted = fit(run.config, run.dataset, run.folder, prepared.fabric, console)
    was_done = run.has_record
    if prepared.first and not was_done:
        record = FitRecord(
            launch=prepared.launch,
            fingerprint=run.dataset.fingerprint,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=commit(),
            machine=machine(),
            versions=versions(),
        )
        write_text(run.folder / FIT, record.model_dump_json(indent=2) + "\n")
    return Trained(fitted, was_done)


def corruption_training(prepared: Prepared) -> CorruptionTraining:
    """The training of the network of the section ``corruption``, as far as it has come. Raises CheckpointError."""
    run = prepared.run
    return CorruptionTraining(run.config, run.dataset, run.folder, prepared.fabric, commit())


def train_corruption(training: CorruptionTraining, track: Track = untracked) -> None:
    """Train, or go on with, that network."""
    with track("corruption", training.total_steps, "steps", training.state.step) as advance:
        training.run(advance)


def measure(run: Run, track: Track = untracked, **asked: int | str | None) -> dict[str, float]:
    """Metrics of the test split, also as metrics.json; ``asked`` replaces fields of the run's EvaluateConfig."""
    set_threads(run.config)
    options = run.config.evaluate.model_copy(update={name: value for name, value in asked.items() if value})
    total = min(len(run.dataset.splits[SPLIT]), options.images or len(run.dataset.splits[SPLIT]))
    device = "cuda" if run.config.run.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    model, started = copy.deepcopy(run.model).to(device), time.perf_counter()
    with track(f"evaluate, k = {options.k}", total) as advance:
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
    return metrics


def write_staged(run: Run, track: Track = untracked) -> Path:
    """The staged bundle, uncalibrated. Raises ExportError."""
    with track("export", graphs_to_export(run), "graphs") as advance:
        return export(run, advance)


def calibrate_staged(run: Run, track: Track = untracked) -> Calibrated:
    """The staged bundle, calibrated. Raises ExportError."""
    with track("calibrate", images_to_score(run)) as advance:
        path = calibrate(run, advance)
    return Calibrated(path, *suspects(run))


def write_report(run: Run, track: Track = untracked) -> Path:
    """Figures and report.html. Raises ExportError."""
    return report(run, track)


def publish_run(run: Run, root: Path, version: str | None = None, publish_anyway: bool = False) -> Published:
    """The bundle under ``root``. Raises ModelDiverged, unless it is to be published anyway; ExportError."""
    if not publish_anyway:
        refuse_diverged(run)
    path = publish(run, root, version)
    return Published(path, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
