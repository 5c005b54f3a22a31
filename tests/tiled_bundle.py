"""A real bundle of tiles without torch: PPCA of crops of a woven surface, calibrated by whole images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from service.bundle.files import open_bundle
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.tiled import TiledModel, fit_tile_tails, tile_tail_arrays
from service.pixels import unit_levels
from tests.ppca_bundle import npz, write_ppca_bundle

TILE, STRIDE, LATENT_DIM = 16, 8, 8
SPLIT = "calibration"


def surface(height: int, width: int, seed: int) -> np.ndarray:
    """A woven surface, its threads a little uneven, under uneven light: uint8 [1,h,w]."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    waver = [random.uniform(0.2, 0.5) * np.sin(t / random.uniform(20, 40) + random.uniform(0, 6)) for t in (y, x)]
    threads = np.sin(2 * np.pi * y / 8 + waver[1]) * np.sin(2 * np.pi * x / 8 + waver[0])
    light = 0.03 * np.sin(x / width * np.pi + random.uniform(0, 3))
    pixels = 0.5 + 0.14 * threads + light + 0.03 * random.standard_normal((height, width))
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)[None]


def with_scratch(image: np.ndarray, y: int, x: int) -> tuple[np.ndarray, np.ndarray]:
    """The image with a bright scratch of 12×2 pixels from (y, x) down, and where it is, bool [h,w]."""
    where = np.zeros(image.shape[1:], bool)
    where[y : y + 12, x : x + 2] = True
    return np.where(where, np.uint8(230), image), where


def crops(n: int, seed: int) -> np.ndarray:
    """Random tiles of n surfaces, 20 of each: float32 [20n,1,16,16]."""
    random = np.random.RandomState(seed)
    found = []
    for index in range(n):
        image = surface(64, 64, 1000 * seed + index)
        found += [image[:, y : y + TILE, x : x + TILE] for y, x in random.randint(0, 64 - TILE + 1, (20, 2))]
    return unit_levels(np.stack(found))


def write_tiled_bundle(root: Path, calibration_n: int = 39, **tiling: Any) -> Path:
    """Write root/weave/1; ``tiling`` changes the manifest's own."""
    rule = {"stride": [STRIDE, STRIDE], "aggregate": "maximum", "share": 0.05} | tiling

    def uncalibrated(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        manifest["preprocessing"]["tiling"] = rule
        manifest["calibration"] = None
        files.pop("calibration.npz")

    first, _ = _write(root / ".draft", uncalibrated)
    model = Model.load(open_bundle(first), Runtime("cpu"))
    names = model.manifest.scores
    tails = fit_tile_tails(model.score(crops(10, seed=2), also=names).also)
    images = [surface(64, 64, 50_000 + index) for index in range(calibration_n)]
    held_out = TiledModel(model, tails).score(images, also=names).also

    def calibrated(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        manifest["preprocessing"]["tiling"] = rule
        manifest["calibration"] = {"split": SPLIT, "n": calibration_n, "quantiles": {name: {} for name in held_out}}
        files["calibration.npz"] = npz({name: np.sort(scores) for name, scores in held_out.items()})
        files["tiles.npz"] = npz(tile_tail_arrays(tails))

    return _write(root, calibrated)[0]


def _write(root: Path, change: Any) -> Any:
    return write_ppca_bundle(
        root, "weave", shape=(1, TILE, TILE), latent_dim=LATENT_DIM, change=change, training=crops(20, seed=1)
    )
