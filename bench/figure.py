"""The throughput-against-latency curve as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt

LINES = {"p50_ms": "median", "p90_ms": "90%", "p99_ms": "99%", "p99.9_ms": "99.9%"}
COLOURS = ("#1b6ca8", "#5aa469", "#d98c21", "#b23a48")


def draw(curve: dict[str, Any], path: Path) -> None:
    """Write the curve of ``bench.curve`` to ``path``, a PNG."""
    points = [point for point in curve["points"] if point["requests"]]
    rates = [point["offered_per_second"] for point in points]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (name, label), colour in zip(LINES.items(), COLOURS, strict=True):
        axes.plot(rates, [point[name] for point in points], marker="o", markersize=4, color=colour, label=label)
    peak = curve["peak_requests_per_second"]
    axes.axvline(peak / 2, color="0.7", linewidth=1, linestyle="--")
    axes.annotate(
        "half the peak", (peak / 2, 1), xycoords=("data", "axes fraction"), xytext=(4, -12),
        textcoords="offset points", color="0.4", fontsize=9,
    )  # fmt: skip
    axes.set(yscale="log", xlabel="requests/s offered (Poisson arrivals)", ylabel="latency, ms", title=curve["request"])
    axes.set_xlim(left=0)
    axes.grid(which="major", color="0.9")
    axes.legend(title="of requests within", loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
