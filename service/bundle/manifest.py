"""manifest.json: everything the service needs to know of a model, as pydantic models."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, ValidationError, model_validator

from service.bundle.input_rules import Backbone, InputRule, Sha256, StrictModel
from service.errors import BundleFormatError

FORMAT_VERSION: Final = 5
CONVERTIBLE_VERSIONS: Final = (3, 4)
"""Earlier formats that ``vaeserve convert`` turns into this one."""
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
REFERENCE = "reference.npz"
CALIBRATION = "calibration.npz"
DETECTORS = "detectors.npz"
TILES = "tiles.npz"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127})?$")]
Graph = Literal["encoder", "decoder", "joint", "observation", "prior", "backbone", "corruption"]
LikelihoodEstimator = Literal["elbo", "iwae", "reconstruction", "rate"]
FittedEstimator = Literal[
    "typicality", "complexity", "debiased", "path", "latent", "residual", "peak", "statistics", "combination"
]
LearnedEstimator = Literal["corruption"]
"""Scores that a graph of their own computes: no detector is fitted, and every k and seed gives the same number."""
Estimator = Literal[LikelihoodEstimator, FittedEstimator, LearnedEstimator]
FITTED: Final = frozenset(get_args(FittedEstimator))
IN_NATS: Final = frozenset({"elbo", "iwae", "rate", "typicality", "complexity", "debiased"})
"""Estimators that are computed from a likelihood: they need one, and answer in nats."""


class Signature(StrictModel):
    """Sizes of the graphs' tensors. ``dither``: the encoder also wants uniform [0,1) numbers, one for each of x."""

    shape: tuple[int, int, int] = Field(
        description="(C, H, W) of an image, (1, 1, D) of a vector, (C, 1, T) of a signal, or a backbone's features"
    )
    latent_dim: int = Field(ge=1)
    noise_dim: int = Field(
        ge=0, description="standard normal numbers that one posterior sample takes (E); 0 of a deterministic encoder"
    )
    dither: bool = False


class Prior(StrictModel):
    """p(z). ``standard_normal``: z is the noise itself. ``none``: the model has no p(z), and nothing can be sampled.

    Any other family is drawn by prior.onnx, from ``noise_dim`` standard normal numbers a latent and, if ``choice``, one
    uniform number beside them (which component of a mixture, say).
    """

    family: str = "standard_normal"
    noise_dim: int | None = Field(default=None, ge=1, description="standard normal numbers that one latent takes (P)")
    choice: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Prior:
        needs_graph = self.family not in ("standard_normal", "none")
        if needs_graph and self.noise_dim is None:
            raise ValueError(f"prior.noise_dim is null, family {self.family!r} is drawn by a graph and needs it")
        if not needs_graph and (self.noise_dim is not None or self.choice):
            raise ValueError(f"prior.noise_dim and prior.choice are a graph's, family {self.family!r} has none")
        return self


class Posterior(StrictModel):
    """Family of q(z|x), and what the encoder's ``loc`` and ``scale`` mean.

    ``exact``: mean and marginal standard deviation. ``base``: the image of the base distribution's mean, and the base's
    deviation (flows and ladders of latents). ``point``: the encoder is a function, ``scale`` is 0 and every z is loc;
    there is nothing to draw (signature.noise_dim is 0), and no rate.
    """

    family: str = "diagonal_gaussian"
    moments: Literal["exact", "base", "point"] = "exact"


class Likelihood(StrictModel):
    """p(x|z): its parameters are the decoder's outputs beside ``mean``.

    ``measure``: ``counting`` when log p(x) is the log of a probability (binary or 8-bit pixels), ``lebesgue`` when it
    is a density over x as it stands, ``none`` when the model has no likelihood. Bits per dimension of a density over
    pixels in [0, 1] are stated for 8-bit pixels, log2(256) higher; one over other numbers has none.
    ``pixelwise``: whether the joint's map tells how well each place of x is explained; it does not where x and z are
    each other's image. ``observation_noise``: the distribution that observation.onnx wants of its noise input; ``none``
    where it has no such input, since x is a function of z.
    """

    family: str
    parameters: list[str] = Field(min_length=1)
    measure: Literal["counting", "lebesgue", "none"]
    pixelwise: bool = True
    observation_noise: Literal["uniform", "standard_normal", "none"]
    binarisation: Literal["none", "dynamic", "threshold"] = "none"

    @property
    def fit_output(self) -> str:
        """Name of the joint's output that says how well z explains x; its values by place are FIT_OUTPUT_map."""
        return "negative_error" if self.measure == "none" else "log_p_x_given_z"


