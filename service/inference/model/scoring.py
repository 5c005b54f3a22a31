"""Scores of rows, from as few forward passes as their definitions need.

Beside x, the answer and the parts of log w, [N,k] each, a score holds up to some 8 arrays of MAX_ELEMENTS float32
numbers (64 MB), whatever N is: rows go through the graphs in parts (service.inference.model.graph_runners).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from service.bundle.manifest import FITTED, Manifest, ScoreDefinition
from service.inference.model.graph_runners import GraphRunners
from service.inference.model.latents import draw_prior_noise
from service.inference.model.maps import at_loc, map_values
from service.scores import bounds as estimators
from service.scores.detectors import Combination, Detector
from service.scores.evaluation import ForwardPasses, ScoreEvaluator
from service.scores.forward_pass import ForwardPass
from service.scores.latent_contributions import DRAWS, PriorMarginals, divergences, is_standard_normal
from service.scores.maps.anomaly_map import AnomalyMap, MapKind


class TileSummary(NamedTuple):
    """The number of an image's tiles, and the upper left corner in pixels and the score of the highest-scoring one."""

    n: int
    worst_y: int
    worst_x: int
    worst_score: float


class Scores(NamedTuple):
    """Scores of N rows, float64 [N], in nats but for ``bits_per_dim``; log w as in service.scores.bounds.

    ``score``: minus the estimate of the definition's estimator, higher is more anomalous. ``elbo``: (1/k) Σ log w.
    ``log_likelihood``: log (1/k) Σ w. ``rate``: mean of log q(z|x) − log p(z). ``distortion``: mean of −log p(x|z).
    ``bits_per_dim``: of the estimator's bound. ``standard_error``: Monte-Carlo error of ``score``, NaN when k = 1.
    ``map``: by place, float32 [N,H,W], or None: the anomaly map (service.scores.maps.anomaly_map), the distortion,
    summed over channels, or the log odds in nats that the place was painted over (service.scores.corruption).
    ``latents``: KL divergences by latent dimension that make up the rate (service.scores.latent_contributions), [N,L],
    or None.
    ``also``: further scores by name. ``tiles``: of a model of tiles, whose rows are images of any sizes, one summary a
    row. There ``score`` and those of ``also`` are aggregates of the tiles' scores, ``standard_error`` is NaN, the other
    numbers are means over the tiles, and ``map`` is a list of float32 [h,w], blended where tiles overlap.

    What a model does not have is NaN: of these elbo, log_likelihood and rate without a likelihood (score and distortion
    are then in the definition's unit); rate where the encoder is deterministic, distortion where it is a bijection
    besides; bits_per_dim where the score is no bound, or p(x) a density over other numbers than pixels.
    """

    score: np.ndarray
    elbo: np.ndarray
    log_likelihood: np.ndarray
    rate: np.ndarray
    distortion: np.ndarray
    bits_per_dim: np.ndarray
    standard_error: np.ndarray
    k: int
    map: np.ndarray | list[np.ndarray] | None
    latents: np.ndarray | None
    also: dict[str, np.ndarray]
    tiles: list[TileSummary] | None = None


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Join the scores of parts of the rows, N ≥ 1 each, that were asked for in the same way."""
    return Scores._make(map(_joined, zip(*parts, strict=True)))


def _joined(values: tuple[Any, ...]) -> Any:
    """One field of several Scores, joined; what is no sequence of rows (k, None) is the same in all."""
    first = values[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, dict):
        return {name: np.concatenate([value[name] for value in values]) for name in first}
    return [row for value in values for row in value] if isinstance(first, list) else first


class Scorer:
    """Scores rows whose type, shape and range were checked; of a model with a backbone its features are the rows."""

    def __init__(
        self,
        manifest: Manifest,
        runners: GraphRunners,
        detectors: Mapping[str, Detector | Combination],
        anomaly_map: AnomalyMap | None,
    ) -> None:
        self._manifest, self._runners = manifest, runners
        self._detectors, self._anomaly_map = detectors, anomaly_map

    def score(
        self,
        x: np.ndarray,
        definition: ScoreDefinition,
        also: Mapping[str, ScoreDefinition],
        map_kind: MapKind | None,
        latents: bool,
    ) -> Scores:
        """Scores of x, float32 [N,C,H,W], by ``definition`` and by those of ``also``, with a map of that kind if any.

        ``latents``: also the divergences by latent dimension. Raises InvalidInput for a fitted definition that is not
        the manifest's own, BundleGraphError where the model itself yields NaN.
        """
        size = self._runners.rows_at_once(max(needed.k for needed in (definition, *also.values())))
        parts = (x[start : start + size] for start in range(0, len(x), size))
        return join_scores([self._score_part(part, definition, also, map_kind, latents) for part in parts])

    def forward_pass(self, x: np.ndarray, k: int, seed: int, mean: bool, by_place: bool) -> ForwardPass:
        """Run one pass of x, float32 [N,C,H,W], through encoder, decoder and joint at the seed's k samples.

        ``mean``: also what is at loc. ``by_place``: also the distortion by place. What is not wanted is empty. Where
        the encoder takes no noise, all samples are copies of the one that runs.
        """
        distinct = self._runners.distinct_samples(k)
        distortion = np.zeros(x.shape if by_place else (len(x), 0))
        chunks: list[tuple[np.ndarray, ...]] = []
        loc = scale = target = np.empty(0)
        for encoded in self._runners.encode(x, distinct, seed):
            joint = self._runners.joint(encoded["target"], encoded["z"], by_place=by_place)
            chunks.append((joint.log_p_x_given_z, joint.log_p_z, encoded["log_q_z"]))
            loc, scale, target = encoded["loc"], encoded["scale"], encoded["target"]
            if by_place:
                distortion -= np.stack([row.sum(axis=0, dtype=np.float64) for row in joint.log_p_x_given_z_map])
        terms = (np.concatenate(parts, axis=1) for parts in zip(*chunks, strict=True))
        log_p_x_given_z, log_p_z, log_q_z = (np.repeat(term, k // distinct, axis=1) for term in terms)
        nothing = np.empty((len(x), 0), np.float32)
        mean_at_loc, distortion_at_loc = at_loc(self._runners, target, loc) if mean else (nothing, nothing)
        return ForwardPass(
            *(x, mean_at_loc, loc, scale, log_p_x_given_z, log_p_z, log_q_z),
            *(distortion / distinct, distortion_at_loc),
        )

    def _score_part(
        self,
        x: np.ndarray,
        main: ScoreDefinition,
        also: Mapping[str, ScoreDefinition],
        map_kind: MapKind | None,
        latents: bool,
    ) -> Scores:
        """``score`` of a few rows."""
        definitions, manifest = [main, *also.values()], self._manifest
        fitted = any(definition.estimator in FITTED for definition in definitions)
        passes = ForwardPasses(
            lambda x, k, seed, by_place: self.forward_pass(x, k, seed, fitted, by_place),
            x,
            definitions,
            map_kind == "distortion",
            self._runners.log_odds,
        )
        estimates = ScoreEvaluator(passes, manifest.scores, self._detectors, self._anomaly_map)
        scores = [estimates.score(definition) for definition in definitions]
        forward_pass, unknown = passes.of(main), np.full(len(x), np.nan)
        has_bound, is_point = manifest.evidence != "none", manifest.posterior.moments == "point"
        return Scores(
            score=scores[0],
            elbo=estimators.mean(forward_pass.log_w) if has_bound else unknown,
            log_likelihood=estimators.log_mean_exp(forward_pass.log_w) if has_bound else unknown,
            rate=(forward_pass.log_q_z - forward_pass.log_p_z).mean(axis=1) if has_bound and not is_point else unknown,
            distortion=-forward_pass.log_p_x_given_z.mean(axis=1) if manifest.has_distortion else unknown,
            bits_per_dim=self._bits_per_dim(-scores[0], main),
            standard_error=estimates.standard_error(main),
            k=main.k,
            map=map_values(map_kind, self._runners, self._anomaly_map, passes, forward_pass) if map_kind else None,
            latents=divergences(forward_pass.loc, forward_pass.scale, self._marginals) if latents else None,
            also=dict(zip(also, scores[1:], strict=True)),
        )

    def _bits_per_dim(self, bound: np.ndarray, definition: ScoreDefinition) -> np.ndarray:
        """A bound in nats, float64 [N], in bits per dimension of 8-bit pixels; NaN where it has no such meaning."""
        measure = self._manifest.likelihood.measure
        of_levels = measure == "counting" or (measure == "lebesgue" and self._manifest.modelled.kind == "image")
        if definition.estimator not in ("elbo", "iwae") or not of_levels:
            return np.full(len(bound), np.nan)
        return estimators.bits_per_dim(bound, math.prod(self._manifest.signature.shape), measure)

    @cached_property
    def _marginals(self) -> PriorMarginals | None:
        """The prior's marginals by latent dimension, drawn when first asked for; None where they are all N(0, 1)."""
        if is_standard_normal(self._manifest):
            return None
        return PriorMarginals(self._runners.draw_prior(draw_prior_noise(self._manifest, DRAWS, 0, 1.0)))
