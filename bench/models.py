"""Models to measure, made on the spot: real bundles of the project's own pipeline, of networks that hardly trained.

    python -m bench.models [conv big growth] [--remake]

Speed does not ask what weights are worth. Each is fitted for one epoch to seeded synthetic images, exported, calibrated
so that the default score is there, and verified, all as ``vaetrain fit`` does it. They lie in runs/bench/models/ (which
git ignores) until their configuration changes.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from rich.console import Console

from service.bundle.files import Bundle, open_bundle
from service.errors import BundleError

FOLDER = Path("runs/bench/models")
IMAGES = {"conv": 9200, "big": 2300, "growth": 640}
"""Enough for as many encoded inliers as a bundle holds (service.scores.fitting.most_reference_rows), with which every
scored row is compared; of the models of the growth of cost only encode and the bound are measured."""
WORK = ".work"
SPLITS = ["data.validation=0.04", "data.calibration=0.04", "data.test=0.02"]
FAST = ["optimiser.epochs=1", "optimiser.batch_size=32", "evaluate.k=1", "evaluate.images=8", "run.threads=1"]

Shape = tuple[int, int, int]
Spec = tuple[Shape, list[str]]


BINARY = ["model.likelihood.binarisation=threshold"]
LOGISTIC = ["model.likelihood.family=discretised_logistic"]
"""Likelihoods whose encoder wants no dither: a server that knows nothing of it finds the same loc."""


def convolutional(channels: list[int], hidden: int, latent_dim: int, likelihood: list[str], blocks: int) -> list[str]:
    """Overrides for a convolutional VAE."""
    return [
        "model.network.kind=conv",
        f"model.network.blocks={blocks}",
        f"model.network.channels={channels}",
        f"model.network.hidden={[hidden]}",
        f"model.latent_dim={latent_dim}",
        *likelihood,
    ]


SIDES, LATENTS, PLAIN = (16, 32, 64, 128), (8, 128, 512), (32, 32)
"""The small models of the growth of cost: by side at 32 latents, by latents at side 32."""


def growth_name(side: int, latent_dim: int) -> str:
    """Name of a small model."""
    return f"side-{side}-latents-{latent_dim}"


GROWTH: dict[str, Spec] = {
    growth_name(side, latent_dim): ((1, side, side), convolutional([8, 16], 32, latent_dim, BINARY, 0))
    for side, latent_dim in [*((side, PLAIN[1]) for side in SIDES), *((PLAIN[0], size) for size in LATENTS)]
}
SETS: dict[str, dict[str, Spec]] = {
    "conv": {"conv": ((1, 28, 28), convolutional([16, 32], 256, 32, BINARY, 0))},  # 1.29 M parameters
    "big": {"big": ((3, 64, 64), convolutional([32, 64, 128], 320, 128, LOGISTIC, 1))},  # 10.1 M
    "growth": GROWTH,
}
"""Bundles that are served together, by the name of their repository."""


def synthetic_images(shape: Shape, count: int, seed: int = 0) -> np.ndarray:
    """Soft blobs on black, uint8 [N,H,W] or [N,H,W,3]: like digits they are smooth, and a PNG of them is small."""
    random, (channels, height, width) = np.random.RandomState(seed), shape
    coarse = random.random_sample((count, 4, 4, channels)).astype(np.float32)
    rows, columns = (np.linspace(0, 3, side) for side in (height, width))
    smooth = _interpolated(_interpolated(coarse, rows, 1), columns, 2)
    pixels = np.rint(255 * np.clip(3 * smooth - 1.5, 0, 1)).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def _interpolated(values: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Linear interpolation along an axis."""
    low = np.minimum(places.astype(int), values.shape[axis] - 2)
    shape = [-1 if axis == i else 1 for i in range(values.ndim)]
    weight = (places - low).astype(np.float32).reshape(shape)
    return (1 - weight) * values.take(low, axis) + weight * values.take(low + 1, axis)


def repository(name: str, folder: Path = FOLDER, remake: bool = False, console: Console | None = None) -> Path:
    """The folder of bundles of that set; what is not there, or was made by another configuration, is made."""
    root, recipe = folder / name, _recipe(name)
    if remake or _made_by(root) != recipe:
        shutil.rmtree(root, ignore_errors=True)
        for model, spec in SETS[name].items():
            _make(model, spec, IMAGES[name], root, console or Console(stderr=True))
        shutil.rmtree(root / WORK)
        (root / "recipe.json").write_text(json.dumps(recipe))
    return root


def _recipe(name: str) -> dict[str, object]:
    made = {"models": SETS[name], "images": IMAGES[name], "with": SPLITS + FAST}
    recipe: dict[str, object] = json.loads(json.dumps(made))
    return recipe


def _made_by(root: Path) -> dict[str, object] | None:
    """The recipe of what lies there; None if there is nothing whole that this version reads."""
    try:
        recipe: dict[str, object] = json.loads((root / "recipe.json").read_text())
        for path in root.glob("*/1"):
            open_bundle(path)
    except (OSError, ValueError, BundleError):
        return None
    return recipe


def _make(name: str, spec: Spec, images: int, root: Path, console: Console) -> Bundle:
    """Fit, evaluate, export and calibrate one model; its bundle is moved to root/NAME/1."""
    from training.config import load_config  # torch is imported only where a model is made
    from training.console import calibrate_stage, evaluate_stage, export_stage, fit_stage
    from training.runs import Launch

    shape, overrides = spec
    work = root / WORK / name
    work.mkdir(parents=True)
    np.save(work / "images.npy", synthetic_images(shape, images))
    base = {"name": name, "data": {"source": str(work / "images.npy"), "kind": "image"}}
    config = load_config(None, [*SPLITS, *FAST, *overrides], base)
    run, _ = fit_stage(config, work / "run", Launch(name=name), True, console)
    evaluate_stage(run, console)
    export_stage(run, console)
    calibrate_stage(run, console)
    (root / name).mkdir()
    run.staged.rename(root / name / "1")
    shutil.rmtree(work)
    return open_bundle(root / name / "1")


def main(argv: list[str] | None = None) -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__.split("\n", 1)[0])
    parser.add_argument("sets", nargs="*", default=list(SETS), help=f"of {', '.join(SETS)}; all")
    parser.add_argument("--remake", action="store_true", help="also those that are there")
    arguments = parser.parse_args(argv)
    for name in arguments.sets:
        if name not in SETS:
            parser.error(f"{name}: expected of {', '.join(SETS)}")
        print(repository(name, remake=arguments.remake))


if __name__ == "__main__":
    main()
