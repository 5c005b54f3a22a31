"""Score definitions evaluated on a few rows: every forward pass is run once, whatever is asked of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import numpy as np

from service.bundle.manifest import LikelihoodEstimator, ScoreDefinition
from service.errors import BundleGraphError, InvalidInput
from service.scores import bounds as estimators
from service.scores.corruption import corruption_scores
from service.scores.detectors import Combination, Detector, is_stretched, stretched
from service.scores.forward_pass import ForwardPass
from service.scores.maps.anomaly_map import AnomalyMap, MapInputs

OF_SAMPLES = get_args(LikelihoodEstimator)
"""Estimators that are means over posterior samples and need no fitted numbers."""
Corruption = Callable[[np.ndarray], np.ndarray]
"""x -> log odds by the corruption graph, float32 [N,H,W]."""
Measure = Callable[[np.ndarray, int, int, bool], ForwardPass]
"""x, k, seed, and whether the distortion is wanted by place."""


class ForwardPasses:
    """The forward passes that some definitions need of x, each made at most once: one a seed, of as many samples as the
    longest definition takes, and another of contrast-stretched images for the definitions that look at these; and that
    of ``corruption``, which a model without such a graph lacks."""

    def __init__(
        self,
        measure: Measure,
        x: np.ndarray,
        wanted: Sequence[ScoreDefinition],
        maps: bool,
        corruption: Corruption | None = None,
    ) -> None:
        self._measure, self._x, self._maps = measure, x, maps
        self._corruption = corruption
        self._log_odds: np.ndarray | None = None
        self._samples: dict[tuple[int, bool], int] = {}
        for definition in wanted:
            key = (definition.seed, is_stretched(definition))
            self._samples[key] = max(definition.k, self._samples.get(key, 0))
        self._made: dict[tuple[int, int, bool], ForwardPass] = {}

    def of(self, definition: ScoreDefinition, stretch: bool = False) -> ForwardPass:
        """The pass at the definition's seed and first k samples, of x or of the contrast-stretched x."""
        # A map is the mean over all samples of its pass: with one, the pass is of the definition's own k.
        k = definition.k if self._maps else max(definition.k, self._samples.get((definition.seed, stretch), 0))
        key = (definition.seed, k, stretch)
        if key not in self._made:
            x = stretched(self._x) if stretch else self._x
            self._made[key] = self._measure(x, k, definition.seed, self._maps)
        return self._made[key].first(definition.k)

    def log_odds(self) -> np.ndarray:
        """Of x by the corruption graph, float32 [N,H,W]. Raises BundleGraphError."""
        if self._log_odds is None:
            assert self._corruption is not None, "nothing asks for a graph that is not there"
            self._log_odds = self._corruption(self._x)
        return self._log_odds


class ScoreEvaluator:
    """Scores by definition, float64 [N], higher is more anomalous."""

    def __init__(
        self,
        passes: ForwardPasses,
        definitions: Mapping[str, ScoreDefinition],
        detectors: Mapping[str, Detector | Combination],
        anomaly_map: AnomalyMap | None = None,
    ) -> None:
        self._passes, self._definitions, self._detectors = passes, definitions, detectors
        self._map = anomaly_map
        self._known: dict[str, np.ndarray] = {}

    def score(self, definition: ScoreDefinition) -> np.ndarray:
        """Raises InvalidInput for a fitted definition that is not the manifest's, BundleGraphError for NaN, and for
        infinity that the model did not yield."""
        if definition.estimator in OF_SAMPLES:
            return self._of_weights(definition)
        if definition.estimator == "corruption":
            return corruption_scores(self._passes.log_odds())
        name = self._name(definition)
        if name is None:
            raise InvalidInput(
                f"{definition.estimator} with k={definition.k} and seed={definition.seed}: this score was fitted with "
                "the k and the seed of its definition, and has no other"
            )
        return self._fitted(name)

    def _name(self, definition: ScoreDefinition) -> str | None:
        """Which of the manifest's it is; by identity first, as comparing all fields of a dozen takes long."""
        names = [name for name, known in self._definitions.items() if known is definition]
        return names[0] if names else next((n for n, known in self._definitions.items() if known == definition), None)

    def standard_error(self, definition: ScoreDefinition) -> np.ndarray:
        """Monte-Carlo standard error of the score, NaN where it is no mean over samples."""
        forward_pass = self._passes.of(definition)
        if definition.estimator not in OF_SAMPLES:
            return np.full(len(forward_pass.x), np.nan)
        return estimators.standard_error(_terms(forward_pass, definition), definition.estimator)

    def _of_weights(self, definition: ScoreDefinition) -> np.ndarray:
        terms = _terms(self._passes.of(definition), definition)
        if np.isnan(terms).any():
            row = int(np.argmax(np.isnan(terms).any(axis=1)))
            raise BundleGraphError(f"the model's {definition.estimator} is NaN for row {row}")
        return -(estimators.log_mean_exp(terms) if definition.estimator == "iwae" else estimators.mean(terms))

    def _fitted(self, name: str) -> np.ndarray:
        if name not in self._known:
            definition = self._definitions[name]
            scores = self._peaks(definition) if definition.estimator == "peak" else self._detected(name, definition)
            self._check(name, definition, scores)
            self._known[name] = scores
        return self._known[name]

    def _check(self, name: str, definition: ScoreDefinition, scores: np.ndarray) -> None:
        """Refuse NaN, and infinity where all that the score is computed from is finite: then what was fitted is off.

        Of a row so far away that the graphs overflow infinity is the answer.
        """
        if np.isnan(scores).any():
            raise BundleGraphError(f"{name}: the model yields NaN for row {int(np.argmax(np.isnan(scores)))}")
        if np.isfinite(scores).all():
            return
        broken = ~np.isfinite(scores) & np.logical_and.reduce([_finite(part) for part in self._basis(definition)])
        if broken.any():
            raise BundleGraphError(
                f"{name}: the fitted numbers yield {scores[broken][0]} for row {int(np.argmax(broken))}, of which the "
                "model tells finite ones"
            )

    def _basis(self, definition: ScoreDefinition) -> Sequence[np.ndarray]:
        """What a fitted score is computed from, [N, …] each."""
        if definition.estimator == "combination":
            return [self.score(self._definitions[part]) for part in definition.of]
        return self._passes.of(definition, is_stretched(definition)).arrays

    def _detected(self, name: str, definition: ScoreDefinition) -> np.ndarray:
        detector = self._detectors[name]
        if isinstance(detector, Combination):
            return detector.score([self.score(self._definitions[part]) for part in definition.of])
        return detector.score(self._passes.of(definition, is_stretched(definition)))

    def _peaks(self, definition: ScoreDefinition) -> np.ndarray:
        assert self._map is not None, "load_map refuses a bundle with peaks of no map"
        forward_pass = self._passes.of(definition)
        return self._map.peaks(MapInputs(forward_pass.x, forward_pass.mean, forward_pass.distortion_at_loc))


def _finite(values: np.ndarray) -> np.ndarray:
    """Whether all numbers of a row are finite: bool [N], of [N, …]."""
    found: np.ndarray = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    return found


def _terms(forward_pass: ForwardPass, definition: ScoreDefinition) -> np.ndarray:
    """What the estimator averages over samples, float64 [N,k], higher for what is less anomalous."""
    if definition.estimator == "rate":
        return forward_pass.log_p_z - forward_pass.log_q
    return forward_pass.log_p_x if definition.estimator == "reconstruction" else forward_pass.log_w
