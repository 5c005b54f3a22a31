"""Where a model comes from: machine, versions, commit, and the configuration without the paths of this machine."""

from __future__ import annotations

import json
import platform
import re
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from service.resources import available_cpus
from training.config import Config
from training.data.named import NAMED
from training.runs import FitRecord, Launch, Run

PACKAGES = ("torch", "lightning", "onnx", "onnxscript", "onnxruntime", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # onnxruntime-gpu, for one, has another name
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, and the GPUs that torch sees; no host name."""
    import torch

    facts: dict[str, Any] = {"cpu": cpu_model(), "cores": available_cpus()}
    if torch.cuda.is_available():
        facts["gpu"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.machine()


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """Commit of the source tree, with ``-dirty`` when tracked files differ from it; None outside a repository."""
    try:
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".", "../service")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603


def public_source(source: str) -> str:
    """The data source as it may be published: a name, or the last part of a path."""
    return source if source in NAMED else Path(source).expanduser().resolve().name


def public_config(config: Config) -> dict[str, Any]:
    """The configuration as it may be published: without directories of this machine."""
    tree = config.model_dump(mode="json")
    tree["data"].pop("directory")
    tree["data"]["source"] = public_source(config.data.source)
    if tree["backbone"]:
        tree["backbone"]["path"] = Path(tree["backbone"]["path"]).name
    return tree


def fit_command(launch: Launch) -> str:
    """The command that repeats a training, without directories of this machine."""
    words = ["vaetrain", "fit"]
    if launch.data:
        words += ["--data", public_source(launch.data)]
    for flag, value in (("--backbone", launch.backbone), ("--preset", launch.preset), ("--name", launch.name)):
        if value:
            words += [flag, Path(value).name]
    for flag, value in (
        ("--backbone-output", launch.backbone_output),
        ("--backbone-normalise", launch.backbone_normalise),
    ):
        if value:
            words += [flag, value]
    for override in launch.overrides:
        key, _, value = override.partition("=")
        if key.strip() == "data.source":
            words += ["--set", f"data.source={public_source(value.strip())}"]
        elif key.strip() == "backbone.path":
            words += ["--backbone", Path(value.strip(" '\"")).name]
        elif key.strip() != "data.directory":
            words += ["--set", override]
    return shlex.join(words)


def evaluate_command(run: Run) -> str:
    """The command that computes the run's metrics, as a reader with the same run would type it."""
    evaluate = run.config.evaluate
    metrics = run.metrics() or {"k": evaluate.k, "images": evaluate.images, "gaps": evaluate.gaps}
    words = ["vaetrain", "evaluate", f"runs/{run.name}", "--k", str(metrics["k"])]
    words += ["--images", str(metrics["images"])] if metrics["images"] else []
    return shlex.join(words + (["--gaps", str(metrics["gaps"])] if metrics.get("gaps") else []))


def provenance(run: Run) -> dict[str, Any]:
    """Content of the manifest's ``provenance``; see service.bundle.manifest.Provenance."""
    record, state, metrics = run.record, run.checkpoint["state"], run.metrics()
    return {
        "config": public_config(run.config),
        "data": json.loads(json.dumps(run.images.describe())),
        "commit": record.commit,
        "versions": versions(),
        "seed": run.config.seed,
        "created": record.finished,
        "metrics": {metrics["split"]: metrics["metrics"]} if metrics else {},
        "training": _training(record, state, run),
    }


def _training(record: FitRecord, state: dict[str, Any], run: Run) -> dict[str, Any]:
    history = run.checkpoint["history"]
    return {
        "seconds": round(state["seconds"], 1),
        "epochs": int(history[-1]["epoch"]) if history else 0,
        "best_epoch": state["best_epoch"],
        "steps": state["step"],
        "skipped_updates": state["skipped"],
        "machine": record.machine,
        "versions": record.versions,
        "weights_sha256": run.weights_digest,
        **({} if run.corruption_facts is None else {"corruption": run.corruption_facts}),
        "fit_command": fit_command(record.launch),
        "evaluate_command": evaluate_command(run),
    }