class ScoreDefinition(StrictModel):
    """One anomaly score: higher is more anomalous.

    ``elbo``: −(1/k) Σ log w_i; ``iwae``: −log (1/k) Σ w_i, with log w_i = log p(x|z_i) + log p(z_i) − log q(z_i|x) at
    k sampled z_i (Burda et al. 2016, eq. 8). ``reconstruction``: −(1/k) Σ log p(x|z_i), or a reconstruction error in
    its own ``unit`` where there is no likelihood. ``rate``: (1/k) Σ log q(z_i|x) − log p(z_i). ``seed`` fixes the noise
    matrix that every row shares. ``corruption``: by the graph of that name, in nats, whatever k and seed (defined by
    service.scores.corruption). The others are fitted to held-out inliers and defined by service.scores.detectors.
    ``of``: the scores that a ``combination`` combines. ``method``: how ``path`` joins its norms.
    """

    estimator: Estimator
    k: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**32)
    unit: str = "nats"
    description: str = ""
    of: list[Name] = Field(default=[], description="the scores that a combination is of")
    method: Literal["mahalanobis", "copod"] | None = Field(default=None, description="of path only")

    @model_validator(mode="after")
    def _consistent(self) -> ScoreDefinition:
        if (self.estimator == "combination") != bool(self.of):
            raise ValueError(f"of is {self.of} of a {self.estimator}: expected scores of a combination, else none")
        if (self.estimator == "path") != (self.method is not None):
            raise ValueError(f"method is {self.method!r} of a {self.estimator}: expected one of a path, else none")
        return self


class Calibration(StrictModel):
    """Content of calibration.npz: for each score definition, the sorted scores of ``n`` held-out inliers (float64)."""

    split: str
    n: int = Field(ge=1)
    fitted_on: str | None = Field(default=None, description="the split that the scores' detectors were fitted on")
    n_fit: int = Field(default=0, ge=0)
    groups: dict[str, int] = Field(default={}, description="group -> inliers that it is calibrated on by itself")
    removed: int = Field(default=0, ge=0, description="highest scores that were left out, for fear of contamination")
    quantiles: dict[str, dict[str, float]] = Field(description="score -> quantile -> score, for reading only")
    realised_false_positive_rate: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="score -> asked rate -> rate measured on the test split"
    )
    n_test: int = Field(default=0, ge=0)


class Tolerance(StrictModel):
    """Largest allowed |Δ| between the trainer's output and the graph's: atol + rtol · |trainer's|."""

    atol: float = Field(ge=0)
    rtol: float = Field(ge=0)


class Reference(StrictModel):
    """reference.npz: fixed inputs and the outputs that the trainer saw, named ``graph.output``.

    Inputs: ``x`` [N,C,H,W], ``noise`` [N,K,E] (if E > 0), ``dither`` [N,C,H,W] (if signature.dither),
    ``observation_noise`` [N·K,C,H,W] (with ``observation.sample``, which is optional, if it takes noise). Outputs have
    their graph's shapes with M = N·K: the decoder's input is ``encoder.z``, the joint's ``encoder.target``,
    ``encoder.z`` and the decoder's parameters, the observation's those parameters and ``observation_noise``, so each
    graph is judged by itself. Every output of encoder, decoder and joint is there.
    With a backbone ``x`` are features, and ``backbone_x`` the N images that ``backbone.features`` are of.
    With a corruption graph also ``corruption.log_odds`` [N,H,W], of ``x``.
    With a prior graph also ``prior_noise`` [M,P] and ``prior_choice`` [M] (if prior.choice), of an M of their own, and
    ``prior.z`` [M,L]. Keys of ``tolerances`` are those output names; ``max_abs_error`` is what was measured at export.
    """

    tolerances: dict[str, Tolerance]
    max_abs_error: dict[str, float]


