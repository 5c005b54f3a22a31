"""The file that ``vaeserve autotune`` writes: what was measured, what was chosen, and all that the choice depends on.

``vaeserve serve --workers auto`` reads it. A choice that was made under other conditions is not used.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from service import __version__
from service.bundle.files import bundle_digests
from service.resources import available_cpus, available_memory, cpu_model
from service.server.layouts import Layout, Measured
from service.settings import Settings

FILE = "autotune.json"
MOST_BYTES = 2**20
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")  # the distributions that bring the package onnxruntime


class Conditions(BaseModel):
    """What a choice depends on: ``bundles`` are digests by NAME/VERSION, ``memory`` is in bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: dict[str, str]
    cpus: int
    cpu_model: str
    memory: int
    device: str
    concurrency: int
    onnxruntime: str
    vaeserve: str


class Tuned(BaseModel):
    """The content of the file; ``shares`` of the best images/s by layout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    measured_at: str
    conditions: Conditions
    choice: Layout
    why: str
    shares: dict[str, float]
    measured: list[Measured]


def conditions(settings: Settings) -> Conditions:
    """Those of a service with these settings, here and now. No bundle is verified."""
    return Conditions(
        bundles=bundle_digests(settings.repository),
        cpus=available_cpus(),
        cpu_model=cpu_model(),
        memory=available_memory(),
        device=settings.device,
        concurrency=settings.concurrency,
        onnxruntime=_runtime_version(),
        vaeserve=__version__,
    )


def _runtime_version() -> str:
    """Read from the installation: the supervisor does not load the runtime."""
    for name in RUNTIMES:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "unknown"


def place(settings: Settings) -> Path:
    """The file of the settings, or by default the one beside the bundles."""
    return settings.autotune_file or settings.repository / FILE


def write_tuned(tuned: Tuned, path: Path) -> None:
    """Write the file whole, or leave what was there. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(tuned.model_dump_json(indent=2) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def usable(path: Path, now: Conditions) -> Layout | str | None:
    """The choice in that file if it was made under the conditions of ``now``, else why not; None: there is no file."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES)
        tuned = Tuned.model_validate_json(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    except ValidationError as error:
        return f"{path} is not what vaeserve autotune writes: {error.errors()[0]['msg']}"
    changed = differences(tuned.conditions, now)
    return f"{path} is stale: {'; '.join(changed)}" if changed else tuned.choice


def differences(then: Conditions, now: Conditions) -> list[str]:
    """What has changed, in words."""
    places = sorted(then.bundles.keys() | now.bundles.keys())
    other = [name for name in places if then.bundles.get(name) != now.bundles.get(name)]
    found = [f"other bundles ({', '.join(other[:5])}{' …' if len(other) > 5 else ''})"] if other else []
    for name in Conditions.model_fields.keys() - {"bundles"}:
        before, after = getattr(then, name), getattr(now, name)
        if before != after:
            found.append(f"{name} was {before}, is {after}")
    return sorted(found)
