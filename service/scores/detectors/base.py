"""Base of all detectors: the fitted state of one score, which gives each row of a forward pass a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from service.bundle.manifest import Manifest, ScoreDefinition
from service.scores.detector_arrays import Arrays, ArraySpecs, check_arrays
from service.scores.forward_pass import ForwardPass


@dataclass(frozen=True, eq=False)
class Detector(ABC):
    """Fitted state of the score ``definition`` of a model with that ``manifest``.

    A subclass adds its fitted arrays as further fields, named as the PARAMETER in their keys of detectors.npz.
    """

    stretched: ClassVar[bool] = False
    """True if the score looks at contrast-stretched images."""
    definition: ScoreDefinition
    manifest: Manifest

    @classmethod
    def from_arrays(cls, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> Self:
        """Make it of what detectors.npz holds of it, by PARAMETER; BundleFormatError unless that fulfils ``specs``."""
        check_arrays(definition.estimator, arrays, cls.specs(manifest))
        return cls(definition, manifest, **arrays)

    @property
    def arrays(self) -> Arrays:
        """What detectors.npz holds of it, by PARAMETER."""
        return {name: getattr(self, name) for name in self.specs(self.manifest)}

    @classmethod
    @abstractmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        """Requirements on the fitted arrays, by the names of their fields, for a model with that manifest."""

    @classmethod
    @abstractmethod
    def fit(cls, passes: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        """Fit to forward passes of held-out inliers, one batch of rows each."""

    @abstractmethod
    def score(self, rows: ForwardPass) -> np.ndarray:
        """Scores of the N rows of a forward pass, float64 [N], higher is more anomalous."""