class FileRecord(StrictModel):
    """Size and hash of one file beside the manifest."""

    bytes: int = Field(ge=0)
    sha256: Sha256


class Provenance(StrictModel):
    """Origin of the bundle: free-form values, which the service never reads except to show them."""

    config: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    created: str | None = None
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict, description="split -> metric -> value")
    training: dict[str, Any] = Field(default_factory=dict, description="duration, epochs, machine")


class Manifest(StrictModel):
    """manifest.json: everything the service needs to know of a model, and all that a reader wants to.

    ``evidence``: what log w = log p(x|z) + log p(z) − log q(z|x) says of log p(x). ``bound``: its mean bounds it from
    below. ``exact``: it is log p(x) at every z, and so is every estimator (PPCA, factor analysis, ICA, flows).
    ``none``: the model has no likelihood (autoencoders, PCA), and scores by reconstruction alone.
    """

    format_version: Literal[5] = FORMAT_VERSION
    name: Name
    version: Version
    family: str = Field(description="vae, ppca, …: shown, never branched on")
    description: str = ""
    preprocessing: InputRule
    backbone: Backbone | None = None
    signature: Signature
    evidence: Literal["bound", "exact", "none"] = "bound"
    prior: Prior = Prior()
    posterior: Posterior = Posterior()
    likelihood: Likelihood
    graphs: dict[Graph, FileName] = Field(description="role -> file name")
    scores: dict[Name, ScoreDefinition]
    default_score: Name
    calibration: Calibration | None = None
    reference: Reference
    files: dict[FileName, FileRecord] = Field(
        description="every file of the bundle but manifest.json and manifest.sha256"
    )
    provenance: Provenance = Provenance()

    @property
    def has_distortion(self) -> bool:
        """True if −log p(x|z) carries information; it carries none where x and z determine each other."""
        return self.posterior.moments != "point" or self.likelihood.pixelwise

    @property
    def modelled(self) -> InputRule | Backbone:
        """The rule of the rows that the model explains: the input's own, or the backbone's features."""
        return self.backbone or self.preprocessing

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.backbone and self.preprocessing.kind != "image":
            raise ValueError(f"backbone stands before {self.preprocessing.kind}s, expected images")
        if self.signature.shape != self.modelled.shape:
            whose = "backbone's" if self.backbone else "preprocessing's"
            raise ValueError(f"signature.shape {self.signature.shape} is not {whose} {self.modelled.shape}")
        self._check_noise()
        self._check_evidence()
        self._check_scores()
        self._check_files()
        return self

    def _check_noise(self) -> None:
        noise_dim, moments = self.signature.noise_dim, self.posterior.moments
        if (noise_dim == 0) != (moments == "point"):
            raise ValueError(
                f"signature.noise_dim is {noise_dim} with posterior.moments {moments!r}: expected 0 of a point, which "
                "leaves nothing to draw, and at least 1 of any other posterior"
            )

    def _check_evidence(self) -> None:
        measure = self.likelihood.measure
        if (self.evidence == "none") != (measure == "none"):
            raise ValueError(
                f"evidence is {self.evidence!r} with likelihood.measure {measure!r}: both none, or neither"
            )
        if self.evidence != "none" and self.prior.family == "none":
            raise ValueError(f"prior.family is 'none', evidence {self.evidence!r} needs a p(z)")

    def _check_scores(self) -> None:
        if self.default_score not in self.scores:
            raise ValueError(f"default_score {self.default_score!r} is not among scores {sorted(self.scores)}")
        for name, score in self.scores.items():
            if self.evidence == "none" and score.estimator in IN_NATS:
                raise ValueError(f"scores.{name} is by {score.estimator}, without a likelihood reconstruction expected")
            if score.estimator == "reconstruction" and not self.has_distortion:
                raise ValueError(f"scores.{name} is by reconstruction, which a bijection does without loss")
            if self.evidence != "none" and score.unit != "nats" and score.estimator in IN_NATS | {"reconstruction"}:
                raise ValueError(f"scores.{name} is in {score.unit!r}, with a likelihood nats expected")
            if score.estimator == "corruption" and "corruption" not in self.graphs:
                raise ValueError(f"scores.{name} is by corruption, of which graphs has none")
            if score.estimator == "corruption" and score.unit != "nats":
                raise ValueError(f"scores.{name} is in {score.unit!r}, of log odds nats expected")
            if wrong := [part for part in score.of if part not in self.scores or self.scores[part].of]:
                raise ValueError(f"scores.{name} is of {wrong}, expected single scores of this bundle")

    def _check_files(self) -> None:
        missing = {"encoder", "decoder", "joint"} - set(self.graphs)
        if self.prior.noise_dim is not None and "prior" not in self.graphs:
            missing.add("prior")
        if missing:
            raise ValueError(f"graphs lacks {sorted(missing)}")
        if ("backbone" in self.graphs) != (self.backbone is not None):
            raise ValueError("backbone is one of graphs and described beside them, or neither")
        if "prior" in self.graphs and self.prior.noise_dim is None:
            raise ValueError(f"graphs has a prior, family {self.prior.family!r} needs none")
        if "corruption" in self.graphs and self.modelled.kind != "image":
            whose = "a backbone's features" if self.backbone else f"{self.modelled.kind}s"
            raise ValueError(f"graphs has a corruption, which is of images: this model is of {whose}")
        needed = {*self.graphs.values(), REFERENCE, *([CALIBRATION] if self.calibration else [])}
        if any(score.estimator in FITTED for score in self.scores.values()):
            needed.add(DETECTORS)
        unlisted = needed - set(self.files)
        if unlisted:
            raise ValueError(f"files lacks {sorted(unlisted)}")
        for name in (MANIFEST, SEAL):
            if name in self.files:
                raise ValueError(f"files lists {name}: the manifest cannot hold its own hash")


