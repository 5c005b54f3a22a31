"""The report's figures. Each function draws one matplotlib Figure from plain arrays; pixels are in [0,1].

Colours are those of Okabe & Ito (2008), told apart with any common colour blindness; images share one grey scale.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
PALETTE = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#A89A00", "#000000", "#8C510A", "#762A83")
MARKERS = "os^vDP*Xph"
CELL, GAP = 64, 4  # in a grid: sides of at least so many pixels an image (whole multiples of its own), grey between
FRAME = 0.8  # that grey, and what is around a grid: white pictures end somewhere, black ones too
DPI = 120
FEW_DIMENSIONS = 6  # a figure over fewer has room at its sides
LARGEST = 1e100  # axes of larger numbers overflow
GRID_LABELS = 4  # of the pictures of a latent plane, every so many values have a label

History = Sequence[Mapping[str, float]]


def png(figure: Figure) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    return buffer.getvalue()


def drawable(*values: np.ndarray) -> bool:
    """Whether there are numbers, and all can be drawn: a model that has diverged may have others."""
    return all(array.size > 0 and bool((np.abs(array.astype(np.float64)) < LARGEST).all()) for array in values)


BOUND_CURVES = (
    "bound on log p(x)",
    (("train_elbo_sampled", "train, ELBO (sampled)"), ("bound", "validation, objective")),
)
EXACT_CURVES = ("log p(x)", (("train_elbo_sampled", "train (sampled)"), ("elbo", "validation")))
RATE_CURVES = ("rate KL(q(z|x) ‖ p(z))", (("train_rate_sampled", "train (sampled)"), ("rate", "validation")))
DISTORTION_CURVES = (
    "distortion −E log p(x|z)",
    (("train_distortion_sampled", "train (sampled)"), ("distortion", "validation")),
)
ERROR_CURVES = ("reconstruction error", DISTORTION_CURVES[1])
Curves = tuple[str, tuple[tuple[str, str], tuple[str, str]]]


def loss_curves(history: History, panels: Sequence[Curves], unit: str = "nats") -> Figure:
    """Each of ``panels`` by epoch; the first epochs, which dwarf the rest, may lie below the axis.

    Numbers that are not finite are gaps.
    """
    figure = Figure(figsize=(3.5 * max(len(panels), 1.6), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    epochs = np.array([row["epoch"] for row in history])
    for ax, (title, lines) in zip(axes, panels, strict=True):
        values = [np.array([row[key] for row in history]) for key, _ in lines]
        for series, (_, label), colour in zip(values, lines, (GREY, BLUE), strict=True):
            ax.plot(epochs, series, color=colour, label=label, linewidth=1.4, marker="o" if len(epochs) < 3 else None)
        ax.set(title=title, xlabel="epoch", ylabel=f"{unit}, mean of a row")
        _limit(ax, np.concatenate([series[len(series) // 20 :] for series in values]))
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize="small")
    return figure


def _limit(ax: Axes, values: np.ndarray) -> None:
    """y limits that show ``values`` with a margin, as far as they can be drawn."""
    values = values[np.abs(values.astype(np.float64)) < LARGEST]
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    margin = max(0.06 * (high - low), 1e-6 * abs(high)) or 1.0
    ax.set_ylim(low - margin, high + margin)


def reconstructions(x: np.ndarray, target: np.ndarray | None, mean: np.ndarray) -> Figure:
    """Rows: inputs x, what the density was evaluated at (None if that is x), E[x|z]; all [N,C,H,W]."""
    rows = {"input": x, **({} if target is None else {"binarised": target}), "E[x|z]": mean}
    figure = _image_figure(len(rows), len(x), x.shape[1:])
    ax = figure.subplots()
    _show(ax, np.concatenate(list(rows.values())), columns=len(x))
    _ticks(ax, list(rows), [], x.shape)
    ax.set_title("Reconstructions of test images")
    return figure


def samples(mean: np.ndarray, title: str, columns: int = 10) -> Figure:
    """A grid of E[x|z] [N,C,H,W] at draws of the prior."""
    figure = _image_figure(-(-len(mean) // columns), columns, mean.shape[1:])
    ax = figure.subplots()
    _show(ax, mean, columns)
    ax.set_title(title)
    return figure


def traversal(mean: np.ndarray, values: Sequence[float], rows: Sequence[str]) -> Figure:
    """E[x|z] [D,V,C,H,W] as one latent dimension a row goes through ``values`` deviations; the others stay."""
    figure = _image_figure(len(rows), len(values), mean.shape[2:], labels=1.3)
    ax = figure.subplots()
    _show(ax, mean.reshape(-1, *mean.shape[2:]), columns=len(values))
    _ticks(ax, rows, [f"{value:+g}" for value in values], mean.shape)
    ax.set_title("Latent traversal: one dimension a row, the others at their mean")
    ax.set_xlabel("standard deviations of the dimension")
    return figure


def score_histogram(
    calibration: np.ndarray, test: np.ndarray, thresholds: Mapping[float, float], name: str, unit: str = "nats"
) -> Figure:
    """Densities of held-out and test scores, and the threshold for each false-positive rate."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    ax = figure.subplots()
    both = np.concatenate([calibration, test])
    low, high = both.min(), np.quantile(both, 0.998)
    high = max(high, *(thresholds.values() or [high]))
    high = max(high, low + 1e-6 * max(1.0, abs(low)))  # equal scores have a bin, too
    edges = np.linspace(low, high + 0.03 * (high - low), 60 if len(both) > 2000 else 25).tolist()
    test_label, label = f"test, n = {len(test):,}", f"calibration, n = {len(calibration):,}"
    ax.hist(test, edges, density=True, color=BLUE, alpha=0.45, label=test_label)
    ax.hist(calibration, edges, density=True, color="black", histtype="step", linewidth=1.3, label=label)
    for (rate, threshold), style in zip(sorted(thresholds.items(), reverse=True), ("-", "--", ":", "-."), strict=False):
        text = f"{rate:.1%} threshold: {threshold:.4g} {unit}".replace(".0%", "%")
        ax.axvline(threshold, color=RED, linestyle=style, label=text)
    ax.set(
        title=f"Anomaly score “{name}” of inliers",
        xlabel=f"score ({unit}, higher is more anomalous)",
        ylabel="density",
    )
    ax.legend(framealpha=0.9, edgecolor="none", fontsize="small")
    return figure


