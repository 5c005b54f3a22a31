"""Evaluation of score definitions on a few rows: every forward pass is run once, whatever the definitions need."""

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

SAMPLE_MEANS = get_args(LikelihoodEstimator)
"""Estimators that are means over posterior samples and need no fitted numbers."""
LogOddsFunction = Callable[[np.ndarray], np.ndarray]
"""Function of x, float32 [N,C,H,W], that gives the corruption graph's log odds, float32 [N,H,W], nats."""
ForwardFunction = Callable[[np.ndarray, int, int, bool], ForwardPass]
"""Function of x, k, seed, and whether the distortion is wanted by place, that runs one forward pass."""


class ForwardPasses:
    """The forward passes that some definitions need of the same rows, each run when it is first asked for.

    There is one pass a seed, with as many samples as the longest definition takes, and one more a seed of
    contrast-stretched images for the definitions that look at these; with ``maps`` each pass has the samples of its own
    definition, since a map is the mean over all samples of its pass. ``log_odds``: of the corruption graph, which a
    model need not have.
    """

    def __init__(
        self,
        run: ForwardFunction,
        x: np.ndarray,
        definitions: Sequence[ScoreDefinition],
        maps: bool,
        log_odds: LogOddsFunction | None = None,
    ) -> None:
        self._run, self._x, self._maps = run, x, maps
        self._compute_log_odds = log_odds
        self._log_odds: np.ndarray | None = None
        self._most_samples: dict[tuple[int, bool], int] = {}
        for definition in definitions:
            key = (definition.seed, is_stretched(definition))
            self._most_samples[key] = max(definition.k, self._most_samples.get(key, 0))
        self._passes: dict[tuple[int, int, bool], ForwardPass] = {}

    def of(self, definition: ScoreDefinition, stretch: bool = False) -> ForwardPass:
        """The pass at the definition's seed and first k samples, of x or of the contrast-stretched x."""
        seed, k = definition.seed, definition.k
        if not self._maps:
            k = max(k, self._most_samples.get((seed, stretch), 0))
        key = (seed, k, stretch)
        if key not in self._passes:
            x = stretched(self._x) if stretch else self._x
            self._passes[key] = self._run(x, k, seed, self._maps)
        return self._passes[key].first(definition.k)

    def log_odds(self) -> np.ndarray:
        """Log odds of x by the corruption graph, float32 [N,H,W], nats. Raises BundleGraphError."""
        if self._log_odds is None:
            assert self._compute_log_odds is not None, "definitions by a graph that is missing are refused before"
            self._log_odds = self._compute_log_odds(self._x)
        return self._log_odds


