"""CPU and GPU side by side: the service on both, block by block in the same rounds, and raw ONNX Runtime on both.

Where no GPU answers the result is a line that says so, and why.
"""

from __future__ import annotations

import io
import shutil
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.compare import Group, Progress, Result
from bench.crew import RawRuntime
from bench.requests import ask
from bench.servers import Server, vae_server
from bench.serving import MANY, group
from bench.stage import Effort, Stage, stage
from service.errors import DeviceUnavailable
from service.inference.sessions import Runtime

VERBS = ("encode", "score")
OF_BIG = ("encode",)  # a batch of the big model's scores takes half a minute on two cores
LOADS = ((1, 1), (64, 1), (MANY, 64))  # connections, images a request


def side_by_side(places: Mapping[str, Path], effort: Effort, progress: Progress, device: str = "cuda") -> Result:
    """Of each model in its folder ``results`` of the service and ``raw`` of ONNX Runtime, on the CPU and on ``device``.

    Without such a device ``none`` says why. For ``device`` "cpu" both sides are equal: so it is tested.
    """
    reason = why_none(device)
    if reason is not None:
        return {"none": reason}
    found: Result = {"device": gpu_name(), "results": [], "raw": []}
    for model, folder in places.items():
        with (
            stage(folder, model, effort) as here,
            vae_server(folder, effort.workers, device) as other,
            RawRuntime(here.bundle.path, 1, device) as raw,
        ):
            verbs = OF_BIG if model == "big" else VERBS
            groups = [both(here, other, verb, *load) for verb in verbs for load in LOADS]
            apart = [difference(each) for each in groups]
            cells = here.arena.measure(groups, progress)
            sides = zip(cells[::2], cells[1::2], apart, strict=True)
            found["results"] += [{"model": model, "cpu": cpu, "gpu": gpu, "apart": far} for cpu, gpu, far in sides]
            found["raw"] += [{"model": model, "verb": verb, **raw_of(here, raw, verb)} for verb in verbs]
    return found


def why_none(device: str) -> str | None:
    """Why this installation computes nothing on ``device``; None where it does."""
    try:
        Runtime(device, threads=1)
    except DeviceUnavailable as error:
        return str(error)
    return None


def gpu_name() -> str:
    """What the driver's own tool calls the GPUs."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: nvidia-smi is not there"
    done = subprocess.run(
        [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return "; ".join(done.stdout.split("\n")).strip("; ") or "unknown: nvidia-smi names none"


def both(here: Stage, other: Server, verb: str, connections: int, batch: int) -> Group:
    """Octets in and npy out, from the service on the CPU and from the one on the other device."""
    made = group(here, verb, connections, batch, ("octet-stream",))
    cpu = next(each for each in made.subjects if each.labels["answer"] == "npy")
    target = replace(cpu.target, host=other.host, port=other.port)
    return replace(made, subjects=[cpu, replace(cpu, target=target, server=other)], often=1)


def difference(made: Group) -> float:
    """The largest one between the two answers, over the largest number of the first: the devices round differently."""
    one, other = (np.load(io.BytesIO(ask(subject.target))) for subject in made.subjects)
    return float(np.abs(other - one).max() / np.abs(one).max())


def raw_of(here: Stage, raw: RawRuntime, verb: str) -> Result:
    """Images/s at the best batch on the CPU and on the other device, medians of alternating blocks."""
    seconds, rounds = here.effort.seconds, range(here.effort.rounds)
    blocks = [(here.arena.raw.best(verb, seconds), raw.best(verb, seconds)) for _ in rounds]
    found: dict[str, Any] = {}
    for side, of_side in zip(("cpu", "gpu"), zip(*blocks, strict=True), strict=True):
        rate = statistics.median(block.images_per_second for block in of_side)
        found[side] = {"images_per_second": rate, "layout": str(of_side[0].layout), "batch": of_side[0].batch}
    ratios = [gpu.images_per_second / cpu.images_per_second for cpu, gpu in blocks]
    return found | {"gpu_over_cpu": statistics.median(ratios)}
