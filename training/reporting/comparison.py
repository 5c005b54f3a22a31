"""Runs side by side: the table of what each explains and costs, the same as CSV, and rate against distortion."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.reporting import figures
from training.reporting.card import duration


@dataclass(frozen=True)
class Row:
    """One run. Nats and bits are means over the test split; None is what the model does not have.

    ``bits_standard_error`` is the nats' in bits per dimension; ``exact``: log p(x) itself, no bound on it; ``k`` its
    samples; ``training_seconds`` of the loop or of the closed form; ``milliseconds``: the bundle's default score of one
    image, alone, on one thread.
    """

    name: str
    family: str
    likelihood: str
    exact: bool
    k: int
    images: int
    log_likelihood: float | None
    standard_error: float | None
    bits_per_dim: float | None
    bits_standard_error: float | None
    elbo: float | None
    bound_gap: float | None
    rate: float | None
    distortion: float | None
    parameters: int
    training_seconds: float
    milliseconds: float


def sheet(rows: Sequence[Row]) -> str:
    """All numbers as CSV, unrounded; empty where there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows(["" if value is None else value for value in asdict(row).values()] for row in rows)
    return text.getvalue()


HEADER = (
    "run", "family", "p(x\\|z)", "log p(x), nats", "bits/dim", "elbo, nats", "bound gap, nats", "parameters",
    "training", "ms an image",
)  # fmt: skip


def table(rows: Sequence[Row], data: str) -> str:
    """The table in Markdown, best log p(x) first, families without a likelihood last."""
    ordered = sorted(
        rows, key=lambda row: -math.inf if row.log_likelihood is None else row.log_likelihood, reverse=True
    )
    images = ", ".join(sorted({f"{row.images:,}" for row in rows}))
    lines = [HEADER, ("---",) * 3 + ("---:",) * (len(HEADER) - 3), *map(_cells, ordered)]
    return (
        f"# Comparison on {data}\n\n"
        f"Means over the test split ({images} images), ± one standard error over the images. log p(x) is the IWAE "
        "bound of k samples, or exact (of densities of pixels: at one dequantisation an image). A dash: the model has "
        "no likelihood, or the number is not defined. Nats are comparable between the same kinds of p(x|z) only: "
        "probabilities of binary pixels, probabilities of levels, densities. The time is that of the bundle's default "
        "score of one image, alone, on one thread.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    )


def _cells(row: Row) -> tuple[str, ...]:
    how = "exact" if row.exact else f"k = {row.k:,}"
    nats = "–" if row.log_likelihood is None else f"{_with_error(row.log_likelihood, row.standard_error, 2)} ({how})"
    return (
        row.name,
        row.family,
        row.likelihood,
        nats,
        _with_error(row.bits_per_dim, row.bits_standard_error, 4),
        _number(row.elbo, 2),
        _number(row.bound_gap, 2),
        f"{row.parameters:,}",
        duration(row.training_seconds),
        f"{row.milliseconds:.2f}",
    )


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    return _number(value, digits) + (f" ± {error:.{digits}f}" if value is not None and error is not None else "")


def rate_distortion(rows: Sequence[Row]) -> Figure:
    """Rate against distortion, with lines of equal ELBO = −(rate + distortion) (Alemi et al. 2018, fig. 1).

    A panel for each kind of p(x|z), since nats compare within a kind only. Bijections are left out: they lose nothing,
    and what they say of rate and distortion is a choice of units.
    """
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if has_rate_and_distortion(row):
            kinds.setdefault(row.likelihood, []).append(row)
    figure = Figure(figsize=(1.0 + 4.6 * len(kinds), 4.8), layout="constrained")
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    names = [row.name for of_kind in kinds.values() for row in of_kind]
    for ax, (kind, of_kind) in zip(axes, kinds.items(), strict=True):
        _draw_kind(ax, of_kind, names)
        ax.set_title(f"p(x|z): {kind}", fontsize="medium")
    axes[0].set_ylabel("distortion −E log p(x|z) (nats)")
    figure.suptitle("Rate and distortion, with lines of equal ELBO")
    figure.supxlabel("rate KL(q(z|x) ‖ p(z)) (nats)", fontsize="medium")
    return figure


def has_rate_and_distortion(row: Row) -> bool:
    """Whether the figure shows the run."""
    return row.rate is not None and row.distortion is not None and row.likelihood != "delta"


def _draw_kind(ax: Axes, rows: Sequence[Row], names: Sequence[str]) -> None:
    rates = np.array([row.rate for row in rows], dtype=np.float64)
    distortions = np.array([row.distortion for row in rows], dtype=np.float64)
    (left, right), (low, high) = _limits(rates, distortions), _limits(distortions, rates)
    left = max(0.0, left)
    for total in MaxNLocator(6).tick_values(left + low, right + high):
        ax.plot([left, right], [total - left, total - right], color=figures.GREY, linewidth=0.7, zorder=0)
        at = max(left, total - high)
        if low + 0.04 * (high - low) < total - at <= high and at < right:
            ax.annotate(_signed(-total), (at, total - at), (8, -8), textcoords="offset points", fontsize="x-small",
                        color="#666666", va="center", bbox={"color": "white", "pad": 0.5})  # fmt: skip
    for i, row in enumerate(rows):
        style = names.index(row.name)
        colour, marker = figures.PALETTE[style % len(figures.PALETTE)], figures.MARKERS[style % len(figures.MARKERS)]
        ax.scatter(rates[i], distortions[i], s=46, color=colour, marker=marker, label=row.name, zorder=2)
    ax.set(xlim=(left, right), ylim=(low, high))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.legend(fontsize="small", framealpha=0.9, edgecolor="none")


def _limits(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    margin = max(1.0, 0.25 * float(np.ptp(values)), 0.08 * float(np.ptp(others)))
    return float(values.min()) - margin, float(values.max()) + margin


def _signed(value: float) -> str:
    return f"{value + 0.0:.4g}".replace("-", "−")
