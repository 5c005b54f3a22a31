"""Checkpoints: one file, written atomically, holding all that an exact resume needs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from training.config import Config
from training.errors import CheckpointError

FORMAT = 1
FILE = "checkpoint.pt"
EARLIER_LIMITS = (2000.0, 1e5)
"""``optimiser.skip_above`` of earlier versions: by default, and in the presets of flows."""
EARLIER_NAMES = {f"train_{name}": f"train_{name}_sampled" for name in ("elbo", "rate", "distortion")}
"""Columns of the history that earlier versions gave the name of what they estimate."""


def identity(config: Config) -> dict[str, Any]:
    """The part of the configuration that must not change between a run and its resume."""
    tree = config.model_dump(mode="json", exclude={"run": {"threads", "validate_every", "checkpoint_seconds"}})
    for key in ("description", "evaluate", "score", "corruption"):  # the last has a checkpoint of its own
        tree.pop(key)
    tree["data"].pop("directory", None)
    if tree["backbone"]:
        tree["backbone"].pop("path")  # its hash says which it is
    return tree


def save_checkpoint(folder: Path, config: Config, content: dict[str, Any]) -> None:
    """Write ``content`` (tensors and plain values) so that a crash leaves the old checkpoint or the new one."""
    write_content(folder / FILE, {"format": FORMAT, "identity": identity(config), **content})


def load_checkpoint(folder: Path, config: Config | None = None) -> dict[str, Any] | None:
    """The checkpoint of a run, or None where there is none.

    Raises CheckpointError: unreadable, or made with another configuration than ``config`` (the keys are named).
    """
    path = folder / FILE
    if not path.is_file():
        return None
    content = read_content(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {content.get('format')!r}: expected {FORMAT}")
    if config is not None:
        stored = _completed(content["identity"], config)
        check_identity(path, stored, identity(config), "use --restart to discard it")
    if "history" in content:
        content["history"] = [_renamed(row) for row in content["history"]]
    return content


def check_identity(path: Path, stored: Any, wanted: dict[str, Any], remedy: str) -> None:
    """Raise CheckpointError where the file at ``path`` is of another run than ``wanted`` describes, naming the keys."""
    changed = _differences(stored, wanted)
    if changed:
        text = f"{path} was made with another configuration ({', '.join(changed)})"
        raise CheckpointError(f"{text}: {remedy}, or use another --run-dir")


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values so that a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_content(path: Path) -> dict[str, Any]:
    """What ``write_content`` wrote, on the CPU. Raises CheckpointError for a file that cannot be read."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file: all mean the same here
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return content


def _renamed(row: dict[str, float]) -> dict[str, float]:
    """A row of the history under the names of this version."""
    return {EARLIER_NAMES.get(name, name): value for name, value in row.items()}


def digest_of(weights: dict[str, Tensor]) -> str:
    """SHA-256, hex, of weights by name, on the CPU."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _completed(stored: dict[str, Any], wanted: Config) -> dict[str, Any]:
    """A stored identity with what later versions added; as it is where this version cannot read it.

    What was added is at its default, or at what it was before it could be chosen. A fixed limit of the gradient's norm
    that was a default, and is not wanted now, does not count as set: the run goes on without.
    """
    optimiser = {"ema_every": 1} | stored.get("optimiser", {})
    if wanted.optimiser.skip_above is None and optimiser.get("skip_above") in EARLIER_LIMITS:
        optimiser["skip_above"] = None
    try:
        return identity(Config.model_validate(stored | {"optimiser": optimiser}))
    except ValidationError:
        return stored


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for key in sorted(set(old) | set(new))
            for text in _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        ]
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
