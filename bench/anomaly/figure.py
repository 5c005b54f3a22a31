"""The benchmark in one figure: AUROC by task, a colour and a marker for each detector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from bench.anomaly.report import DETECTORS, detectors, mean_over_seeds
from bench.anomaly.results import Record
from training.reporting.figures import GREY, MARKERS, PALETTE

SMALLEST = 1e-4


def dots(records: Sequence[Record]) -> Figure:
    """1 − AUROC, mean over seeds, of every task by detector, on a logarithmic axis that grows better to the right.

    What is below SMALLEST, a perfect score among them, stands at the edge.
    """
    tasks = list(dict.fromkeys(record.task for record in records if record.auroc is not None))
    figure = Figure(figsize=(8.5, 1.6 + 0.2 * max(len(tasks), 4)), layout="constrained")
    ax = figure.subplots()
    rows = np.arange(len(tasks))
    for at, name in enumerate(DETECTORS):
        if name not in detectors(records):
            continue
        means = [mean_over_seeds(records, name, task) for task in tasks]
        errors = [np.nan if mean is None else max(1 - mean, SMALLEST) for mean in means]
        size, alpha, order = (42, 1, 3) if at == 0 else (22, 0.8, 2)
        ax.scatter(
            errors, rows, size, PALETTE[at], marker=MARKERS[at], label=name, alpha=alpha, zorder=order, linewidths=0
        )
    ax.set_xscale("log")
    ax.set_xlim(1.1, SMALLEST / 1.25)
    ticks = [1, 0.5, 0.1, 0.03, 0.01, 0.001, SMALLEST]
    ax.set_xticks(ticks, [f"{1 - tick:g}" if tick > SMALLEST else f"≥ {1 - tick:g}" for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.axvline(0.5, color=GREY, linewidth=0.8, linestyle="--")
    ax.set_yticks(rows, tasks)
    ax.set_ylim(len(tasks) - 0.4, -0.6)
    ax.tick_params(axis="y", labelsize="small", length=0)
    ax.set(title="AUROC by task (inliers/outliers)", xlabel="AUROC, mean over seeds; dashed: chance")
    ax.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize="small", ncols=3, loc="outside lower center")
    return figure
