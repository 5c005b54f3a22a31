"""The report of a run: figures as PNG and one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from service import noise
from service.bundle import Manifest
from service.calibration import Calibrator
from service.errors import InvalidInput
from training import figures
from training.batches import pixel_batches, to_unit
from training.models.base import LatentVariableModel
from training.posteriors import kl_to_standard_normal
from training.runs import SCORES, Run, write_text
from training.staging import open_staged

SHOWN = 10  # images in a row of reconstructions
PRIOR_SAMPLES = 60
TRAVERSED, STEPS = 8, np.linspace(-3, 3, 9)
PLANE = np.linspace(-2.5, 2.5, 17)
ENCODED = 2000  # test images whose posterior the rate and the scatter are of
BATCH = 250  # of them at a time
THRESHOLD_RATES = (0.01, 0.05)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
img { max-width: 100%; height: auto; } figure { margin: 1.5rem 0; } figcaption { color: #555; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def report(run: Run) -> Path:
    """Write runs/NAME/report/*.png and report.html; its path. Raises ExportError without a calibrated bundle."""
    bundle = open_staged(run, calibrated=True)
    images = {name: figures.png(figure) for name, figure in draw(run, bundle.manifest).items()}
    folder = run.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for name, data in images.items():
        (folder / f"{name}.png").write_bytes(data)
    write_text(folder / "report.html", page(bundle.manifest, images))
    return folder / "report.html"


@torch.no_grad()
def draw(run: Run, manifest: Manifest) -> dict[str, Figure]:
    """All figures of the run, by name, in the order of the page."""
    model, test = run.model, run.dataset.splits["test"]
    seed = manifest.scores[manifest.default_score].seed
    parts = [test[i : i + BATCH] for i in range(0, min(ENCODED, len(test)), BATCH)]
    encoded = [posterior(model, pixels, seed)[1:] for pixels in pixel_batches(run.dataset, parts)]
    loc, scale = (torch.cat(batches) for batches in zip(*encoded, strict=True))
    rates = kl_to_standard_normal(loc, scale).mean(0).numpy()
    found: dict[str, Figure] = {}
    if run.checkpoint["history"]:
        found["loss"] = figures.loss_curves(run.checkpoint["history"])
    x = to_unit(run.dataset.pixels(test[:SHOWN]))
    found["reconstructions"] = _reconstructions(model, x, *posterior(model, x, seed)[:2])
    prior = torch.from_numpy(noise.prior_noise(0, PRIOR_SAMPLES, model.latent_dim))
    found["samples"] = figures.samples(model.decode(prior).mean.numpy())
    found["traversal"] = _traversal(model, rates)
    found |= {f"score-{name}": figure for name, figure in _histograms(run).items()}
    found["rate"] = figures.rate_by_dimension(rates)
    if model.latent_dim == 2:
        labels = None if run.dataset.labels is None else run.dataset.labels[test[:ENCODED]]
        found["latent"] = figures.latent_scatter(loc.numpy(), labels, run.dataset.label_names or [])
        found["manifold"] = _manifold(model)
    return found


def posterior(model: LatentVariableModel, x: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Target [N,C,H,W], loc and scale [N,L] of images x, with the dither that the service gives every image."""
    dither = torch.from_numpy(noise.dither(seed, model.shape).copy()).expand_as(x) if model.likelihood.dither else None
    encoded = model.encode(x, torch.zeros(len(x), 1, model.noise_dim), dither)
    return encoded.target, encoded.loc, encoded.scale


def _reconstructions(model: LatentVariableModel, x: Tensor, target: Tensor, loc: Tensor) -> Figure:
    binarised = target.numpy() if model.likelihood.binarisation != "none" else None
    return figures.reconstructions(x.numpy(), binarised, model.decode(loc).mean.numpy())


def _traversal(model: LatentVariableModel, rates: np.ndarray) -> Figure:
    dimensions = [int(j) for j in np.argsort(-rates, kind="stable")[:TRAVERSED]]
    z = torch.zeros(len(dimensions), len(STEPS), model.latent_dim)
    for row, j in enumerate(dimensions):
        z[row, :, j] = torch.from_numpy(STEPS)
    mean = model.decode(z.flatten(0, 1)).mean.unflatten(0, z.shape[:2])
    return figures.traversal(mean.numpy(), STEPS.tolist(), dimensions, rates)


def _manifold(model: LatentVariableModel) -> Figure:
    first, second = np.meshgrid(PLANE, PLANE)
    z = torch.from_numpy(np.stack([first, second], -1).astype(np.float32))
    mean = model.decode(z.flatten(0, 1)).mean.unflatten(0, z.shape[:2])
    return figures.manifold(mean.numpy(), PLANE.tolist())


def _histograms(run: Run) -> dict[str, Figure]:
    with np.load(run.folder / SCORES, allow_pickle=False) as archive:
        scores = {name: archive[name] for name in archive.files}
    names = [key.removeprefix("test.") for key in scores if key.startswith("test.")]
    calibrator = Calibrator({name: scores[f"calibration.{name}"] for name in names})
    return {
        name: figures.score_histogram(
            scores[f"calibration.{name}"], scores[f"test.{name}"], thresholds(calibrator, name), name
        )
        for name in names
    }


def thresholds(calibrator: Calibrator, name: str) -> dict[float, float]:
    """Rate -> threshold in nats, for those of THRESHOLD_RATES that the calibration can answer."""
    found = {}
    for rate in THRESHOLD_RATES:
        try:
            found[rate] = calibrator.threshold(name, rate)
        except InvalidInput:  # too few calibration images for so small a rate: the page shows the others
            continue
    return found


CAPTIONS = {
    "loss": "Bound, rate and distortion while training; the validation curves are of the averaged weights.",
    "reconstructions": "Test images, what the encoder saw of them, and the mean of p(x|z) at the posterior's mean.",
    "samples": "Means of p(x|z) at draws of the prior.",
    "traversal": "The latent dimensions of highest rate, one a row.",
    "score-elbo": "Scores of inliers that the model was not trained on.",
    "score-iwae": "The same images by the IWAE bound.",
    "rate": "Dimensions of nearly zero rate are not used by the decoder.",
    "latent": "Where test images lie in the latent plane.",
    "manifold": "What the decoder makes of the latent plane.",
}


def page(manifest: Manifest, images: dict[str, bytes]) -> str:
    """The HTML page: metrics, calibration and figures, all inside."""
    blocks = [
        f"<figure><img alt='{html.escape(name)}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
        f"<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"
        for name, data in images.items()
    ]
    title = html.escape(f"{manifest.name}: report")
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style></head><body>\n<h1>{title}</h1><p>{html.escape(manifest.description)}.</p>\n"
        f"{_tables(manifest)}\n" + "\n".join(blocks) + "\n</body></html>\n"
    )


def _tables(manifest: Manifest) -> str:
    parts = []
    for split, metrics in manifest.provenance.metrics.items():
        parts.append(_table(f"Metrics, {split} split (nats per image unless said)", metrics))
    if manifest.calibration:
        for name, rates in manifest.calibration.realised_false_positive_rate.items():
            parts.append(_table(f"Realised false-positive rate of “{name}” on the test split, by asked rate", rates))
    parts.append(_table("Largest |Δ| between torch and the served graphs", manifest.reference.max_abs_error))
    return "\n".join(parts)


def _table(title: str, values: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td class='number'>{value:,.6g}</td></tr>"
        for name, value in values.items()
    )
    return f"<h2>{html.escape(title)}</h2><table>{rows}</table>" if values else ""