def _by_dimension(count: int) -> tuple[Figure, Axes]:
    """A figure whose axis runs over so many latent dimensions, each of them about as wide if there are few."""
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    ax = figure.subplots()
    empty = max(0, FEW_DIMENSIONS - count) / 2
    ax.set_xlim(0.4 - empty, count + 0.6 + empty)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, ax


def rate_by_dimension(rates: np.ndarray, title: str, label: str) -> Figure:
    """What each dimension carries [L], in nats, in falling order; ``title`` is given their sum."""
    figure, ax = _by_dimension(len(rates))
    ordered = np.sort(rates)[::-1]
    ax.bar(np.arange(1, len(ordered) + 1), ordered, color=BLUE, width=0.8)
    ax.set(title=title.format(rates.sum()), xlabel="latent dimension, by rank", ylabel=label)
    ax.grid(axis="y", alpha=0.3)
    return figure


def aggregate(
    mean: np.ndarray, variance: np.ndarray, prior_mean: np.ndarray, prior_variance: np.ndarray, order: np.ndarray
) -> Figure:
    """Mean and deviation of the aggregate posterior by dimension [L], in ``order``, against the prior's."""
    figure, ax = _by_dimension(len(mean))
    at, size = np.arange(1, len(mean) + 1), 3 if len(mean) > 2 * FEW_DIMENSIONS else 6
    for name, (centre, spread), colour, shift, marker in (
        ("prior p(z)", (prior_mean, prior_variance), GREY, 0.15, "s"),
        ("aggregate posterior q(z)", (mean, variance), BLUE, -0.15, "o"),
    ):
        deviation = np.sqrt(spread[order])
        ax.errorbar(at + shift, centre[order], deviation, color=colour, fmt=marker, markersize=size, label=name)
    if len(mean) <= 2 * FEW_DIMENSIONS:
        ax.set_xticks(at, [f"z[{j}]" for j in order])
    ax.set(
        title="The latents of all test rows together, against the prior",
        xlabel="latent dimension, by rank",
        ylabel="mean ± standard deviation",
    )
    ax.grid(axis="y", alpha=0.3)
    figure.legend(frameon=False, fontsize="small", ncols=2, loc="outside lower right")
    return figure


