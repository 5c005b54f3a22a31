"""Parameters of a request to score, as pydantic models: they validate, and the API's documentation is made of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from service.bundle.manifest import LikelihoodEstimator
from service.calibration.conformal import GROUP_LENGTH, normalise_group
from service.scores.maps.anomaly_map import MapKind

Strict = Annotated[bool, Field(description="refuse images of another size instead of resizing them")]
Group = Annotated[
    str | None, BeforeValidator(lambda group: normalise_group(group) if isinstance(group, str) else group)
]
MapPicture = Literal["heat-map", "overlay"]


class Parameters(BaseModel):
    """Base of the parameters of all verbs: an unknown name is an error, not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ScoreParameters(Parameters):
    """Parameters of score. Without score, estimator, k and seed the bundle's calibrated default score is meant."""

    score: str | None = Field(default=None, max_length=64, description="one of the bundle's score definitions")
    estimator: LikelihoodEstimator | None = Field(
        default=None, description="another estimate than the named score's; verdicts only where it is calibrated"
    )
    k: int | None = Field(default=None, ge=1, description="posterior samples a row")
    seed: Annotated[int | None, Field(ge=0, lt=2**32)] = None
    also: str | None = Field(
        default=None,
        max_length=1024,
        description="further scores of the bundle, with commas between, or all; they share the forward passes",
    )
    false_positive_rate: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of inliers that may be called anomalous; default: a setting. Not beside a "
        "false-discovery rate",
    )
    false_discovery_rate: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="expected share of inliers among the rows of this request that are called anomalous, instead of "
        "the false-positive rate (Benjamini & Hochberg 1995)",
    )
    group: Group = Field(
        default=None,
        max_length=GROUP_LENGTH,
        description="compare with this group of the calibration images only, where the bundle has groups",
    )
    map: bool = Field(default=False, description="also a map: how anomalous is each pixel (feature, step)?")
    map_kind: MapKind | None = Field(
        default=None,
        description="anomaly: how far a place is from what held-out inliers show there, in deviations of inliers' "
        "places; distortion: −E[log p(x|z)], summed over channels; corruption: log odds in nats that the place was "
        "painted over, by the corruption graph. Default: anomaly where the bundle has it, else distortion",
    )
    map_picture: MapPicture | None = Field(
        default=None,
        description="of a PNG answer: the map in colours (the default), or laid over the image as the model saw it",
    )
    top_latents: int = Field(
        default=0, ge=0, le=4096, description="also so many latent dimensions, those that add most to the rate"
    )
    strict: Strict = False
