"""Detectors of the negative ELBO: its typicality, and what remains after the image's complexity or levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from service.bundle.manifest import Manifest, ScoreDefinition
from service.pixels import unit_levels
from service.scores import bounds as estimators
from service.scores.detector_arrays import ArraySpec, ArraySpecs
from service.scores.detectors.base import Detector
from service.scores.forward_pass import ForwardPass

LEVELS = 256
STRETCH = (5, 95)
"""Percentiles of an image that contrast stretching maps to 0 and 1."""
BEST = 0.95
"""Quantile of the log-likelihoods at a level that counts as the best that can be reached there."""


@dataclass(frozen=True, eq=False)
class Typicality(Detector):
    """Distance |−elbo − E[−elbo]| of the negative ELBO from its mean over inliers, nats (Nalisnick et al. 2019).

    ``mean``: that mean, float64 [].
    """

    mean: np.ndarray

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        return {"mean": ArraySpec(())}

    @classmethod
    def fit(cls, passes: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        return cls(definition, manifest, np.array(_surprisals(passes).mean()))

    def score(self, rows: ForwardPass) -> np.ndarray:
        return np.abs(_surprisal(rows) - float(self.mean))


@dataclass(frozen=True, eq=False)
class Complexity(Detector):
    """Excess −elbo − (a L(x) + b) of the negative ELBO over what the code length L(x) explains, nats.

    The line is fitted to inliers by least squares (after Serra et al. 2020, arXiv:1909.11480). ``line``: a and b,
    float64 [2].
    """

    line: np.ndarray

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        return {"line": ArraySpec((2,))}

    @classmethod
    def fit(cls, passes: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        surprisals = _surprisals(passes)
        lengths = np.concatenate([batch.code_lengths for batch in passes])
        spread = lengths - lengths.mean()
        varies = spread.std() > 1e-9 * lengths.mean()  # more than rounding alone may cause
        slope = float(spread @ (surprisals - surprisals.mean()) / (spread @ spread)) if varies else 0.0
        return cls(definition, manifest, np.array([slope, surprisals.mean() - slope * lengths.mean()]))

    def score(self, rows: ForwardPass) -> np.ndarray:
        slope, intercept = self.line
        beyond: np.ndarray = _surprisal(rows) - (slope * rows.code_lengths + intercept)
        return beyond


@dataclass(frozen=True, eq=False)
class Debiased(Detector):
    """Rate + Σ over pixels of (best log p at the pixel's level − log p), nats, of the contrast-stretched image.

    The best log p at a level is what inliers reach there (after Chauhan et al. 2022, arXiv:2108.08760). ``best``: it,
    in nats, by channel and level, float64 [C,LEVELS].
    """

    stretched = True
    best: np.ndarray

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        return {"best": ArraySpec((manifest.signature.shape[0], LEVELS))}

    @classmethod
    def fit(cls, passes: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        channels = manifest.signature.shape[0]
        best = np.zeros((channels, LEVELS))
        for channel in range(channels):
            levels = np.concatenate([_levels(batch.x[:, channel]).ravel() for batch in passes])
            log_p = -np.concatenate([batch.distortion[:, channel].ravel() for batch in passes])
            present = np.unique(levels)
            order = np.argsort(levels, kind="stable")
            groups = np.split(log_p[order], np.searchsorted(levels[order], present[1:]))
            best[channel] = np.interp(np.arange(LEVELS), present, [np.quantile(group, BEST) for group in groups])
        return cls(definition, manifest, best)

    def score(self, rows: ForwardPass) -> np.ndarray:
        best = [levels[_levels(rows.x[:, channel])] for channel, levels in enumerate(self.best)]
        total: np.ndarray = sum(log_p.reshape(len(rows.x), -1).sum(axis=1) for log_p in best)
        return _surprisal(rows) + total


def stretched(x: np.ndarray) -> np.ndarray:
    """Stretch the contrast of images float32 [N,C,H,W]: the 5th and 95th percentile of each become 0 and 1, in 8 bits.

    An image without contrast stays as it is.
    """
    out = np.empty_like(x)
    for image, result in zip(x, out, strict=True):
        low, high = np.percentile(image, STRETCH)
        scaled = (image - low) / (high - low) if high - low > 1 / LEVELS else image
        result[...] = unit_levels(np.rint(np.clip(scaled, 0, 1) * (LEVELS - 1)))
    return out


def _surprisal(rows: ForwardPass) -> np.ndarray:
    """Negative ELBO of each row, nats: float64 [N]."""
    return -estimators.mean(rows.log_w)


def _surprisals(passes: Sequence[ForwardPass]) -> np.ndarray:
    return np.concatenate([_surprisal(batch) for batch in passes])


def _levels(x: np.ndarray) -> np.ndarray:
    return np.rint(x * (LEVELS - 1)).astype(np.intp)
