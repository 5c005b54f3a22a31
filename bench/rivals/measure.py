"""Each of the other servers beside ours, in the same rounds: one at a time, its answers checked first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.compare import OFTEN, Group, Progress, Subject
from bench.load import LoadError, Target
from bench.raw import reference_pixels
from bench.requests import ask
from bench.rivals.peers import NAIVE, PEERS, Peer
from bench.rivals.wires import Wire, ours
from bench.servers import Server, ServerFailedError
from bench.serving import MANY
from bench.stage import Stage

LOADS = ((64, 1), (1, 1), (MANY, 64))
TOLERANCE = 1e-5
OURS = "vaeserve"


class OtherAnswersError(RuntimeError):
    """The server says something else of the same images: its speed is of no interest."""


def rivals(stage: Stage, progress: Progress, peers: Sequence[Peer] = PEERS) -> list[dict[str, Any]]:
    """What every peer did, and we beside it; one that is not there, or fails, is left out with a reason."""
    return [_one(stage, peer, progress) for peer in peers]


def _one(stage: Stage, peer: Peer, progress: Progress) -> dict[str, Any]:
    facts = {"name": peer.name, "version": peer.version, "settings": peer.settings}
    if peer.version is None:
        return {**facts, "left_out": f"not installed: python -m bench.rivals install {peer.environment}"}
    try:
        encoder = stage.bundle.path / stage.bundle.manifest.graphs["encoder"]
        with Server(peer.command(encoder, stage.effort.workers)) as server:
            check(stage, peer, server)
            groups = [_group(stage, peer, server, *load) for load in LOADS]
            return {**facts, "results": stage.arena.measure(groups, progress)}
    except (ServerFailedError, LoadError, OtherAnswersError, TimeoutError) as error:
        return {**facts, "left_out": f"{type(error).__name__}: {_last_line(str(error))}"}


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip(" ;")), "no word")


def check(stage: Stage, peer: Peer, server: Server, batch: int = 3) -> None:
    """All wires of both must tell the same loc of a few images. Raises OtherAnswersError, LoadError."""
    pixels, latent_dim = reference_pixels(stage.bundle, batch), stage.bundle.manifest.signature.latent_dim
    expected = None
    for name, wire, at in _wires(stage, peer, server):
        found = wire.loc(ask(Target(at.host, at.port, wire.ask(pixels)), name), latent_dim)
        if expected is None:
            expected = found
        elif found.shape != expected.shape or np.abs(found - expected).max() > TOLERANCE:
            raise OtherAnswersError(f"{name}, {wire.name}: another loc than {OURS} of the same images")


def _wires(stage: Stage, peer: Peer, server: Server) -> list[tuple[str, Wire, Server]]:
    """Ours first."""
    own = [(OURS, wire, stage.server) for wire in ours(stage.bundle.manifest.name)]
    return [*own, *((peer.name, wire, server) for wire in peer.wires)]


def _group(stage: Stage, peer: Peer, server: Server, connections: int, batch: int) -> Group:
    pixels = reference_pixels(stage.bundle, batch)
    subjects = [
        Subject({"server": name, "wire": wire.name}, Target(at.host, at.port, wire.ask(pixels)), at)
        for name, wire, at in _wires(stage, peer, server)
    ]
    planned = peer is NAIVE and (connections, batch) == (64, 1)
    return Group("encode", batch, connections, subjects, stage.bare(batch), OFTEN if planned else 1)
