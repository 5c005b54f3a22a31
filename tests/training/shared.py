"""Runs that many tests read. Each is made once a test session, by whichever of the session's processes wants it first.

They are read only; a test that writes takes a copy.
"""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from rich.console import Console
from torch import Tensor

from service.bundle.files import open_bundle
from service.inference.model import Model
from service.inference.sessions import Runtime
from tests.training.finished import finished_run
from training.config import load_config
from training.console import fit_stage
from training.export.calibrate import calibrate
from training.export.staging import export
from training.models.base import LatentVariableModel
from training.runs import Launch, Run

MLP = {"hidden": [12]}
CONV = {"kind": "conv", "channels": [3, 4], "blocks": 1, "hidden": [10]}
DELTA, SQUARED = {"family": "delta"}, {"family": "squared_error"}
CASES = {
    "vae, VampPrior, threshold, dropout": {
        "network": MLP | {"dropout": 0.2},
        "prior": {"family": "vamp", "components": 5},
        "likelihood": {"binarisation": "threshold"},
    },
    "vae, Householder, continuous Bernoulli": {
        "network": MLP,
        "posterior": {"family": "householder", "vectors": 2},
        "likelihood": {"family": "continuous_bernoulli"},
    },
    "vae, IAF and a flow prior": {
        "network": MLP,
        "posterior": {"family": "iaf", "steps": 2, "hidden": 8},
        "prior": {"family": "flow", "steps": 2, "hidden": 8},
    },
    "vae, Sylvester, mixture of logistics": {
        "network": MLP,
        "posterior": {"family": "sylvester", "steps": 2, "rank": 2, "vectors": 2},
        "likelihood": {"family": "logistic_mixture"},
    },
    "vae, planar, conv, 8-bit colours": {
        "network": CONV,
        "posterior": {"family": "planar", "steps": 2},
        "likelihood": {"family": "discretised_logistic"},
    },
    "vae, conv, float colours, scale a pixel": {
        "network": CONV,
        "likelihood": {"family": "gaussian", "scale": "pixel"},
    },
    "ladder": {"family": "ladder", "ladder": {"channels": [6, 8], "latents": [2, 2], "layers": [1, 1]}},
    "flow": {"family": "flow", "likelihood": DELTA, "flow": {"levels": 1, "steps": 2, "hidden": 8}},
    "ica": {"family": "ica", "likelihood": DELTA},
    "ppca": {"family": "ppca", "latent_dim": 4, "likelihood": {"family": "gaussian", "scale": "shared"}},
    "fa": {"family": "fa", "latent_dim": 4, "likelihood": {"family": "gaussian", "scale": "diagonal"}},
    "pca": {"family": "pca", "latent_dim": 4, "likelihood": SQUARED},
    "linear autoencoder": {"family": "linear_autoencoder", "latent_dim": 4, "likelihood": SQUARED},
    "autoencoder": {"family": "autoencoder", "network": MLP, "likelihood": SQUARED},
}
"""A [model] table for every family, and for a VAE every posterior, prior, network and likelihood somewhere."""


CORRUPTED = "vae, planar, conv, 8-bit colours"
"""The case whose bundle holds a corruption network besides; its images have odd sides."""


class Encoded(NamedTuple):
    """What the encoder's graph gives of values x: target [N,C,H,W], loc, scale [N,L], z [N,K,L], log q(z|x) [N,K]."""

    target: Tensor
    loc: Tensor
    scale: Tensor
    z: Tensor
    log_q_z: Tensor


def encoded(model: LatentVariableModel, x: Tensor, noise: Tensor, dither: Tensor | None = None) -> Encoded:
    """Values x [N,C,H,W], noise [N,K,E] and, where the likelihood wants it, dither [N,C,H,W] -> Encoded."""
    target = model.likelihood.target(x, dither)
    return Encoded(target, *model.encode(target).with_moments(noise))


class Fitted(NamedTuple):
    """A finished run, and its calibrated bundle as the service sees it."""

    run: Run
    served: Model

    @classmethod
    def open(cls, folder: Path) -> "Fitted":
        """What lies in the run's folder."""
        run = Run.open(folder)
        return cls(run, Model.load(open_bundle(run.staged), Runtime("cpu")))


def once(root: Path, name: str, make: Callable[[Path], object]) -> Path:
    """root/name, which ``make(folder)`` fills for the first process that asks; the others wait for it."""
    folder, stamp = root / name, root / f"{name}.made"
    root.mkdir(exist_ok=True)
    with FileLock(root / f"{name}.lock"):
        if not stamp.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            stamp.touch()
    return folder


def root_of(basetemp: Path) -> Path:
    """The folder of shared runs beside ``basetemp``, a process's own one: pytest-xdist puts these side by side."""
    return (basetemp.parent if "PYTEST_XDIST_WORKER" in os.environ else basetemp) / "shared"


def fit_family(folder: Path, case: str) -> None:
    """folder/run: two epochs of CASES[case] on digits or small pictures in colour, exported and calibrated."""
    tree = {
        "name": "tiny",
        "data": {"source": _source(folder, case), "limit": 700, "calibration": 0.2, "test": 0.2},
        "model": {"latent_dim": 3} | CASES[case],
        "optimiser": {"epochs": 2},
        "run": {"threads": 1},
        "evaluate": {"k": 4},
        "score": {"k": 2},
    }
    if case == CORRUPTED:
        tree["corruption"] = {"width": 8, "epochs": 1}
    run, _ = fit_stage(load_config(None, [], tree), folder / "run", Launch(), False, Console(file=io.StringIO()))
    export(run)
    calibrate(run)


def _source(folder: Path, case: str) -> str:
    if "colours" not in case:
        return "digits"
    pixels = np.random.RandomState(0).randint(0, 256, (500, 3, 5, 7))
    np.save(folder / "colours.npy", (pixels / 255).astype(np.float32) if "float" in case else pixels.astype(np.uint8))
    return str(folder / "colours.npy")


def small_run(folder: Path) -> None:
    """folder/runs/tiny: a VAE of random weights, exported; folder/calibrated/runs/tiny: with every score besides."""
    model = {"latent_dim": 2, "network": {"kind": "mlp", "hidden": [8]}}
    run = finished_run(folder, (1, 6, 5), model, images=900, score={"k": 3, "seed": 9})
    export(run)
    calibrate(copied(run, folder / "calibrated"))


def copied(run: Run, folder: Path) -> Run:
    """A copy of the run, in folder/runs/NAME, which a test may change; its data stay where they are."""
    return Run.open(shutil.copytree(run.folder, folder / "runs" / run.folder.name))
