"""Detector of large residuals x − x̂, in deviations of inliers' residuals, for each number of x."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from service.bundle.manifest import Manifest, ScoreDefinition
from service.scores.detector_arrays import ArraySpec, ArraySpecs
from service.scores.detectors.base import Detector
from service.scores.forward_pass import ForwardPass

MIN_RESIDUAL = 1e-3
"""Least deviation of a residual, relative to the mean |x|, or to 1 where x is 0."""
SHARED_UNITS: Mapping[str, tuple[int, ...]] = {"image": (0, 1, 2), "signal": (1, 2), "vector": ()}
"""Axes of [C,H,W] along which the numbers share a unit, by kind of input; all features of a backbone share one."""


@dataclass(frozen=True, eq=False)
class Residual(Detector):
    """Log of the mean of ((x − x̂ − m)/s)² over the numbers of x, m and s the inliers' mean and deviation of each.

    The variance of a number is raised by the mean variance of the numbers that share its unit, lest numbers that never
    change decide alone. All numbers of an image, or of a backbone's features, share a unit, and so do those of a
    signal's channel; each number of a vector has a unit of its own. ``mean``, ``scale``: m and s, float32 [C,H,W].
    """

    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        return {
            "mean": ArraySpec(manifest.signature.shape),
            "scale": ArraySpec(manifest.signature.shape, positive=True),
        }

    @classmethod
    def fit(cls, passes: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        return cls(definition, manifest, *residual_moments(((batch.x, batch.mean) for batch in passes), manifest))

    def score(self, rows: ForwardPass) -> np.ndarray:
        squares = ((rows.x.astype(np.float64) - rows.mean - self.mean) / self.scale) ** 2
        logs: np.ndarray = np.log(squares.reshape(len(squares), -1).mean(axis=1) + 1e-12)
        return logs


def residual_moments(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], manifest: Manifest
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each number of x − x̂, float32 [C,H,W], from batches of x and x̂, [n,C,H,W] each.

    The deviation is raised as ``Residual`` says.
    """
    total, squares, size = (np.zeros(manifest.signature.shape) for _ in range(3))
    count = 0
    for x, decoded in batches:
        residual = x.astype(np.float64) - decoded
        total, squares = total + residual.sum(axis=0), squares + (residual**2).sum(axis=0)
        size += np.abs(x).sum(axis=0, dtype=np.float64)
        count += len(x)
    mean = total / count
    variance = np.maximum(squares / count - mean**2, 0.0)
    shared = SHARED_UNITS[manifest.preprocessing.kind]
    size = size.mean(axis=shared, keepdims=True) / count
    least = (MIN_RESIDUAL * np.where(size > 0, size, 1.0)) ** 2
    scale = np.sqrt(variance + np.maximum(variance.mean(axis=shared, keepdims=True), least))
    return mean.astype(np.float32), scale.astype(np.float32)
