"""Runs side by side: presets are trained, runs taken up, and what each explains and costs is measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from service.inference.model import Model
from service.inference.sessions import Runtime
from training.config import load_config, presets
from training.console import evaluate_stage, export_stage, fit_stage, say
from training.data.batches import to_unit
from training.errors import ConfigError, ExportError
from training.export.staging import open_staged
from training.fitting.objectives import check_objective
from training.models.base import LatentVariableModel
from training.reporting import figures
from training.reporting.comparison import Row, has_rate_and_distortion, rate_distortion, sheet, table
from training.runs import CONFIG, Launch, Run, default_name, write_text

TABLE, SHEET, FIGURE = "compare.md", "compare.csv", "rate-distortion.png"
TIMED = 30  # single images, after a warm-up: the median is told


def compare(
    targets: Sequence[str],
    overrides: Sequence[str],
    data: str | None,
    data_dir: Path | None,
    to: Path,
    console: Console,
) -> Path:
    """Train what is named by a preset, take up what is named by a run's folder, and write table and figure into ``to``.

    What was trained, evaluated or exported before is not done again. Returns the table's path. Raises ConfigError:
    neither preset nor run, or runs of different data, of which nats cannot be compared.
    """
    opened = [resolve(target, overrides, data, data_dir) for target in targets]
    runs = [run if launch is None else fit_stage(run.config, run.folder, launch, False, console)[0]
            for run, launch in opened]  # fmt: skip
    _check_same_data(runs)
    rows = [measure(run, console) for run in runs]
    write_text(to / SHEET, sheet(rows))
    write_text(to / TABLE, table(rows, runs[0].dataset.name))
    if any(map(has_rate_and_distortion, rows)):
        (to / FIGURE).write_bytes(figures.png(rate_distortion(rows)))
    return to / TABLE


def resolve(
    target: str, overrides: Sequence[str], data: str | None, data_dir: Path | None
) -> tuple[Run, Launch | None]:
    """The run that ``target`` means, and what to ask of fit where it is a preset's. Raises ConfigError."""
    if (Path(target) / CONFIG).is_file():
        return Run.open(target), None
    if target not in presets() and Path(target).suffix != ".toml":
        raise ConfigError(f"{target!r} is neither a run's folder nor a preset: expected one of {', '.join(presets())}")
    base: dict[str, Any] = {"data": {"source": data}} if data else {}
    if data_dir:
        base.setdefault("data", {})["directory"] = str(data_dir)
    name = default_name(Path(target).stem)
    if data and default_name(data) not in name:
        name = f"{name}-{default_name(data)}"
    config = load_config(target, overrides, base | {"name": name})
    check_objective(config)  # of all, before the first is trained
    return Run(Path("runs") / name, config), Launch(data=data, preset=target, name=name, overrides=list(overrides))


def _check_same_data(runs: Sequence[Run]) -> None:
    prints = {run.dataset.fingerprint: run for run in runs}
    if len(prints) > 1:
        first, second = list(prints.values())[:2]
        raise ConfigError(
            f"{first.folder} and {second.folder} are of different images or splits ({first.config.data.source}, "
            f"{second.config.data.source}), whose nats cannot be compared: expected runs of the same data, see --data"
        )


def measure(run: Run, console: Console) -> Row:
    """The run's row; evaluates and exports it where that was not done."""
    found = run.metrics() if run.is_evaluated else None
    metrics: Mapping[str, float] = found["metrics"] if found else evaluate_stage(run, console)
    try:
        bundle = open_staged(run)
    except ExportError:
        export_stage(run, console)
        bundle = open_staged(run)
    say(console, f"compare: {run.name}, the time of one image")
    error, dimensions = metrics.get("log_likelihood_standard_error"), math.prod(run.model.shape)
    has_bits = error is not None and "bits_per_dim" in metrics
    return Row(
        name=run.name,
        family=run.model.family,
        likelihood=_likelihood(run.model),
        exact=run.model.evidence == "exact",
        k=int(metrics["k"]),
        images=int(metrics["images"]),
        log_likelihood=metrics.get("log_likelihood"),
        standard_error=error,
        bits_per_dim=metrics.get("bits_per_dim"),
        bits_standard_error=error / (dimensions * math.log(2)) if error is not None and has_bits else None,
        elbo=metrics.get("elbo"),
        bound_gap=metrics.get("bound_gap"),
        rate=metrics.get("rate") if run.model.evidence != "none" else None,
        distortion=metrics.get("distortion") if run.model.evidence != "none" else None,
        parameters=parameters(run.model),
        training_seconds=run.checkpoint["state"]["seconds"],
        milliseconds=milliseconds(Model.load(bundle, Runtime("cpu", threads=1)), _images(run)),
    )


def _likelihood(model: LatentVariableModel) -> str:
    binarised = model.likelihood.binarisation
    return model.likelihood.family + (f", {binarised}" if binarised != "none" else "")


def parameters(model: LatentVariableModel) -> int:
    """Numbers that were trained or solved for; an ex-post density's are not among them."""
    return sum(parameter.numel() for parameter in model.parameters())


def _images(run: Run) -> np.ndarray:
    return to_unit(run.dataset.pixels(run.dataset.splits["test"][:TIMED])).numpy()


def milliseconds(model: Model, x: np.ndarray) -> float:
    """Median time of the default score of one image alone, over the images of x."""
    model.warm_up()
    times = []
    for i in range(len(x)):
        started = time.perf_counter()
        model.score(x[i : i + 1])
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)
