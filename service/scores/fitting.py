"""Fitting a bundle's anomaly scores and its anomaly map to held-out inliers, for training and recalibration alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from service.bundle.capabilities import refusals
from service.bundle.manifest import FITTED, Manifest, ScoreDefinition
from service.errors import InvalidInput
from service.scores.detector_arrays import Arrays
from service.scores.detectors import CLASSES, REFERENCE_NUMBERS, Combination, Detector, Latent, is_stretched, to_arrays
from service.scores.evaluation import ForwardPasses, ScoreEvaluator
from service.scores.forward_pass import ForwardPass
from service.scores.maps.anomaly_map import UNIT, AnomalyMap, MapInputs, MapParameters, map_arrays
from service.scores.tail import fit_tails

COMBINED = "combined"
PARTS = ("peak", "latent", "statistics", "complexity", "corruption")
"""Scores that the default score combines, as far as the model has them.

They measure how far x lies off the model where it does most, how far its code lies from other codes and its statistics
from the usual ones, by how much its likelihood is below that of images as complex, and how likely parts of it were
painted over.
"""
MIN_ROWS = 20
"""Fewest held-out rows that anything is fitted to."""
MAX_ROWS, MAX_NUMBERS = 4096, 2**24
"""Most held-out rows that are used, and most numbers of them together."""
BATCH = 64
DESCRIPTIONS: Mapping[str, str] = {
    "elbo": "negative ELBO in nats: mean of −log w over k posterior samples",
    "iwae": "negative IWAE-k bound in nats: −log of the mean of w over k posterior samples",
    "rate": "rate in nats: mean of log q(z|x) − log p(z)",
    "reconstruction": "distortion in nats: mean of −log p(x|z)",
    "typicality": "distance of the negative ELBO from its mean over inliers, nats",
    "complexity": "negative ELBO beyond what the image's code length explains, nats",
    "debiased": "negative ELBO of the contrast-stretched image beyond the best that its levels allow, nats",
    "path": "norms of x − x̂, μ and σ, made Gaussian: log of Mahalanobis' mean square",
    "path-copod": "norms of x − x̂, μ and σ by COPOD",
    "latent": "density of the encoded inliers at loc, by its nearest of them; nats up to a constant",
    "residual": "log of the mean squared residual, in inliers' deviations at each place",
    "peak": "mean of the highest places of the anomaly map, deviations of inliers' places",
    "statistics": "log of Mahalanobis' mean square of likelihood, residual, steepness and code length",
    "corruption": "highest log odds of any place that noise was painted there, nats",
    COMBINED: "sum of −log tail probabilities among inliers of the scores it combines, nats",
}

Progress = Callable[[int], None]
"""Called with the number of rows that were just processed."""


class EncodedRows(Protocol):
    """The part of an encoding that fitting reads."""

    @property
    def loc(self) -> np.ndarray:
        """Location of q(z|x), float32 [N,L]."""
        ...


class FittableModel(Protocol):
    """A loaded model whose scores can be fitted; service.inference.model.Model is one. Rows x are float32 [N,C,H,W]."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the model's bundle."""
        ...

    @property
    def refused(self) -> Mapping[str, str]:
        """Reasons why the model cannot answer, by verb or ``verb.parameter``."""
        ...

    def encode(self, x: np.ndarray, samples: int = 0, seed: int = 0) -> EncodedRows:
        """Encode rows: q(z|x) with ``samples`` draws from the seed's noise."""
        ...

    def forward_pass(self, x: np.ndarray, k: int, seed: int, stretch: bool = False) -> ForwardPass:
        """Run one forward pass at k posterior samples; ``stretch``: of the contrast-stretched images."""
        ...

    def map_inputs(self, x: np.ndarray) -> MapInputs:
        """Compute what an anomaly map is made from: E[x|loc] and −log p(x|loc) by place."""
        ...

    def log_odds(self, x: np.ndarray) -> np.ndarray:
        """Compute the corruption graph's log odds by place, float32 [N,H,W], nats."""
        ...


class FittedScores(NamedTuple):
    """Score definitions with the fitted numbers that no bundle holds yet; ``detectors`` by score name."""

    definitions: Mapping[str, ScoreDefinition]
    detectors: Mapping[str, Detector | Combination]
    anomaly_map: AnomalyMap | None


