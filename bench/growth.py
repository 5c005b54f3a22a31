"""How cost grows: CPU time a request by image size, latent size, images a request and samples a score.

The load is light (two connections), so that nothing of it is the wait for others. Raw ONNX Runtime beside it is one
thread that runs the same graphs once a request.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bodies import FORMATS
from bench.compare import Progress
from bench.crew import Crew, Layout
from bench.load import Target, drive
from bench.models import LATENTS, PLAIN, SIDES, growth_name
from bench.raw import bound, reference_pixels
from bench.requests import request
from bench.servers import Server, vae_server
from bench.stage import Effort, find_bundle, load_process

CONNECTIONS = 2
BATCHES, SAMPLES = (1, 8, 64, 256), (1, 16, 64, 256)


@dataclass(frozen=True)
class Point:
    """One request of the growth: what ``grows`` and to what ``value``, of which model, verb, images and samples."""

    grows: str
    value: int
    side: int
    latent_dim: int
    batch: int = 1
    k: int | None = None  # score by the bound with so many samples; None: encode

    @property
    def model(self) -> str:
        """Its name."""
        return growth_name(self.side, self.latent_dim)

    @property
    def path(self) -> str:
        """Of the request."""
        verb = "encode" if self.k is None else f"score?score=elbo&k={self.k}"
        return f"/v1/models/{self.model}/{verb}"

    @property
    def raw_verb(self) -> str:
        """What raw ONNX Runtime is asked for."""
        return "encode" if self.k is None else bound(self.k)


def points() -> Iterator[Point]:
    """All of them; what does not grow is as in PLAIN."""
    side, latents = PLAIN
    yield from (Point("side of a grey square, encode", size, size, latents) for size in SIDES)
    yield from (Point("latent dimensions, encode", size, side, size) for size in sorted({*LATENTS, latents}))
    yield from (Point("images a request, encode", batch, side, latents, batch=batch) for batch in BATCHES)
    yield from (Point("samples k, score by the ELBO", k, side, latents, k=k) for k in SAMPLES)


def growth(repository: Path, effort: Effort, progress: Progress) -> list[dict[str, Any]]:
    """CPU ms a request of the service, and of raw ONNX Runtime on the same rows: medians over the rounds."""
    asked = list(points())
    paths = {point.model: find_bundle(repository, point.model).path for point in asked}
    crews = {model: Crew(path, Layout(1, 1)) for model, path in paths.items()}
    try:
        with vae_server(repository, effort.workers) as server, load_process() as elsewhere:
            targets = [_target(point, repository, server) for point in asked]
            for target in targets:
                elsewhere(drive, target, CONNECTIONS, 0)
            found: dict[Point, list[tuple[float, float]]] = {point: [] for point in asked}
            for step in progress([*range(len(asked))] * effort.rounds, "growth of cost"):
                point, before = asked[step], server.cpu_seconds()
                load = elsewhere(drive, targets[step], CONNECTIONS, effort.seconds)
                cost = (server.cpu_seconds() - before) / load.requests
                raw = crews[point.model].block(point.raw_verb, point.batch, effort.seconds)
                found[point].append((cost, raw.cpu_per_image * point.batch))
    finally:
        for crew in crews.values():
            crew.stop()
    return [_summary(point, costs) for point, costs in found.items()]


def _target(point: Point, repository: Path, server: Server) -> Target:
    pixels = reference_pixels(find_bundle(repository, point.model), point.batch)
    answer = "npy" if point.k is None else "json"
    return Target(server.host, server.port, request(point.path, answer, *FORMATS["octet-stream"](pixels)))


def _summary(point: Point, costs: list[tuple[float, float]]) -> dict[str, Any]:
    service, raw = (1e3 * statistics.median(column) for column in zip(*costs, strict=True))
    return {"grows": point.grows, "value": point.value, "server_cpu_ms": service, "raw_cpu_ms": raw}
