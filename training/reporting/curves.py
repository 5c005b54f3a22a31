"""Figures of vectors and signals, where training.reporting.figures has pictures: values [N,C,H,W] are 1×1×D or C×1×T.

Signals are drawn as lines over the step, one colour a channel; vectors as points over their features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.reporting.figures import BLUE, GREY, PALETTE

NAMED = 16  # features whose names fit below an axis
CHANNELS = 4  # of a signal that are drawn
SHADES = colormaps["cividis"]


def reconstructions(x: np.ndarray, mean: np.ndarray, features: Sequence[str] | None, unit: str) -> Figure:
    """Inputs x in grey and E[x|z] in colour, both [N,C,1,T], a panel a row."""
    figure, axes = _grid(len(x), 5, features)
    for ax, row, fitted in zip(axes, x, mean, strict=False):
        for channel in range(min(len(row), CHANNELS)):
            _draw(ax, row[channel, 0], GREY, None if channel else "input", filled=True)
            _draw(ax, fitted[channel, 0], PALETTE[channel], None if channel else "E[x|z]")
    _legend(figure, axes[0])
    return _titled(figure, "Reconstructions of test rows", unit)


def samples(mean: np.ndarray, features: Sequence[str] | None, unit: str, title: str) -> Figure:
    """E[x|z] [N,C,1,T] at draws of the prior, a panel each."""
    figure, axes = _grid(len(mean), 5, features)
    for ax, row in zip(axes, mean, strict=False):
        for channel in range(min(len(row), CHANNELS)):
            _draw(ax, row[channel, 0], PALETTE[channel])
    return _titled(figure, title, unit)


def traversal(
    mean: np.ndarray, values: Sequence[float], rows: Sequence[str], features: Sequence[str] | None, unit: str
) -> Figure:
    """E[x|z] [D,V,C,1,T] as one dimension a panel goes through ``values`` deviations; of a signal the first channel."""
    figure, axes = _grid(len(rows), 4, features)
    low, high = min(values), max(values)
    for ax, name, curves in zip(axes, rows, mean, strict=False):
        for value, row in zip(values, curves, strict=True):
            colour = SHADES((value - low) / (high - low))
            label = f"{value:+g}" if value in (low, 0, high) else None
            ax.plot(row[0, 0], color=colour, linewidth=1.1, label=label)
        ax.set_title(name, fontsize="small")
    _legend(figure, axes[0])
    return _titled(figure, "Latent traversal: a dimension a panel, by deviations", unit)


def latent_plane(
    scatter: Figure, mean: np.ndarray, values: tuple[Sequence[float], Sequence[float]], scale: str
) -> Figure:
    """Adds to a figure of one axis E[x|z] [V,V,C,1,T] over the latent plane, z[1] growing upwards."""
    size = len(mean)
    grid = scatter.add_gridspec(size, size, left=0.58, right=0.99, bottom=0.1, top=0.9, wspace=0.05, hspace=0.05)
    low, high = float(mean.min()), float(mean.max())
    for row in range(size):
        for column in range(size):
            ax = scatter.add_subplot(grid[row, column])
            _draw(ax, mean[size - 1 - row, column, 0, 0], BLUE, width=0.8, marked=False)
            ax.set(xticks=[], yticks=[], ylim=(low, high))
            if row == size - 1 and column % 2 == 0:
                ax.set_xlabel(f"{values[0][column]:+.2g}", fontsize="x-small")
            if column == 0 and row % 2 == 0:
                ax.set_ylabel(f"{values[1][size - 1 - row]:+.2g}", fontsize="x-small")
    scatter.text(0.785, 0.94, f"E[x|z] over the latent plane, {scale}", ha="center", fontsize="large")
    return scatter


def _grid(count: int, columns: int, features: Sequence[str] | None) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = -(-count // columns)
    named = features is not None and len(features) <= NAMED
    figure = Figure(figsize=(2.3 * columns + 0.6, 1.6 * rows + (1.4 if named else 0.7)), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for ax in axes[count:]:
        ax.set_visible(False)
    for ax in axes:
        ax.tick_params(labelsize="x-small")
        if named and features is not None:
            ax.set_xticks(range(len(features)), features, rotation=90)
    return figure, axes


def _legend(figure: Figure, ax: Axes) -> None:
    """Below all panels, of one of them."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize="small", ncols=3, loc="outside lower right")


def _draw(
    ax: Axes,
    values: np.ndarray,
    colour: str,
    label: str | None = None,
    filled: bool = False,
    width: float = 1.3,
    marked: bool = True,
) -> None:
    """One row: a line, with points where it has few numbers."""
    marker = ("s" if filled else "o") if marked and len(values) <= 2 * NAMED else None
    ax.plot(values, color=colour, linewidth=width, marker=marker, markersize=3, label=label)


def _titled(figure: Figure, title: str, unit: str) -> Figure:
    figure.suptitle(title, fontsize="medium")
    figure.supylabel(unit, fontsize="small")
    return figure
