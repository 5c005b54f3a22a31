"""A bundle with a corruption graph, without torch: |x ∗ a Laplacian|, which is high where noise was painted."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto
from scipy import ndimage

from tests.ppca_bundle import SHAPE, GraphBuilder, npz, write_ppca_bundle

KERNEL = np.array([[0, -1, 0], [-1, 4, -1], [0, -1, 0]], np.float32)
SLOPE, SHIFT = np.float32(4), np.float32(3)
Change = Callable[[dict[str, Any], dict[str, bytes]], None]


def log_odds(x: np.ndarray) -> np.ndarray:
    """What the graph gives, as scipy computes it: float64 [N,H,W], of x [N,C,H,W]."""
    curved = np.stack([ndimage.correlate(image, KERNEL, mode="constant") for image in x.sum(axis=1, dtype=np.float64)])
    return SLOPE * np.abs(curved) - SHIFT


def corruption_graph(shape: tuple[int, int, int] = SHAPE) -> bytes:
    """corruption.onnx for images of that shape."""
    g = GraphBuilder()
    weight = np.broadcast_to(KERNEL, (1, shape[0], 3, 3)).copy()
    curved = g.add("Abs", g.add("Conv", "x", weight, pads=[1, 1, 1, 1]))
    scaled = g.add("Sub", g.add("Mul", curved, SLOPE), SHIFT)
    g.add("Squeeze", scaled, np.array([1]), output="log_odds")
    return built(g, shape)


def built(g: GraphBuilder, shape: tuple[int, int, int] = SHAPE) -> bytes:
    return g.build({"x": ["N", *shape]}, {"log_odds": (["N", *shape[1:]], TensorProto.FLOAT)})


def with_corruption(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    """Give the bundle the graph and its reference; no score of it yet."""
    manifest["graphs"]["corruption"] = "corruption.onnx"
    manifest["reference"]["tolerances"]["corruption.log_odds"] = {"atol": 2e-5, "rtol": 1e-6}
    files["corruption.onnx"] = corruption_graph(tuple(manifest["signature"]["shape"]))
    with np.load(io.BytesIO(files["reference.npz"])) as archive:
        arrays = dict(archive)
    files["reference.npz"] = npz(arrays | {"corruption.log_odds": log_odds(arrays["x"]).astype(np.float32)})


def with_score(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
    """Give it the graph and the score, uncalibrated."""
    with_corruption(manifest, files)
    manifest["scores"] = manifest["scores"] | {"corruption": {"estimator": "corruption", "k": 1, "seed": 0}}
    manifest["calibration"] = None
    files.pop("calibration.npz")


def write_corruption(root: Path, *changes: Change, **arguments: Any) -> Path:
    """The bundle with graph and score, uncalibrated; ``changes`` may damage it."""

    def change(manifest: dict[str, Any], files: dict[str, bytes]) -> None:
        for each in (with_score, *changes):
            each(manifest, files)

    return write_ppca_bundle(root, change=change, **arguments)[0]
