"""Registry of the detectors by estimator, and their arrays in detectors.npz."""

from __future__ import annotations

from collections.abc import Mapping

from service.bundle.files import Bundle
from service.bundle.manifest import DETECTORS, FITTED, Manifest, ScoreDefinition
from service.errors import BundleFormatError
from service.scores.detector_arrays import Arrays, by_score, keyed
from service.scores.detectors.base import Detector
from service.scores.detectors.combination import Combination
from service.scores.detectors.gaussian_statistics import LikelihoodPath, PassStatistics
from service.scores.detectors.latent import Latent
from service.scores.detectors.likelihood import Complexity, Debiased, Typicality
from service.scores.detectors.residual import Residual
from service.scores.tail import tails_from_arrays

RESERVED = "@"
"""First letter of the keys of detectors.npz that belong to the map and to no score: no score's name holds it."""


def is_stretched(definition: ScoreDefinition) -> bool:
    """True if the score looks at contrast-stretched images."""
    return definition.estimator in CLASSES and CLASSES[definition.estimator].stretched


CLASSES: Mapping[str, type[Detector]] = {
    "typicality": Typicality,
    "complexity": Complexity,
    "debiased": Debiased,
    "path": LikelihoodPath,
    "latent": Latent,
    "residual": Residual,
    "statistics": PassStatistics,
}


def detector_arrays(bundle: Bundle) -> Arrays:
    """Read the arrays of the bundle's detectors.npz, of its scores and of its map; none where the file is missing."""
    return bundle.arrays(DETECTORS) if DETECTORS in bundle.manifest.files else {}


def load_detectors(manifest: Manifest, arrays: Arrays) -> dict[str, Detector | Combination]:
    """Make the detectors of the manifest's fitted scores, by score name, from ``detector_arrays``.

    Raises BundleFormatError for arrays that are not those of the manifest's scores: other names, shapes or dtypes,
    numbers that are not finite, scales that are not positive, quantiles that do not rise.
    """
    with_arrays = FITTED - {"peak"}  # the numbers of a peak are the map's
    fitted = {name: score for name, score in manifest.scores.items() if score.estimator in with_arrays}
    if not fitted:
        return {}
    stored = by_score({key: array for key, array in arrays.items() if not key.startswith(RESERVED)})
    if unknown := sorted(stored.keys() - fitted.keys()):
        raise BundleFormatError(f"{DETECTORS} holds arrays of {unknown}, of no fitted score of the manifest")
    return {
        name: Combination(tails_from_arrays(stored.get(name, {}), len(score.of)))
        if score.estimator == "combination"
        else CLASSES[score.estimator].from_arrays(stored.get(name, {}), score, manifest)
        for name, score in fitted.items()
    }


def to_arrays(detectors: Mapping[str, Detector | Combination]) -> Arrays:
    """Arrays of the detectors as detectors.npz holds them, by the key "SCORE/PARAMETER"."""
    return keyed({name: detector.arrays for name, detector in detectors.items()})
