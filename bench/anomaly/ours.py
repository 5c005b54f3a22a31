"""Our detector: a bundle trained on the inliers, loaded and scored as the service does, judged by its calibration.

Whole data sets are scored by the bundles that ship; for some classes of one, a run of the preset ``one-class`` goes
through fit, export and calibrate as ``vaetrain`` does. Runs are kept by configuration and images: a second benchmark
scores what the first one trained, and an interrupted one goes on.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
from rich.console import Console

from bench.anomaly.measures import SPLITS, Rates, rates, resplit
from bench.anomaly.rivals import BATCH, Detector, Maps
from bench.anomaly.task import Inliers
from service.bundle.files import Bundle, open_bundle
from service.bundle.manifest import CALIBRATION
from service.calibration.conformal import Calibrator
from service.errors import VaeserveError
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.repository.model_repository import find_bundles
from training.config import Config, load_config
from training.console import calibrate_stage, export_stage, fit_stage
from training.errors import TrainingError
from training.export.staging import open_staged
from training.runs import Launch, Run

PRESET = "one-class"
OVERRIDES = ["run.threads=1"]


class BundleMissing(RuntimeError):
    """A shipped bundle is not there; the text says where it was looked for."""


class Ours(Detector):
    """A bundle's default score. ``names`` are all its scores, ``digest`` says which bundle it is."""

    name = "vaeserve"

    def __init__(self, exported: Path, runs: Path, overrides: list[str] | None = None, restage: bool = False) -> None:
        self._exported, self._runs = exported, runs
        self._overrides, self._restage = [*OVERRIDES, *(overrides or [])], restage

    def fit(self, inliers: Inliers, seed: int) -> None:
        """Train, or find, the bundle of these inliers. Raises BundleMissing, TrainingError, VaeserveError."""
        bundle = self._shipped(inliers) if inliers.classes is None else self._trained(inliers, seed)
        self.model = Model.load(bundle, Runtime("cpu", threads=1))
        self.calibrator = Calibrator.from_bundle(bundle)
        self.names = list(bundle.manifest.scores)
        self.default, self.digest = bundle.manifest.default_score, bundle.digest
        self.settings = f"{bundle.manifest.name}/{bundle.manifest.version}, score {self.default}"

    def score(self, x: np.ndarray) -> np.ndarray:
        return self.scores(x)[self.default]

    def scores(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Every score that the bundle defines: x uint8 [N,C,H,W] -> float64 [N] by name."""
        definitions = self.model.manifest.scores
        found = [self.model.score(part, also=definitions).also for part in _batches(x)]
        return {name: np.concatenate([scores[name] for scores in found]) for name in definitions}

    def maps(self, x: np.ndarray) -> np.ndarray | None:
        found = [self.model.score(part, maps=True).map for part in _batches(x)]
        return np.concatenate([part for part in found if part is not None])

    def corruption_maps(self, x: np.ndarray) -> Maps | None:
        """Log odds by the corruption graph, x as for ``maps``; None where the bundle has no such graph."""
        if "score.map.corruption" in self.model.refused:
            return None
        return np.concatenate([self.model.log_odds(part) for part in _batches(x)])

    def unseen(self, scores: np.ndarray) -> dict[str, Rates]:
        """Default scores of unseen inliers [N] against the bundle's calibration, and against SPLITS calibrations anew.

        ``served`` is the bundle's own calibration. Where a data set's test part is of other writers, say, than its
        training part, that is not exchangeable with it; ``split 0`` … draw both anew from the pool, where they are.
        """
        calibration = self.model.bundle.arrays(CALIBRATION)[self.default]
        found = {"served": rates(self.calibrator.p_values(self.default, scores), calibration, scores)}
        for seed in range(SPLITS):
            known, new = resplit(calibration, scores, seed)
            p_values = Calibrator({self.default: known}).p_values(self.default, new)
            found[f"split {seed}"] = rates(p_values, known, new)
        return found

    def _shipped(self, inliers: Inliers) -> Bundle:
        found = [path for path in find_bundles(self._exported) if path.parent.name == inliers.source]
        if not found:
            raise BundleMissing(f"no bundle under {self._exported / inliers.source}: `vaetrain fit` writes one there")
        return open_bundle(max(found, key=lambda path: int(path.name)))

    def _trained(self, inliers: Inliers, seed: int) -> Bundle:
        """The calibrated bundle of a run, which is made, or gone on with, if it is not there."""
        data = _saved(inliers.train, self._runs / "data")
        config = self._config(inliers, seed, data)
        folder = self._runs / f"{inliers.name}-{seed}-{_short(config, data)}"
        staged = None if self._restage else _staged(folder)
        if staged is not None:
            return staged
        console = Console(stderr=True)
        launch = Launch(data=str(data), preset=PRESET, name=config.name, overrides=self._overrides)
        run, _ = fit_stage(config, folder, launch, False, console)
        export_stage(run, console)
        calibrate_stage(run, console)
        return open_staged(run, calibrated=True)

    def _config(self, inliers: Inliers, seed: int, data: Path) -> Config:
        # The test part is the task's own; a fiftieth is what the bundle's card reports on.
        data_config = {"source": str(data), "split_seed": seed, "test": 0.02}
        base = {"name": inliers.name, "seed": seed, "data": data_config}
        return load_config(PRESET, self._overrides, base)


def _staged(folder: Path) -> Bundle | None:
    """The calibrated bundle of a finished run, or None."""
    try:
        run = Run.open(folder)
        return open_staged(run, calibrated=True) if run.has_record else None
    except (TrainingError, VaeserveError):
        return None


def _saved(images: np.ndarray, folder: Path) -> Path:
    """An .npz of the images under the name of their digest, written once."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images)
    path = folder / f"{hashlib.sha256(images.tobytes()).hexdigest()[:16]}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_bytes(buffer.getvalue())
        shutil.move(temporary, path)
    return path


def _short(config: Config, data: Path) -> str:
    """A digest of the configuration, wherever the images lie."""
    named = config.model_copy(update={"data": config.data.model_copy(update={"source": data.name, "directory": "."})})
    return hashlib.sha256(named.model_dump_json().encode()).hexdigest()[:12]


def _batches(x: np.ndarray) -> list[np.ndarray]:
    """uint8 [N,C,H,W] -> float32 in [0, 1], BATCH images each, as service.formats.codecs reads them."""
    return [x[i : i + BATCH] / np.float32(255) for i in range(0, len(x), BATCH)]
