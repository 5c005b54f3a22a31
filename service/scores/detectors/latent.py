"""Detector of unusual codes: how far loc lies from the codes of inliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from service.bundle.manifest import Manifest, ScoreDefinition
from service.scores.detector_arrays import ArraySpec, ArraySpecs
from service.scores.detectors.base import Detector
from service.scores.forward_pass import ForwardPass
from service.scores.nearest_neighbours import NearestNeighbours

REFERENCE_NUMBERS = 2**18
"""Numbers of encoded inliers that a new bundle is given: a megabyte."""
MAX_REFERENCE_NUMBERS = 2**24
"""Most numbers of encoded inliers that a bundle may bring: every scored row is compared with all of them."""
NEIGHBOURS = 5


@dataclass(frozen=True, eq=False)
class Latent(Detector):
    """L log r, nats up to a constant: r is the mean distance of loc to its nearest neighbours among encoded inliers.

    That is minus the log of a nearest-neighbour density (Loftsgaarden & Quesenberry 1965). The inliers are training
    images, say; the bundle carries their codes, ``reference``, float32 [m,L].
    """

    reference: np.ndarray

    @cached_property
    def _neighbours(self) -> NearestNeighbours:
        return NearestNeighbours(self.reference, NEIGHBOURS)

    @classmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        latent_dim = manifest.signature.latent_dim
        return {"reference": ArraySpec((range(1, max(2, MAX_REFERENCE_NUMBERS // latent_dim) + 1), latent_dim))}

    @classmethod
    def fit(cls, passes: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        return cls.of(np.concatenate([batch.loc for batch in passes]), definition, manifest)

    @classmethod
    def of(cls, codes: np.ndarray, definition: ScoreDefinition, manifest: Manifest) -> Self:
        """Make the detector of the inliers' codes, float32 [m,L]."""
        return cls(definition, manifest, np.ascontiguousarray(codes, np.float32))

    def score(self, rows: ForwardPass) -> np.ndarray:
        locs = rows.loc
        finite = np.isfinite(locs).all(axis=1)
        nearest = self._neighbours.distances(np.where(finite[:, None], locs, np.float32(0)))
        logs: np.ndarray = locs.shape[1] * np.log(nearest.mean(axis=1) + 1e-12)
        # A code at infinity is infinitely far; where a code is NaN, so is its score.
        return np.where(finite, logs, np.where(np.isnan(locs).any(axis=1), np.nan, np.inf))
