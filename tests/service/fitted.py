"""A bundle with every anomaly score, fitted and calibrated: tests.ppca_bundle's with what service.scores.fitting
adds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from service.bundle.files import open_bundle, write_bundle
from service.bundle.manifest import CALIBRATION, DETECTORS
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.scores.fitting import fitted_arrays, fitted_definitions
from tests.ppca_bundle import images

N_CALIBRATION, N_FIT = 99, 120


def write_fitted(root: Path, source: Path, extra: dict[str, np.ndarray] | None = None) -> Path:
    """root/ppca/2 made of the bundle at ``source``; ``extra``: further arrays of calibration.npz."""
    bundle = open_bundle(source)
    manifest = bundle.manifest.model_dump(mode="json", exclude={"files"})
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    model = Model.load(bundle, Runtime("cpu"))
    definitions = bundle.manifest.scores | fitted_definitions(bundle.manifest)
    manifest |= {
        "version": "2",
        "scores": {name: definition.model_dump(mode="json") for name, definition in definitions.items()},
        "default_score": "combined",
    }
    arrays = fitted_arrays(model, definitions, images(N_FIT, seed=1), images(N_FIT, seed=2))
    files[DETECTORS] = npz(arrays)
    fitted = Model.load(open_bundle(write_bundle(root / "uncalibrated", manifest | {"calibration": None}, files)),
                        Runtime("cpu"))  # fmt: skip
    held_out = fitted.score(images(N_CALIBRATION, seed=3), also=definitions).also
    quantiles = {name: {"0.5": float(np.median(scores))} for name, scores in held_out.items()}
    manifest["calibration"] |= {"n": N_CALIBRATION, "quantiles": quantiles}
    files[CALIBRATION] = npz({name: np.sort(scores) for name, scores in held_out.items()} | (extra or {}))
    return write_bundle(root, manifest, files)


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()
