"""What a measurement needs running: the service, bare HTTP beside it, raw ONNX Runtime, and the process of the load."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from bench.compare import Arena
from bench.crew import RawRuntime
from bench.load import Load, Target, drive
from bench.raw import reference_pixels
from bench.requests import hello_request
from bench.servers import Server, hello_server, vae_server
from service.bundle.files import Bundle, open_bundle
from service.repository.model_repository import find_bundles
from service.resources import available_cpus

T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """How long it may take: blocks of ``seconds``, ``rounds`` of them, by so many processes of every server."""

    seconds: float
    rounds: int
    workers: int


@dataclass(frozen=True)
class Stage:
    """Everything that runs while one bundle is measured. ``elsewhere`` calls a function in the load's process."""

    bundle: Bundle
    server: Server
    hello: Server
    arena: Arena
    effort: Effort
    elsewhere: Callable[..., Any]

    def bare(self, batch: int) -> Target:
        """A POST to bare HTTP of as many bytes as so many images have in uint8, a GET for none."""
        size = reference_pixels(self.bundle, batch).nbytes if batch else 0
        return Target(self.hello.host, self.hello.port, hello_request(size))


def find_bundle(repository: Path, model: str) -> Bundle:
    """The newest version of that model. Ends the program, in words, where there is none."""
    found = [open_bundle(path) for path in find_bundles(repository)]
    versions = {int(bundle.manifest.version): bundle for bundle in found if bundle.manifest.name == model}
    if not versions:
        names = sorted({bundle.manifest.name for bundle in found})
        sys.exit(f"no model {model!r} in {repository}; found: {', '.join(names) or 'none'}")
    return versions[max(versions)]


@contextmanager
def stage(repository: Path, model: str, effort: Effort) -> Iterator[Stage]:
    """Start it all, and end it."""
    bundle = find_bundle(repository, model)
    with (
        vae_server(repository, effort.workers) as server,
        hello_server(effort.workers) as hello,
        RawRuntime(bundle.path, available_cpus()) as raw,
        load_process() as elsewhere,
    ):

        def client(target: Target, connections: int, seconds: float) -> Load:
            load: Load = elsewhere(drive, target, connections, seconds)
            return load

        arena = Arena(client, raw, effort.seconds, effort.rounds)
        yield Stage(bundle, server, hello, arena, effort, elsewhere)


@contextmanager
def load_process() -> Iterator[Callable[..., Any]]:
    """A process that calls what it is given: the load must not share an interpreter with what measures it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

        def elsewhere(function: Callable[..., T], *arguments: Any) -> T:
            return pool.submit(function, *arguments).result()

        yield elsewhere
