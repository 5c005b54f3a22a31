"""Combination of scores by their tail probabilities among inliers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.scores.detector_arrays import Arrays
from service.scores.tail import Tail, tail_arrays


@dataclass(frozen=True, eq=False)
class Combination:
    """Σ over parts of −log P(part ≥ score) for an inlier, nats (Fisher 1932); ``tails``: those of the parts."""

    tails: tuple[Tail, ...]

    @property
    def arrays(self) -> Arrays:
        """What detectors.npz holds of it, by PARAMETER."""
        return tail_arrays(self.tails)

    def score(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Σ −log tail probability over the parts, nats, float64 [N], from the parts' scores, [N] each."""
        return np.sum([tail.surprisal(scores) for tail, scores in zip(self.tails, parts, strict=True)], axis=0)