def fitted_definitions(manifest: Manifest) -> dict[str, ScoreDefinition]:
    """Definitions of the scores that a model of this kind can be given beside its own, by name, ``combined`` last.

    They take the k and the seed of its default score.
    """
    base = manifest.scores[manifest.default_score]
    is_image = manifest.modelled.kind == "image"
    has_bound = manifest.evidence != "none"
    refused = refusals(manifest)
    fields: dict[str, dict[str, object]] = {}
    if has_bound and "score.rate" not in refused:
        fields["rate"] = {"estimator": "rate"}
    if has_bound and "score.reconstruction" not in refused:
        fields["reconstruction"] = {"estimator": "reconstruction"}
    if has_bound:
        fields["typicality"] = {"estimator": "typicality"}
    if has_bound and is_image:
        fields["complexity"] = {"estimator": "complexity"}
    if has_bound and is_image and manifest.likelihood.pixelwise:
        fields["debiased"] = {"estimator": "debiased"}
    fields["path"] = {"estimator": "path", "method": "mahalanobis", "unit": "log"}
    fields["path-copod"] = {"estimator": "path", "method": "copod"}
    if manifest.likelihood.pixelwise:
        fields["residual"] = {"estimator": "residual", "unit": "log"}
    if "score.map" not in refused:
        fields["peak"] = {"estimator": "peak", "unit": UNIT}
    fields |= {"latent": {"estimator": "latent"}, "statistics": {"estimator": "statistics", "unit": "log"}}
    if "corruption" in manifest.graphs:
        fields["corruption"] = {"estimator": "corruption"}
    fields[COMBINED] = {"estimator": "combination", "of": [part for part in PARTS if part in fields]}
    shared = {"k": base.k, "seed": base.seed}
    return {
        name: ScoreDefinition.model_validate({**shared, "description": DESCRIPTIONS[name], **own})
        for name, own in fields.items()
        if name not in manifest.scores
    }