class ScoreEvaluator:
    """Computes scores by definition, float64 [N], higher is more anomalous; each fitted score is computed once.

    ``definitions``: the manifest's, by name; ``detectors``: the fitted ones among them, by name.
    """

    def __init__(
        self,
        passes: ForwardPasses,
        definitions: Mapping[str, ScoreDefinition],
        detectors: Mapping[str, Detector | Combination],
        anomaly_map: AnomalyMap | None = None,
    ) -> None:
        self._passes, self._definitions, self._detectors = passes, definitions, detectors
        self._map = anomaly_map
        self._fitted_scores: dict[str, np.ndarray] = {}

    def score(self, definition: ScoreDefinition) -> np.ndarray:
        """Compute one score, float64 [N].

        Raises InvalidInput for a fitted definition that is not the manifest's, BundleGraphError for NaN, and for
        infinity that the model did not yield.
        """
        if definition.estimator in SAMPLE_MEANS:
            return self._sample_mean(definition)
        if definition.estimator == "corruption":
            return corruption_scores(self._passes.log_odds())
        name = self._name(definition)
        if name is None:
            raise InvalidInput(
                f"{definition.estimator} with k={definition.k} and seed={definition.seed}: this score was fitted with "
                "the k and the seed of its definition, and has no other"
            )
        return self._fitted(name)

    def standard_error(self, definition: ScoreDefinition) -> np.ndarray:
        """Monte-Carlo standard error of the score, float64 [N]; NaN where the score is no mean over samples."""
        forward_pass = self._passes.of(definition)
        if definition.estimator not in SAMPLE_MEANS:
            return np.full(len(forward_pass.x), np.nan)
        return estimators.standard_error(_terms(forward_pass, definition), definition.estimator)

    def _name(self, definition: ScoreDefinition) -> str | None:
        """Name of that definition in the manifest, or None.

        By identity first, since comparing all fields of a dozen takes long.
        """
        same = [name for name, candidate in self._definitions.items() if candidate is definition]
        equal = (name for name, candidate in self._definitions.items() if candidate == definition)
        return same[0] if same else next(equal, None)

    def _sample_mean(self, definition: ScoreDefinition) -> np.ndarray:
        """A score that is a mean over samples, float64 [N]. Raises BundleGraphError for NaN."""
        terms = _terms(self._passes.of(definition), definition)
        if np.isnan(terms).any():
            row = int(np.argmax(np.isnan(terms).any(axis=1)))
            raise BundleGraphError(f"the model's {definition.estimator} is NaN for row {row}")
        return -(estimators.log_mean_exp(terms) if definition.estimator == "iwae" else estimators.mean(terms))

    def _fitted(self, name: str) -> np.ndarray:
        """The fitted score of that name, float64 [N]. Raises as ``_check``."""
        if name not in self._fitted_scores:
            definition = self._definitions[name]
            scores = self._peaks(definition) if definition.estimator == "peak" else self._detect(name, definition)
            self._check(name, definition, scores)
            self._fitted_scores[name] = scores
        return self._fitted_scores[name]

    def _check(self, name: str, definition: ScoreDefinition, scores: np.ndarray) -> None:
        """Raise BundleGraphError for NaN, and for infinity that finite inputs give: then what was fitted is off.

        Infinity is the right answer for a row so far away that the graphs overflow.
        """
        if np.isnan(scores).any():
            raise BundleGraphError(f"{name}: the model yields NaN for row {int(np.argmax(np.isnan(scores)))}")
        if np.isfinite(scores).all():
            return
        inputs_finite = np.logical_and.reduce([_finite_rows(part) for part in self._inputs(definition)])
        broken = ~np.isfinite(scores) & inputs_finite
        if broken.any():
            raise BundleGraphError(
                f"{name}: the fitted numbers yield {scores[broken][0]} for row {int(np.argmax(broken))}, of which the "
                "model tells finite ones"
            )

    def _inputs(self, definition: ScoreDefinition) -> Sequence[np.ndarray]:
        """The arrays, [N,…] each, that a fitted score is computed from."""
        if definition.estimator == "combination":
            return [self.score(self._definitions[part]) for part in definition.of]
        return self._passes.of(definition, is_stretched(definition)).arrays

    def _detect(self, name: str, definition: ScoreDefinition) -> np.ndarray:
        """The score by the detector of that name, float64 [N]."""
        detector = self._detectors[name]
        if isinstance(detector, Combination):
            return detector.score([self.score(self._definitions[part]) for part in definition.of])
        return detector.score(self._passes.of(definition, is_stretched(definition)))

    def _peaks(self, definition: ScoreDefinition) -> np.ndarray:
        """The mean of the anomaly map's highest places, float64 [N]."""
        assert self._map is not None, "load_map refuses a bundle with peaks of no map"
        forward_pass = self._passes.of(definition)
        return self._map.peaks(MapInputs(forward_pass.x, forward_pass.mean, forward_pass.distortion_at_loc))


def _finite_rows(values: np.ndarray) -> np.ndarray:
    """True for each row of [N,…] whose numbers are all finite: bool [N]."""
    finite: np.ndarray = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    return finite


def _terms(forward_pass: ForwardPass, definition: ScoreDefinition) -> np.ndarray:
    """The terms that the estimator averages over samples, float64 [N,k], higher for what is less anomalous."""
    if definition.estimator == "rate":
        return forward_pass.log_p_z - forward_pass.log_q_z
    return forward_pass.log_p_x_given_z if definition.estimator == "reconstruction" else forward_pass.log_w
