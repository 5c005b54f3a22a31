"""Calibration: scores of held-out inliers, computed as the service computes them, and the rates on the test split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from service.bundle import CALIBRATION
from service.calibration import Calibrator
from service.model import Model
from service.runtime import Runtime
from training.batches import pixel_batches
from training.data import Dataset
from training.parity import to_npz
from training.runs import SCORES, Run
from training.staging import contents, open_staged, replace_bundle

SPLIT = "calibration"
RATES = (0.001, 0.01, 0.05, 0.1)
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
BATCH = 256

Progress = Callable[[int], None]


def score_split(model: Model, dataset: Dataset, split: str, score: str, progress: Progress | None = None) -> np.ndarray:
    """Scores, float64 [N] in nats, of a split's images in their order, by one of the bundle's definitions."""
    indices, definition = dataset.splits[split], model.manifest.scores[score]
    parts = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
    found = []
    for pixels in pixel_batches(dataset, parts):
        found.append(model.score(pixels.numpy(), definition).score)
        if progress:
            progress(len(pixels))
    return np.concatenate(found)


def images_to_score(run: Run) -> int:
    """How many images ``calibrate`` will score, each definition counted."""
    splits = run.dataset.splits
    return len(open_staged(run).manifest.scores) * (len(splits[SPLIT]) + len(splits["test"]))


def calibrate(run: Run, progress: Progress | None = None) -> Path:
    """Rewrite the run's staged bundle with calibration.npz and the realised rates; leave scores.npz in the run.

    Raises ExportError without a staged bundle, VaeserveError when the new one does not verify.
    """
    bundle = open_staged(run)
    model = Model.load(bundle, Runtime("cpu"))
    names = list(bundle.manifest.scores)
    held_out = {name: np.sort(score_split(model, run.dataset, SPLIT, name, progress)) for name in names}
    test = {name: score_split(model, run.dataset, "test", name, progress) for name in names}
    manifest, files = contents(bundle)
    manifest["calibration"] = summary(held_out, test)
    files[CALIBRATION] = to_npz(held_out)
    path = replace_bundle(run.folder / "bundle", manifest, files)
    named = {
        f"{split}.{name}": s for split, scores in ((SPLIT, held_out), ("test", test)) for name, s in scores.items()
    }
    (run.folder / SCORES).write_bytes(to_npz(named))
    return path


def summary(held_out: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> dict[str, Any]:
    """Content of the manifest's ``calibration``: quantiles in nats, and false-positive rates on the test split."""
    calibrator = Calibrator(held_out)
    return {
        "split": SPLIT,
        "n": len(next(iter(held_out.values()))),
        "quantiles": {
            name: {f"{q:g}": float(np.quantile(scores, q)) for q in QUANTILES} for name, scores in held_out.items()
        },
        "realised_false_positive_rate": {name: realised(calibrator, name, scores) for name, scores in test.items()},
        "n_test": len(next(iter(test.values()))),
    }


def realised(calibrator: Calibrator, name: str, scores: np.ndarray) -> dict[str, float]:
    """Share of ``scores`` with p ≤ rate, for each of RATES that so many calibration scores can answer."""
    p = calibrator.p_values(name, scores)
    return {f"{rate:g}": float(np.mean(p <= rate)) for rate in RATES if 1 / (calibrator.n(name) + 1) <= rate}
