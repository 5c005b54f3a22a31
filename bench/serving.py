"""The service against the limit: every verb, wire format, batch and number of connections.

The real ``vaeserve serve`` runs in processes of its own with its default protections and its log. Before it is timed,
all formats must have got the same bytes in answer.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bodies import COMMON, FORMATS
from bench.compare import OFTEN, Group, Progress, Result, Subject
from bench.raw import reference_pixels
from bench.requests import MIN_ROWS, VERBS, cases, check_answers, images_sent
from bench.servers import ROOT, Installation, vae_server
from bench.stage import Stage

MANY = 4
"""Connections that send batches of 64: enough to keep the workers busy."""


PLANNED = {("encode", 1, 1), ("encode", 64, 1), ("encode", MANY, 64), ("score", 16, 1)}
"""Verbs, connections and images a request of the plan's rows (bench.table): measured OFTEN times as often as others."""

LONG = {"score": 3}
"""How many times as long blocks are of verbs that take ten times as long as others: the first and the last answers of a
connection, which are not in full batches, are a small part of a block."""


@dataclass(frozen=True)
class Selection:
    """Which cells are measured: ``loads`` are (connections, images a request)."""

    verbs: Sequence[str] = tuple(VERBS)
    formats: Collection[str] = COMMON
    loads: Sequence[tuple[int, int]] = ((1, 1), (16, 1), (64, 1), (1, 64), (MANY, 64))


FULL = Selection(formats=tuple(FORMATS), loads=(*Selection().loads, (16, 64), (64, 64)))
BIG = (
    Selection(verbs=("encode",), formats=("octet-stream",), loads=((1, 1), (64, 1), (MANY, 64))),
    Selection(verbs=("score",), formats=("octet-stream",), loads=((1, 1),)),
)
"""What is measured of the big model: a batch of scores would take half a minute."""


def cells(stage: Stage, selection: Selection, progress: Progress) -> list[Result]:
    """Measure the selection."""
    groups = [
        group(stage, verb, connections, batch, selection.formats)
        for verb in selection.verbs
        for connections, batch in selection.loads
        if batch >= MIN_ROWS.get(verb, 1)
    ]
    return stage.arena.measure(groups, progress)


def group(stage: Stage, verb: str, connections: int, batch: int, formats: Collection[str]) -> Group:
    """One verb's requests in these formats, their answers checked against each other."""
    manifest, server = stage.bundle.manifest, stage.server
    pixels, address = reference_pixels(stage.bundle, batch), (server.host, server.port)
    made = cases(manifest.name, verb, pixels, manifest.signature.latent_dim, address, formats)
    check_answers(made)
    subjects = [
        Subject({"model": manifest.name, "request": case.format, "answer": case.answer}, case.target, server)
        for case in made
    ]
    often = OFTEN if (verb, connections, batch) in PLANNED else 1
    return Group(verb, batch, connections, subjects, stage.bare(images_sent(verb, batch)), often, LONG.get(verb, 1))


def memory(stage: Stage) -> dict[str, Any]:
    """Bytes of the process that was started (``first``) and of each that descends from it (``others``): PSS and RSS."""
    return {"workers": stage.effort.workers, **stage.server.memory()}


def cold_start(repository: Path, workers: int, count: int) -> dict[str, float]:
    """Medians over so many starts: seconds from the start of the process to ready, and of the imports alone."""
    Installation().compile()
    imports, ready = [], []
    for _ in range(count):
        imports.append(import_seconds())
        with vae_server(repository, workers) as server:
            ready.append(server.seconds_to_ready)
    return {"ready_seconds": statistics.median(ready), "import_seconds": statistics.median(imports)}


def import_seconds() -> float:
    """Time of ``import service.api.app`` in a fresh interpreter, by its own clock."""
    code = "import time; t = time.perf_counter(); import service.api.app; print(time.perf_counter() - t)"
    return float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))
