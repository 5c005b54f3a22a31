"""Whole synthetic surfaces in overlapping tiles, as docs/anomaly.md reports: AUROC by image and by pixel, rates at 5%.

    python -m bench.anomaly.tiled --to DIR                          # PPCA: minutes
    python -m bench.anomaly.tiled --to DIR --models images ppca     # a convolutional VAE, too

Good surfaces are written as PNG files and go through ``vaetrain``'s stages, as a folder of photographs would; new good
ones, and ones with a flaw each (bench.anomaly.surfaces), of two sizes are scored by the bundle that comes out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from bench.anomaly.measures import auroc
from bench.anomaly.report import table
from bench.anomaly.surfaces import FLAWS, SURFACES, flawed, surfaces
from bench.anomaly.transforms import as_levels
from service.inference.sessions import Runtime
from service.repository.model_repository import Served, load_bundle
from training.config import load_config
from training.console import all_stages, fit_stage
from training.runs import Launch, Run

TILE, SIZES = 32, (160, 224)
GOOD, HELD_OUT, FLAWED = 150, 40, 20
RATE = 0.05
MODELS = {"ppca": {"model": {"latent_dim": 48}}, "images": {"optimiser": {"epochs": 12}}}
SCORES = ("combined", "peak", "statistics", "latent", "complexity", "residual")


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print a table of every surface, flaw and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("runs/tiled"), metavar="DIR")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["ppca"])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    rows = [row for name in asked.models for kind in SURFACES for row in _measured(name, kind, asked.seed, asked.to)]
    print(table(["model", "surface", "flaw", *SCORES, "by pixel", f"good, flawed at {RATE:.0%}"], rows))


def _measured(name: str, kind: str, seed: int, to: Path) -> list[list[str]]:
    random = np.random.RandomState([seed, list(SURFACES).index(kind)])
    served = _served(name, kind, seed, _written(kind, random, to / f"{kind}-{seed}"), to)
    good = _found(served, [image for size in SIZES for image in surfaces(kind, HELD_OUT // 2, size, random)])
    rows = []
    for flaw in FLAWS:
        pairs = [flawed(surfaces(kind, FLAWED // 2, size, random), flaw, random) for size in SIZES]
        bad = _found(served, [image for images, _ in pairs for image in images])
        masks = np.concatenate([mask.ravel() for _, part in pairs for mask in part])
        pixels = np.concatenate([each.ravel() for each in bad[1]])
        clean = np.concatenate([each.ravel() for each in good[1]])
        numbers = [f"{auroc(good[0][score], bad[0][score]):.3f}" for score in SCORES]
        by_pixel = auroc(np.concatenate([clean, pixels[~masks]]), pixels[masks])
        rates = ", ".join(f"{np.mean(p <= RATE):.0%}" for p in (good[2], bad[2]))
        rows.append([name, kind, flaw, *numbers, f"{by_pixel:.3f}", rates])
    return rows


def _found(served: Served, images: list[np.ndarray]) -> tuple[dict[str, np.ndarray], list[np.ndarray], np.ndarray]:
    """Scores by name, maps, and p-values of the default score, of surfaces [h,w] of any sizes."""
    assert served.tiled is not None
    manifest = served.manifest
    found = served.tiled.score([as_levels(255 * image)[None] for image in images], None, True, manifest.scores)
    assert found.map is not None
    return dict(found.also), found.map, served.calibrator.p_values(manifest.default_score, found.score)


def _written(kind: str, random: np.random.RandomState, folder: Path) -> Path:
    """Good surfaces as files, sizes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        for number, image in enumerate(surfaces(kind, GOOD // len(SIZES), size, random)):
            Image.fromarray(as_levels(255 * image)).save(folder / f"{size}-{number}.png")
    return folder


def _served(name: str, kind: str, seed: int, data: Path, to: Path) -> Served:
    """The bundle of a run on that folder, trained, calibrated and published if it is not there."""
    exported, run = to / "exported" / f"{name}-{kind}-{seed}", to / "runs" / f"{name}-{kind}-{seed}"
    if not exported.exists():
        splits = {"source": str(data), "tile": TILE, "validation": 0.15, "calibration": 0.35, "test": 0.05}
        tree = {**MODELS[name], "name": exported.name, "seed": seed, "data": splits}
        console = Console(stderr=True)
        fitted, _ = fit_stage(load_config(name, [], tree), run, Launch(data=str(data)), False, console)
        all_stages(Run.open(fitted.folder), exported.parent, console)
    return load_bundle(exported / "1", Runtime("cpu", threads=1))


if __name__ == "__main__":
    main()