def latent_plane(
    loc: np.ndarray,
    labels: np.ndarray | None,
    names: Sequence[str],
    mean: np.ndarray,
    values: tuple[Sequence[float], Sequence[float]],
    scale: str,
) -> Figure:
    """Left, posterior means [N,2] by label; right, E[x|z] [V,V,C,H,W] over the plane, z[1] growing upwards.

    ``values`` are the grid's z[0] and z[1], ``scale`` says how they were chosen.
    """
    figure = Figure(figsize=(13.5, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _scatter(left, loc, labels, names, values, GRID_LABELS)
    _show(right, mean[::-1].reshape(-1, *mean.shape[2:]), columns=mean.shape[1])
    first, second = ([f"{value:+.2g}" for value in grid] for grid in values)
    _ticks(right, second[::-1], first, mean.shape, every=GRID_LABELS)
    right.set(title=f"E[x|z] over the latent plane, {scale}", xlabel="z[0]", ylabel="z[1]")
    return figure


def latent_scatter(
    loc: np.ndarray,
    labels: np.ndarray | None,
    names: Sequence[str],
    values: tuple[Sequence[float], Sequence[float]],
    every: int,
) -> Figure:
    """Posterior means [N,2] on the left half of a figure, lines at the grid's ``values`` that are labelled."""
    figure = Figure(figsize=(13.5, 6.2))
    _scatter(figure.add_axes((0.05, 0.1, 0.38, 0.8)), loc, labels, names, values, every)
    return figure


def _scatter(
    ax: Axes,
    loc: np.ndarray,
    labels: np.ndarray | None,
    names: Sequence[str],
    values: tuple[Sequence[float], Sequence[float]],
    every: int,
) -> None:
    """Posterior means [N,2], by label where there are labels, over lines at every so many of the grid's values."""
    shown = np.zeros(len(loc), dtype=np.int64) if labels is None else labels
    size = float(np.clip(20_000 / len(loc), 16, 50))
    for label in np.unique(shown):
        rows = shown == label
        name = None if labels is None else (names[label] if 0 <= label < len(names) else str(label))
        colour, marker = PALETTE[label % len(PALETTE)], MARKERS[label % len(MARKERS)]
        first, second = loc[rows].T
        ax.scatter(first, second, s=size, color=colour, marker=marker, alpha=0.7, linewidths=0, label=name)
    for draw, grid in zip((ax.axvline, ax.axhline), values, strict=True):
        for value in grid[::every]:
            draw(value, color=GREY, linewidth=0.6, alpha=0.6, zorder=0)
    ax.set(title="Posterior means of test rows", xlabel="z[0]", ylabel="z[1]", aspect="equal")
    if labels is not None:
        ax.legend(title="label", frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _image_figure(rows: int, columns: int, shape: tuple[int, ...], labels: float = 0.9) -> Figure:
    """A figure for a grid of images, at most 9 inches wide and 9 high."""
    height, width = shape[-2:]
    cell = min(0.85, 8.5 / columns, 8.0 / (rows * height / width))
    size = (columns * cell + labels, max(rows * cell * height / width + 0.75, 1.4))
    return Figure(figsize=size, layout="constrained")


def _show(ax: Axes, images: np.ndarray, columns: int) -> None:
    """Images [N,C,H,W] in [0,1] in a grid, all on one grey scale."""
    canvas = tile(images, columns)
    ax.imshow(canvas[..., 0] if canvas.shape[-1] == 1 else canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(color=str(FRAME), linewidth=2)


def _ticks(ax: Axes, rows: Sequence[str], columns: Sequence[str], shape: tuple[int, ...], every: int = 1) -> None:
    """Names beside the rows and below the columns of a grid."""
    height, width = (side * _zoom(shape) + GAP for side in shape[-2:])
    at_rows = [((i + 0.5) * height, name) for i, name in enumerate(rows)]
    at_columns = [((i + 0.5) * width, name) for i, name in enumerate(columns)]
    for axis, named in ((ax.yaxis, at_rows[::every]), (ax.xaxis, at_columns[::every])):
        axis.set_ticks([at for at, _ in named], [name for _, name in named])
        axis.set_tick_params(length=0, labelsize="small")


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [N,C,H,W] row by row on one canvas [H',W',C], enlarged by a whole factor, grey between them."""
    zoomed = images.repeat(_zoom(images.shape), axis=2).repeat(_zoom(images.shape), axis=3)
    count, channels, height, width = zoomed.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), FRAME)
    for i, image in enumerate(zoomed):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = np.clip(image, 0, 1).transpose(1, 2, 0)
    return canvas


def _zoom(shape: tuple[int, ...]) -> int:
    """The whole factor that brings the larger side of images […,H,W] to CELL pixels or more."""
    return max(1, -(-CELL // max(shape[-2:])))
