"""What a detector is: fitted numbers of one score, kept as arrays, that give each row of a forward pass a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np

from service.bundle.manifest import Manifest, ScoreDefinition
from service.scores.detector_arrays import Arrays, ArraySpecs, check_arrays
from service.scores.forward_pass import ForwardPass


class Detector(ABC):
    """Fitted numbers of one score."""

    stretched: ClassVar[bool] = False
    """Whether it looks at contrast-stretched images."""

    def __init__(self, arrays: Arrays, definition: ScoreDefinition, manifest: Manifest) -> None:
        """Raises BundleFormatError for arrays that are none of such a detector's."""
        check_arrays(definition.estimator, arrays, self.specs(manifest))
        self.arrays, self.definition, self.manifest = arrays, definition, manifest

    @classmethod
    @abstractmethod
    def specs(cls, manifest: Manifest) -> ArraySpecs:
        """The arrays that it has for such a model."""

    @classmethod
    @abstractmethod
    def fit(cls, parts: Sequence[ForwardPass], definition: ScoreDefinition, manifest: Manifest) -> Self:
        """From held-out inliers, a batch each of ``parts``."""

    @abstractmethod
    def score(self, rows: ForwardPass) -> np.ndarray:
        """Scores of N rows, float64 [N]."""
