"""Latency against throughput: an open loop at fractions of the peak that a closed loop of 64 connections found."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from bench.bodies import FORMATS
from bench.compare import Progress
from bench.load import Target
from bench.open_loop import OpenLoad, arrivals, drive_open
from bench.raw import reference_pixels
from bench.requests import request
from bench.stage import Stage

CONNECTIONS = 64
HALF = 0.5
FRACTIONS = (0.1, 0.25, HALF, 0.6, 0.7, 0.8, 0.9, 1.0)
STRETCH = 4  # blocks are so many times as long as those of a closed loop: a p99 needs many requests
PERCENTILES = (50, 90, 99, 99.9)


def curve(stage: Stage, progress: Progress, fractions: tuple[float, ...] = FRACTIONS) -> dict[str, Any]:
    """One encode a request, uint8 in and npy out; percentiles in ms are medians over the rounds."""
    target, effort = one_image(stage), stage.effort
    peak = statistics.median(stage.arena.client(target, CONNECTIONS, effort.seconds).rate for _ in range(3))
    order, blocks = np.random.RandomState(0), dict[float, list[OpenLoad]]()
    steps = [(each, fractions[place]) for each in range(effort.rounds) for place in order.permutation(len(fractions))]
    for step in progress(list(range(len(steps))), "open loop"):
        seed, fraction = step, steps[step][1]
        moments = arrivals(fraction * peak, STRETCH * effort.seconds, seed)
        blocks.setdefault(fraction, []).append(stage.elsewhere(drive_open, target, CONNECTIONS, moments.tolist()))
    return {
        "request": "encode, octet-stream → npy, one image",
        "connections": CONNECTIONS,
        "peak_requests_per_second": peak,
        "points": [point(fraction, peak, blocks[fraction]) for fraction in sorted(blocks)],
    }


def one_image(stage: Stage) -> Target:
    """An encode of one image, uint8 in and npy out."""
    path = f"/v1/models/{stage.bundle.manifest.name}/encode"
    body = request(path, "npy", *FORMATS["octet-stream"](reference_pixels(stage.bundle, 1)))
    return Target(stage.server.host, stage.server.port, body)


def point(fraction: float, peak: float, blocks: list[OpenLoad]) -> dict[str, Any]:
    """One fraction of the peak, over its rounds. Where all was refused there is no latency, but NaN."""
    rounds = [
        {f"p{q:g}_ms": 1e3 * float(np.percentile(block.latencies or [np.nan], q)) for q in PERCENTILES}
        for block in blocks
    ]
    answered = sum(len(block.latencies) for block in blocks)
    return {
        "fraction": fraction,
        "offered_per_second": fraction * peak,
        "answered_per_second": answered / sum(block.seconds for block in blocks),
        "requests": answered,
        "refused": sum(block.refused for block in blocks),
        **{name: statistics.median(each[name] for each in rounds) for name in rounds[0]},
        "client_late_p99_ms": 1e3 * statistics.median(block.late for block in blocks),
        "rounds": rounds,
    }
