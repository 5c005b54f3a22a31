"""Base of all detectors: fitted numbers of one score, kept as arrays, that give each row of a forward pass a score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np

from service.bundle.manifest import Manifest, ScoreDefinition
from service.scores.detector_arrays import Arrays, ArraySpecs, check_arrays
from service.scores.forward_pass import ForwardPass


class Detector(ABC):
    """Fitted numbers of one score; ``arrays`` are what detectors.npz holds of it."""

    stretched: ClassVar[bool] = False
    """True if the score looks at contrast-stretched images."""

    def __init__(self, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> None:
        """Raises BundleFormatError for arrays that do not fulfil ``specs``."""
        check_arrays(definition.estimator, arrays, self.specs(manifest))
        self.arrays, self.definition, self.manifest = arrays, definition, manifest

    @classmethod
    @abstractmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        """Requirements on the detector's arrays, by name, for a model with that manifest."""

    @classmethod
    @abstractmethod
    def fit(cls, passes: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        """Fit to forward passes of held-out inliers, one batch of rows each."""

    @abstractmethod
    def score(self, rows: ForwardPass) -> np.ndarray:
        """Scores of the N rows of a forward pass, float64 [N], higher is more anomalous."""