def max_reference_rows(manifest: Manifest) -> int:
    """Most inliers whose codes ``latent`` compares with."""
    return max(MIN_ROWS, REFERENCE_NUMBERS // manifest.signature.latent_dim)


def max_held_out_rows(manifest: Manifest) -> int:
    """Most held-out rows that ``fit_detectors`` is worth giving: a caller takes no more of what there is."""
    shape = manifest.signature.shape
    return max(MIN_ROWS, min(MAX_ROWS, MAX_NUMBERS // (shape[0] * shape[1] * shape[2])))


def fitted_arrays(
    model: FittableModel,
    definitions: Mapping[str, ScoreDefinition],
    held_out: np.ndarray,
    reference: np.ndarray,
    stored_codes: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Arrays:
    """Fit the map and the scores: the content of detectors.npz.

    The arguments are those of ``fit_map`` and ``fit_detectors``. Raises InvalidInput as they do.
    """
    parameters = fit_map(model, held_out, progress)
    anomaly_map = None if parameters is None else AnomalyMap(parameters)
    detectors = fit_detectors(model, definitions, held_out, reference, anomaly_map, stored_codes, progress)
    return to_arrays(detectors) | map_arrays(parameters)


def fit_detectors(
    model: FittableModel,
    definitions: Mapping[str, ScoreDefinition],
    held_out: np.ndarray,
    reference: np.ndarray,
    anomaly_map: AnomalyMap | None = None,
    stored_codes: np.ndarray | None = None,
    progress: Progress | None = None,
) -> dict[str, Detector | Combination]:
    """Fit the detectors of the fitted ones among ``definitions``, by name.

    ``held_out``: inliers float32 [n,C,H,W] that neither training nor calibration see; the first half fits the
    detectors, the second the combination of them. ``reference``: the inliers whose codes ``latent`` compares with,
    float32 [m,C,H,W]; training images will do. ``anomaly_map``: fitted to the same rows, for ``peak``.
    ``stored_codes``: more codes to compare with, encoded before, float32 [m',L].

    Raises InvalidInput for fewer than MIN_ROWS held-out rows, and where there is no code to compare with.
    """
    if len(held_out) < MIN_ROWS:
        raise InvalidInput(f"{len(held_out)} rows to fit scores on, expected at least {MIN_ROWS}")
    if not len(reference) and (stored_codes is None or not len(stored_codes)):
        raise InvalidInput("no rows to compare codes with, expected at least one")
    half = (len(held_out) + 1) // 2
    first, second = held_out[:half], held_out[half:]
    fitted = {name: definition for name, definition in definitions.items() if definition.estimator in FITTED}
    detectors: dict[str, Detector | Combination] = {
        name: Latent.of(_codes(model, reference, stored_codes, definition.seed), definition, model.manifest)
        for name, definition in fitted.items()
        if definition.estimator == "latent"
    }
    detectors |= _fit_by_passes(model, fitted, first, progress)
    for name, definition in fitted.items():
        if definition.estimator == "combination":
            parts = [definitions[part] for part in definition.of]
            scores = _scores(model, second, parts, FittedScores(definitions, detectors, anomaly_map), progress)
            detectors[name] = Combination(fit_tails(scores))
    return detectors


def _fit_by_passes(
    model: FittableModel, fitted: Mapping[str, ScoreDefinition], x: np.ndarray, progress: Progress | None
) -> dict[str, Detector | Combination]:
    """Fit the detectors that look at forward passes of x, float32 [n,C,H,W]; each pass is run once."""
    names_by_pass: dict[tuple[bool, int, int], list[str]] = {}
    for name, definition in fitted.items():
        if definition.estimator not in ("combination", "latent", "peak"):
            key = (is_stretched(definition), definition.k, definition.seed)
            names_by_pass.setdefault(key, []).append(name)
    detectors: dict[str, Detector | Combination] = {}
    for (stretch, k, seed), names in sorted(names_by_pass.items(), key=lambda item: item[0][0]):
        passes = [model.forward_pass(rows, k, seed, stretch) for rows in _batches(x, progress)]
        for name in names:
            detectors[name] = CLASSES[fitted[name].estimator].fit(passes, fitted[name], model.manifest)
    return detectors


def fit_map(model: FittableModel, held_out: np.ndarray, progress: Progress | None = None) -> MapParameters | None:
    """Fit the anomaly map (service.scores.maps.anomaly_map); None for a model without maps.

    ``held_out``: rows as ``fit_detectors`` takes them. Raises InvalidInput for fewer than MIN_ROWS rows.
    """
    if "score.map" in model.refused:
        return None
    if len(held_out) < MIN_ROWS:
        raise InvalidInput(f"{len(held_out)} rows to fit a map on, expected at least {MIN_ROWS}")
    half = (len(held_out) + 1) // 2
    first, second = (map(model.map_inputs, _batches(rows, progress)) for rows in (held_out[:half], held_out[half:]))
    return MapParameters.fit(first, second, model.manifest)


def _scores(
    model: FittableModel,
    x: np.ndarray,
    definitions: Sequence[ScoreDefinition],
    fitted: FittedScores,
    progress: Progress | None,
) -> np.ndarray:
    """Scores of x, float32 [n,C,H,W], by detectors that no bundle holds yet: float64 [n, definitions]."""
    batches = []
    for rows in _batches(x, progress):
        passes = ForwardPasses(
            lambda x, k, seed, _by_place: model.forward_pass(x, k, seed), rows, definitions, False, model.log_odds
        )
        evaluator = ScoreEvaluator(passes, *fitted)
        batches.append(np.stack([evaluator.score(definition) for definition in definitions], axis=1))
    return np.concatenate(batches)


def _codes(model: FittableModel, x: np.ndarray, stored_codes: np.ndarray | None, seed: int) -> np.ndarray:
    """Codes, loc of each row, float32 [m,L], and the stored ones after them, up to ``max_reference_rows``."""
    codes = [model.encode(rows, seed=seed).loc for rows in _batches(x)]
    stored = [] if stored_codes is None else [stored_codes]
    return np.concatenate([*codes, *stored])[: max_reference_rows(model.manifest)]


def _batches(x: np.ndarray, progress: Progress | None = None) -> Iterator[np.ndarray]:
    """Yield the rows of x, BATCH at a time, and report those that were processed."""
    for start in range(0, len(x), BATCH):
        yield x[start : start + BATCH]
        if progress:
            progress(len(x[start : start + BATCH]))