def parse_manifest(data: bytes) -> Manifest:
    """Parse the bytes of manifest.json strictly: no duplicate or unknown keys, no NaN, no conversions.

    Raises BundleFormatError for invalid JSON, another format_version, and anything against the schema.
    """
    _check_version(format_version(read_document(data)))
    try:
        return Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise BundleFormatError(f"{MANIFEST} violates the schema: {_describe(error)}") from error


def read_document(data: bytes) -> Any:
    """Read the bytes of a manifest.json of any format: no duplicate keys, no NaN. Raises BundleFormatError."""
    try:
        return json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise BundleFormatError(f"{MANIFEST} is not valid JSON: {error}") from error


def format_version(document: Any) -> object:
    """Return what a manifest.json of any format states as its format_version, None where it states nothing."""
    return document.get("format_version") if isinstance(document, dict) else None


def _check_version(version: object) -> None:
    """Raise BundleFormatError, which says what to do, unless it is this format's version."""
    if type(version) is int and version == FORMAT_VERSION:
        return
    if version in CONVERTIBLE_VERSIONS:
        raise BundleFormatError(
            f"format_version is {version!r}, this vaeserve reads {FORMAT_VERSION}: rewrite the bundle by "
            "`vaeserve convert BUNDLE`, where BUNDLE is the folder that holds manifest.json"
        )
    raise BundleFormatError(
        f"format_version is {version!r}, this vaeserve reads {FORMAT_VERSION} and converts "
        f"{' and '.join(map(str, CONVERTIBLE_VERSIONS))}, no other: export the bundle again, or install the vaeserve "
        "that wrote it"
    )


def schema_text() -> str:
    """Return the JSON Schema of manifest.json, which is the content of exported/manifest.schema.json."""
    return json.dumps(Manifest.model_json_schema(), indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object's dictionary. Raises ValueError for a key that stands in it twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate keys {sorted({key for key in keys if keys.count(key) > 1})[:5]}")
    return result


def _no_constants(token: str) -> float:
    """Raise ValueError for NaN and the infinities, which are no JSON."""
    raise ValueError(f"{token} is not a JSON number")


def _describe(error: ValidationError) -> str:
    """The first faults of a ValidationError, without the values that a hostile manifest holds."""
    faults = [f"{'.'.join(map(str, fault['loc'])) or 'manifest'}: {fault['msg']}" for fault in error.errors()]
    return "; ".join(faults[:5])


if __name__ == "__main__":  # python -m service.bundle.manifest > exported/manifest.schema.json
    print(schema_text(), end="")
