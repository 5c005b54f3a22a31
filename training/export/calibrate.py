"""Calibration: anomaly scores fitted to the validation split, conformal scores of the calibration split, rates on the
test split; everything computed as the service computes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from service.bundle.files import Bundle, open_bundle
from service.bundle.manifest import CALIBRATION, DETECTORS, TILES
from service.calibration.conformal import Calibrator
from service.calibration.contamination import contamination
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.tiled import TiledModel, fit_tile_tails, tile_tail_arrays
from service.scores.fitting import (
    MIN_ROWS,
    fitted_arrays,
    fitted_definitions,
    max_held_out_rows,
    max_reference_rows,
)
from training.data import Dataset
from training.data.batches import pixel_batches
from training.data.dataset import WholeImages
from training.export.parity import to_npz
from training.export.staging import contents, open_staged, replace_bundle
from training.runs import SCORES, Run

SPLIT, FIT_SPLIT = "calibration", "validation"
RATES = (0.001, 0.01, 0.05, 0.1)
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
BATCH = 256
ORDER = "order"
"""In scores.npz: places in the calibration split, by rising default score."""

Progress = Callable[[int], None]


def score_split(
    model: Model, dataset: Dataset, split: str, names: list[str], progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Scores, float64 [N] by name, of a split's images in their order, by some of the bundle's definitions."""
    definitions = {name: model.manifest.scores[name] for name in names}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for pixels in pixel_batches(dataset, _batches(dataset.splits[split])):
        found = model.score(pixels.numpy(), definitions[names[0]], also=definitions).also
        for name in names:
            parts[name].append(found[name])
        if progress:
            progress(len(pixels))
    return {name: np.concatenate(scores) for name, scores in parts.items()}


def score_whole_images(
    model: TiledModel, whole_images: WholeImages, split: str, names: list[str], progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Scores, float64 [N] by name, of the whole images that a split's crops are of: by tiles, as the service does."""
    definitions = {name: model.model.manifest.scores[name] for name in names}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for index in whole_images.splits[split]:
        found = model.score([whole_images.read(int(index))], definitions[names[0]], also=definitions).also
        for name in names:
            parts[name].append(found[name])
        if progress:
            progress(1)
    return {name: np.concatenate(scores) for name, scores in parts.items()}


def images_to_score(run: Run) -> int:
    """How many images ``calibrate`` will score."""
    splits = (run.dataset.whole_images or run.dataset).splits
    return len(splits[SPLIT]) + len(splits["test"])


def calibrate(run: Run, progress: Progress | None = None) -> Path:
    """Rewrite the run's staged bundle with detectors.npz, calibration.npz and the realised rates; leave scores.npz in
    the run.

    Raises ExportError without a staged bundle, VaeserveError when the new one does not verify.
    """
    bundle = open_bundle(fit_scores(run))
    model = Model.load(bundle, Runtime("cpu")).without_backbone()
    names, whole_images = list(bundle.manifest.scores), run.dataset.whole_images
    manifest, files = contents(bundle)
    if whole_images is None:
        found = [score_split(model, run.dataset, split, names, progress) for split in (SPLIT, "test")]
    else:
        tails = fit_tile_tails(score_split(model, run.dataset, FIT_SPLIT, names))
        files[TILES] = to_npz(tile_tail_arrays(tails))
        tiled = TiledModel(Model.load(bundle, Runtime("cpu")), tails)
        found = [score_whole_images(tiled, whole_images, split, names, progress) for split in (SPLIT, "test")]
    held_out, test = {name: np.sort(scores) for name, scores in found[0].items()}, found[1]
    fitted = {"fitted_on": FIT_SPLIT, "n_fit": len(_held_out(run, bundle))} if DETECTORS in files else {}
    manifest["calibration"] = summary(held_out, test) | fitted
    files[CALIBRATION] = to_npz(held_out)
    path = replace_bundle(run.folder / "bundle", manifest, files)
    named = {
        f"{split}.{name}": s for split, scores in ((SPLIT, held_out), ("test", test)) for name, s in scores.items()
    }
    order = np.argsort(found[0][manifest["default_score"]], kind="stable")
    (run.folder / SCORES).write_bytes(to_npz(named | {ORDER: order}))
    return path


def suspects(run: Run) -> tuple[str | None, list[str]]:
    """What the tail of the default score's calibration says of bad images among the good ones, None: nothing; and what
    these images are called."""
    with np.load(run.folder / SCORES) as archive:
        found = contamination(archive[f"{SPLIT}.{open_staged(run).manifest.default_score}"])
        places = archive[ORDER][found.indices]
    whole_images, names = run.dataset.whole_images, run.dataset.names
    rows = (whole_images or run.dataset).splits[SPLIT][places].tolist()
    return found.message, [names[row] if whole_images is None else whole_images.name(row) for row in rows]


def fit_scores(run: Run) -> Path:
    """Rewrite the run's staged bundle with the scores that are fitted to held-out images, if there are enough of these.

    The default score is then ``combined``, unless the configuration names another. Raises as ``calibrate``.
    """
    bundle = open_staged(run)
    held_out = _held_out(run, bundle)
    if len(held_out) < MIN_ROWS:
        return bundle.path
    model = Model.load(bundle, Runtime("cpu")).without_backbone()
    definitions = bundle.manifest.scores | fitted_definitions(bundle.manifest)
    reference = run.dataset.splits["train"][: max_reference_rows(bundle.manifest)]
    x = _pixels(run.dataset, held_out)
    arrays = fitted_arrays(model, definitions, x, _pixels(run.dataset, reference))
    manifest, files = contents(bundle)
    manifest["scores"] = {name: definition.model_dump(mode="json") for name, definition in definitions.items()}
    if run.config.score.default in definitions:
        manifest["default_score"] = run.config.score.default
    manifest["calibration"] = None
    files.pop(CALIBRATION, None)
    files[DETECTORS] = to_npz(arrays)
    return replace_bundle(run.folder / "bundle", manifest, files)


def _held_out(run: Run, bundle: Bundle) -> np.ndarray:
    return run.dataset.splits[FIT_SPLIT][: max_held_out_rows(bundle.manifest)]


def _pixels(dataset: Dataset, indices: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels.numpy() for pixels in pixel_batches(dataset, _batches(indices))])


def _batches(indices: np.ndarray) -> list[np.ndarray]:
    return [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]


def summary(held_out: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> dict[str, Any]:
    """Content of the manifest's ``calibration``: quantiles, and false-positive rates on the test split."""
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
