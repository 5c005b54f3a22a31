"""Detectors of the negative ELBO: its typicality, and what is left of it without the image's complexity or levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from service.bundle.manifest import Manifest, ScoreDefinition
from service.pixels import unit_levels
from service.scores import bounds as estimators
from service.scores.detector_arrays import ArraySpec, ArraySpecs
from service.scores.detectors.base import Detector
from service.scores.forward_pass import ForwardPass

LEVELS = 256
STRETCH = (5, 95)  # percentiles of an image that contrast stretching sends to 0 and 1
BEST = 0.95  # quantile of the log-likelihoods at a level that counts as the best that can be reached


class Typicality(Detector):
    """|−elbo − E[−elbo]|, nats."""

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        return {"mean": ArraySpec(())}

    @classmethod
    def fit(cls, parts: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        return cls({"mean": np.array(_surprisals(parts).mean())}, definition, manifest)

    def score(self, rows: ForwardPass) -> np.ndarray:
        return np.abs(_surprisal(rows) - float(self.arrays["mean"]))


class Complexity(Detector):
    """−elbo − (a L(x) + b), nats: the line fitted by least squares to the inliers."""

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        return {"line": ArraySpec((2,))}

    @classmethod
    def fit(cls, parts: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        surprisals = _surprisals(parts)
        lengths = np.concatenate([part.code_lengths for part in parts])
        spread = lengths - lengths.mean()
        varies = spread.std() > 1e-9 * lengths.mean()  # more than rounding alone may cause
        slope = float(spread @ (surprisals - surprisals.mean()) / (spread @ spread)) if varies else 0.0
        return cls({"line": np.array([slope, surprisals.mean() - slope * lengths.mean()])}, definition, manifest)

    def score(self, rows: ForwardPass) -> np.ndarray:
        slope, intercept = self.arrays["line"]
        beyond: np.ndarray = _surprisal(rows) - (slope * rows.code_lengths + intercept)
        return beyond


class Debiased(Detector):
    """rate + Σ over pixels of (best log p at the pixel's level − log p), nats, of the stretched image."""

    stretched = True

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        return {"best": ArraySpec((manifest.signature.shape[0], LEVELS))}

    @classmethod
    def fit(cls, parts: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        channels = manifest.signature.shape[0]
        best = np.zeros((channels, LEVELS))
        for channel in range(channels):
            levels = np.concatenate([_levels(part.x[:, channel]).ravel() for part in parts])
            log_p = -np.concatenate([part.distortion[:, channel].ravel() for part in parts])
            known = np.unique(levels)
            order = np.argsort(levels, kind="stable")
            groups = np.split(log_p[order], np.searchsorted(levels[order], known[1:]))
            best[channel] = np.interp(np.arange(LEVELS), known, [np.quantile(group, BEST) for group in groups])
        return cls({"best": best}, definition, manifest)

    def score(self, rows: ForwardPass) -> np.ndarray:
        best = [levels[_levels(rows.x[:, channel])] for channel, levels in enumerate(self.arrays["best"])]
        total: np.ndarray = sum(each.reshape(len(rows.x), -1).sum(axis=1) for each in best)
        return _surprisal(rows) + total


def stretched(x: np.ndarray) -> np.ndarray:
    """Images [N,C,H,W] after contrast stretching: the 5th and 95th percentile of each become 0 and 1, in 8 bits.

    An image without contrast stays as it is.
    """
    out = np.empty_like(x)
    for image, result in zip(x, out, strict=True):
        low, high = np.percentile(image, STRETCH)
        scaled = (image - low) / (high - low) if high - low > 1 / LEVELS else image
        result[...] = unit_levels(np.rint(np.clip(scaled, 0, 1) * (LEVELS - 1)))
    return out


def _surprisal(rows: ForwardPass) -> np.ndarray:
    """−elbo of each row, nats: float64 [N]."""
    return -estimators.mean(rows.log_w)


def _surprisals(parts: Sequence[ForwardPass]) -> np.ndarray:
    return np.concatenate([_surprisal(part) for part in parts])


def _levels(x: np.ndarray) -> np.ndarray:
    return np.rint(x * (LEVELS - 1)).astype(np.intp)
