"""Fitting a bundle's anomaly scores to held-out inliers, torch-free: for vaetrain and ``vaeserve calibrate`` alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from service.bundle.capabilities import refusals
from service.bundle.manifest import FITTED, Manifest, ScoreDefinition
from service.errors import InvalidInput
from service.scores.detector_arrays import Arrays
from service.scores.detectors import CLASSES, REFERENCE_NUMBERS, Combination, Detector, Latent, to_arrays
from service.scores.evaluation import ForwardPasses, ScoreEvaluator
from service.scores.forward_pass import ForwardPass
from service.scores.maps.anomaly_map import UNIT, AnomalyMap, MapInputs, map_arrays

COMBINED = "combined"
PARTS = ("peak", "latent", "statistics", "complexity", "corruption")
"""What the default score combines, as far as the model has them: how far x lies off the model where it does most, its
code off the codes and its statistics off the usual ones, its likelihood below what an image so complex has, and how
likely parts of it were painted over."""
LEAST_ROWS = 20  # held-out rows without which nothing is fitted
MOST_ROWS = 4096  # that are looked at
MOST_NUMBERS = 2**24  # of their pixels
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


class EncodedRows(Protocol):
    """The part of an encoding that fitting reads: ``loc`` of q(z|x), float32 [N,L]."""

    @property
    def loc(self) -> np.ndarray: ...


class FittableModel(Protocol):
    """A loaded model whose scores can be fitted; service.inference.model.Model is one.

    ``refused``: verb, or ``verb.parameter`` -> why the model cannot answer it. Rows ``x`` are float32 [N,C,H,W].
    """

    @property
    def manifest(self) -> Manifest: ...

    @property
    def refused(self) -> Mapping[str, str]: ...

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


class Fitted(NamedTuple):
    """What scores are computed with that no bundle holds yet."""

    definitions: Mapping[str, ScoreDefinition]
    detectors: Mapping[str, Detector | Combination]
    anomaly_map: AnomalyMap | None


def fitted_definitions(manifest: Manifest) -> dict[str, ScoreDefinition]:
    """The scores that a model of this kind can be given beside its own, ``combined`` last.

    They take the k and the seed of its default score.
    """
    base = manifest.scores[manifest.default_score]
    is_image = manifest.modelled.kind == "image"
    has_bound = manifest.evidence != "none"
    refused = refusals(manifest)
    wanted: dict[str, dict[str, object]] = {}
    if has_bound and "score.rate" not in refused:
        wanted["rate"] = {"estimator": "rate"}
    if has_bound and "score.reconstruction" not in refused:
        wanted["reconstruction"] = {"estimator": "reconstruction"}
    if has_bound:
        wanted["typicality"] = {"estimator": "typicality"}
    if has_bound and is_image:
        wanted["complexity"] = {"estimator": "complexity"}
    if has_bound and is_image and manifest.likelihood.pixelwise:
        wanted["debiased"] = {"estimator": "debiased"}
    wanted["path"] = {"estimator": "path", "method": "mahalanobis", "unit": "log"}
    wanted["path-copod"] = {"estimator": "path", "method": "copod"}
    if manifest.likelihood.pixelwise:
        wanted["residual"] = {"estimator": "residual", "unit": "log"}
    if "score.map" not in refused:
        wanted["peak"] = {"estimator": "peak", "unit": UNIT}
    wanted |= {"latent": {"estimator": "latent"}, "statistics": {"estimator": "statistics", "unit": "log"}}
    if "corruption" in manifest.graphs:
        wanted["corruption"] = {"estimator": "corruption"}
    wanted[COMBINED] = {"estimator": "combination", "of": [part for part in PARTS if part in wanted]}
    shared = {"k": base.k, "seed": base.seed}
    return {
        name: ScoreDefinition.model_validate({**shared, "description": DESCRIPTIONS[name], **fields})
        for name, fields in wanted.items()
        if name not in manifest.scores
    }


def reference_room(manifest: Manifest) -> int:
    """How many inliers ``latent`` compares with, at most."""
    return max(LEAST_ROWS, REFERENCE_NUMBERS // manifest.signature.latent_dim)


def room(manifest: Manifest) -> int:
    """How many held-out rows are worth giving to ``fit_detectors``: more would be left out."""
    shape = manifest.signature.shape
    return max(LEAST_ROWS, min(MOST_ROWS, MOST_NUMBERS // (shape[0] * shape[1] * shape[2])))


def fitted_arrays(
    model: FittableModel,
    definitions: Mapping[str, ScoreDefinition],
    held_out: np.ndarray,
    reference: np.ndarray,
    known_codes: np.ndarray | None = None,
    progress: Progress | None = None,
) -> Arrays:
    """All that detectors.npz holds: of the map and of the fitted scores. See ``fit_map`` and ``fit_detectors``."""
    places = fit_map(model, held_out, progress)
    detectors = fit_detectors(model, definitions, held_out, reference, places, known_codes, progress)
    return to_arrays(detectors) | map_arrays(places)


def fit_detectors(
    model: FittableModel,
    definitions: Mapping[str, ScoreDefinition],
    held_out: np.ndarray,
    reference: np.ndarray,
    anomaly_map: AnomalyMap | None = None,
    known_codes: np.ndarray | None = None,
    progress: Progress | None = None,
) -> dict[str, Detector | Combination]:
    """The detectors of the fitted ones among ``definitions``, by name.

    ``held_out``: inliers float32 [n,C,H,W] that neither training nor calibration see; the first half fits the
    detectors, the second the combination of them. ``reference``: the inliers whose codes ``latent`` compares with,
    float32 [m,C,H,W]; training images will do. ``anomaly_map``: of the same rows, for ``peak``. ``known_codes``:
    more codes to compare with, encoded before, float32 [m',L].
    Raises InvalidInput for fewer than LEAST_ROWS held-out rows.
    """
    if len(held_out) < LEAST_ROWS:
        raise InvalidInput(f"{len(held_out)} rows to fit scores on, expected at least {LEAST_ROWS}")
    if not len(reference) and (known_codes is None or not len(known_codes)):
        raise InvalidInput("no rows to compare codes with, expected at least one")
    half = (len(held_out) + 1) // 2
    first, second = held_out[:half], held_out[half:]
    fitted = {name: each for name, each in definitions.items() if each.estimator in FITTED}
    single = {name: each for name, each in fitted.items() if each.estimator not in ("combination", "latent", "peak")}
    detectors: dict[str, Detector | Combination] = {
        name: Latent.of(_codes(model, reference, known_codes, definition.seed), definition, model.manifest)
        for name, definition in fitted.items()
        if definition.estimator == "latent"
    }
    for stretch in (False, True):
        here = {n: each for n, each in single.items() if CLASSES[each.estimator].stretched == stretch}
        for (k, seed), names in _by_pass(here).items():
            rows = list(_measured(model, first, k, seed, stretch, progress))
            for name in names:
                kind = CLASSES[single[name].estimator]
                detectors[name] = kind.fit(rows, single[name], model.manifest)
    for name, definition in fitted.items():
        if definition.estimator == "combination":
            parts = [definitions[part] for part in definition.of]
            detectors[name] = Combination.fit(
                _scores(model, second, parts, Fitted(definitions, detectors, anomaly_map), progress)
            )
    return detectors


def fit_map(model: FittableModel, held_out: np.ndarray, progress: Progress | None = None) -> AnomalyMap | None:
    """The anomaly map (service.scores.maps.anomaly_map) from rows as ``fit_detectors`` takes them; None of a model
    without maps.

    Raises InvalidInput for fewer than LEAST_ROWS rows.
    """
    if "score.map" in model.refused:
        return None
    if len(held_out) < LEAST_ROWS:
        raise InvalidInput(f"{len(held_out)} rows to fit a map on, expected at least {LEAST_ROWS}")
    half = (len(held_out) + 1) // 2
    first, second = (_sights(model, rows, progress) for rows in (held_out[:half], held_out[half:]))
    return AnomalyMap.fit(first, second, model.manifest)


def _sights(model: FittableModel, x: np.ndarray, progress: Progress | None) -> Iterable[MapInputs]:
    for start in range(0, len(x), BATCH):
        yield model.map_inputs(x[start : start + BATCH])
        _tell(progress, len(x[start : start + BATCH]))


def _scores(
    model: FittableModel,
    x: np.ndarray,
    wanted: Sequence[ScoreDefinition],
    fitted: Fitted,
    progress: Progress | None,
) -> np.ndarray:
    """Scores of x by detectors that no bundle holds yet: float64 [n, definitions]."""
    found = []
    for start in range(0, len(x), BATCH):
        rows = x[start : start + BATCH]
        passes = ForwardPasses(
            lambda x, k, seed, _places: model.forward_pass(x, k, seed), rows, wanted, False, model.log_odds
        )
        estimates = ScoreEvaluator(passes, *fitted)
        found.append(np.stack([estimates.score(each) for each in wanted], axis=1))
        _tell(progress, len(rows))
    return np.concatenate(found)


def _measured(
    model: FittableModel, x: np.ndarray, k: int, seed: int, stretch: bool, progress: Progress | None
) -> Iterable[ForwardPass]:
    for start in range(0, len(x), BATCH):
        yield model.forward_pass(x[start : start + BATCH], k, seed, stretch)
        _tell(progress, len(x[start : start + BATCH]))


def _by_pass(definitions: Mapping[str, ScoreDefinition]) -> dict[tuple[int, int], list[str]]:
    """(k, seed) -> names of the definitions that want this pass."""
    found: dict[tuple[int, int], list[str]] = {}
    for name, definition in definitions.items():
        found.setdefault((definition.k, definition.seed), []).append(name)
    return found


def _codes(model: FittableModel, x: np.ndarray, known: np.ndarray | None, seed: int) -> np.ndarray:
    """loc of each row, float32 [m,L], and the known ones after them, as far as there is room."""
    found = [model.encode(x[i : i + BATCH], seed=seed).loc for i in range(0, len(x), BATCH)]
    return np.concatenate([*found, *([] if known is None else [known])])[: reference_room(model.manifest)]


def _tell(progress: Progress | None, rows: int) -> None:
    if progress:
        progress(rows)
