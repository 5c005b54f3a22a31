"""Bundles without torch whose anomaly scores are fitted: of pictures, a table, signals, a PCA and a bijection."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from service.bundle.files import Bundle, open_bundle, write_bundle
from service.bundle.manifest import CALIBRATION, DETECTORS
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.scores.fitting import fitted_arrays, fitted_definitions
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.linear_bundles import (
    MIXTURE,
    PCA,
    TABLE,
    WHITENING,
    draw,
    write_mixture,
    write_pca,
    write_table,
    write_whitening,
)


class Family(NamedTuple):
    """How to write its bundle under a root, how to draw n inliers by a seed, and the scores it is given by fitting."""

    write: Callable[[Path], Path]
    inliers: Callable[[int, int], np.ndarray]
    scores: tuple[str, ...]


EVERY = ("path", "path-copod", "residual", "peak", "latent", "statistics", "combined")
OF_A_BOUND = ("rate", "reconstruction", "typicality")
FAMILIES: Mapping[str, Family] = {
    "pictures": Family(
        lambda root: write_ppca_bundle(root)[0],
        lambda n, seed: images(n, seed=seed),
        (*OF_A_BOUND, "complexity", "debiased", *EVERY),
    ),
    "table": Family(write_table, partial(draw, TABLE), (*OF_A_BOUND, *EVERY)),
    "signals": Family(write_mixture, partial(draw, MIXTURE), (*OF_A_BOUND, *EVERY)),
    "pca": Family(write_pca, partial(draw, PCA), EVERY),
    "bijection": Family(
        write_whitening,
        partial(draw, WHITENING),
        ("typicality", *(name for name in EVERY if name not in ("residual", "peak"))),
    ),
}


def fit(path: Path, root: Path, held_out: np.ndarray, reference: np.ndarray) -> Path:
    """A copy of the bundle under ``root``, its scores fitted, ``combined`` by default."""
    bundle = open_bundle(path)
    definitions = bundle.manifest.scores | fitted_definitions(bundle.manifest)
    arrays = fitted_arrays(Model.load(bundle, Runtime("cpu")), definitions, held_out, reference)
    changes = {
        "scores": {name: each.model_dump(mode="json") for name, each in definitions.items()},
        "default_score": "combined",
    }
    return rewrite(bundle, root, changes, {DETECTORS: npz(arrays)})


def rewrite(bundle: Bundle, root: Path, changes: dict[str, Any], files: dict[str, bytes]) -> Path:
    """The bundle again, uncalibrated, with other parts of its manifest and other files."""
    manifest = bundle.manifest.model_dump(mode="json") | {"calibration": None} | changes
    kept = {name: bundle.read(name) for name in bundle.manifest.files if name != CALIBRATION}
    content = {key: value for key, value in manifest.items() if key not in ("files", "format_version")}
    return write_bundle(root, content, kept | files)


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))
    return buffer.getvalue()
