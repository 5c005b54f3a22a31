"""Presenting verdicts: rows of an answer, maps as pictures, the latents that add most to the rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from service.bundle.manifest import Manifest
from service.formats.rendering import encode_heat_maps, encode_overlays
from service.inference.model import Model
from service.repository.judging import CalibratedScore, InputRows, Verdicts
from service.repository.score_parameters import MapPicture
from service.scores.corruption import HIGH, LOW
from service.scores.corruption import UNIT as UNIT_OF_CORRUPTION
from service.scores.maps.anomaly_map import UNIT, ColourScale, MapKind


@dataclass(frozen=True)
class MapDescription:
    """Meaning of a map's numbers and of its colours.

    ``unit``: of the numbers. ``scale``: the first and the last colour of its pictures, None where each picture's own
    range is taken. ``origin``: whose that scale is.
    """

    kind: MapKind
    unit: str
    scale: ColourScale | None
    origin: Literal["calibration", "fixed", "of these maps"]


def describe_map(model: Model, kind: MapKind | None) -> MapDescription:
    """Describe the model's maps of that kind, or of its default kind where ``kind`` is None."""
    kind = kind or model.default_map
    if kind == "corruption":
        return MapDescription(kind, UNIT_OF_CORRUPTION, ColourScale(LOW, HIGH), "fixed")
    unit = UNIT if kind == "anomaly" else _unit_of_distortion(model.manifest)
    if model.anomaly_map is None:
        return MapDescription(kind, unit, None, "of these maps")
    return MapDescription(kind, unit, model.anomaly_map.scale(kind), "calibration")


def draw_maps(
    x: InputRows, maps: Sequence[np.ndarray] | np.ndarray, description: MapDescription, picture: MapPicture | None
) -> bytes:
    """Draw the maps of ``x``, float32 [h,w] each and all of one size, as one PNG: heat maps, or overlays of the images.

    Its text entries say ``kind``, ``unit`` and ``scale``.
    """
    text = {"kind": description.kind, "unit": description.unit, "scale": description.origin}
    if picture == "overlay":
        return encode_overlays(list(x), list(maps), description.scale, text)
    return encode_heat_maps(list(maps), description.scale, text)


def top_latents(verdicts: Verdicts, count: int) -> list[dict[str, Any]]:
    """List for each row the ``count`` latent dimensions that add most to the rate, in the field names of the API.

    Keys: ``largest``, dimensions and their nats, falling; ``others``, the sum over all other dimensions; ``joint``, the
    rest of the rate. The scores must hold ``latents``.
    """
    scores = verdicts.scores
    assert scores.latents is not None
    return [_top(row, float(rate), count) for row, rate in zip(scores.latents, scores.rate, strict=True)]


def result_rows(verdicts: Verdicts) -> list[dict[str, Any]]:
    """Make one dictionary a row, in the field names of the API, without maps; numbers that are not finite are None."""
    scores = verdicts.scores
    columns: dict[str, list[Any]] = {
        field: _numbers(getattr(scores, field))
        for field in ("score", "elbo", "log_likelihood", "rate", "distortion", "bits_per_dim", "standard_error")
    }
    n = len(scores.score)
    columns["k"] = [scores.k] * n
    columns |= _verdict_columns(verdicts.calibrated, n)
    if scores.tiles is not None:
        columns["tiles"] = [tiles._asdict() for tiles in scores.tiles]
    rows = _rows_of(columns)
    if verdicts.also:
        further = {name: _further_rows(verdicts, name) for name in verdicts.also}
        for index, row in enumerate(rows):
            row["also"] = {name: further_rows[index] for name, further_rows in further.items()}
    return rows


def _further_rows(verdicts: Verdicts, name: str) -> list[dict[str, Any]]:
    """One dictionary a row for the further score of that name."""
    scores = verdicts.scores.also[name]
    return _rows_of({"score": _numbers(scores)} | _verdict_columns(verdicts.also[name], len(scores)))


def _rows_of(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _verdict_columns(calibrated: CalibratedScore, n: int) -> dict[str, list[Any]]:
    return {
        "p_value": [None] * n if calibrated.p_values is None else _numbers(calibrated.p_values),
        "q_value": [None] * n if calibrated.q_values is None else _numbers(calibrated.q_values),
        "is_anomaly": list(calibrated.is_anomaly(n)),
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _top(nats: np.ndarray, rate: float, count: int) -> dict[str, Any]:
    """The ``count`` largest of a row's divergences by dimension, float64 [L]; equal ones in their order."""
    order = np.argsort(-nats, kind="stable")
    largest = [{"index": int(j), "nats": float(nats[j])} for j in order[:count]]
    return {"largest": largest, "others": float(nats[order[count:]].sum()), "joint": rate - float(nats[order].sum())}


def _unit_of_distortion(manifest: Manifest) -> str:
    """Nats, or the unit in which a model without a likelihood gives its reconstruction error."""
    if manifest.evidence != "none":
        return "nats"
    units = [definition.unit for definition in manifest.scores.values() if definition.estimator == "reconstruction"]
    return units[0] if units else "reconstruction error"
