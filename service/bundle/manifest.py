"""The contract: what a bundle is. The trainer writes it, the service reads it, nothing else passes between them.

A bundle is a folder exported/NAME/VERSION/ with a manifest, ONNX graphs, reference tensors and calibration scores.
Shapes below use N rows (images, vectors or signals), K posterior samples a row, M latents, L latent dimensions, E noise
numbers a posterior sample, P a prior sample, and C×H×W numbers a row: an image's pixels, 1×1×D for a vector of D
features, C×1×T for a signal. Graphs are pure functions; every random number is an input.

    encoder.onnx      x [N,C,H,W], noise [N,K,E], dither [N,C,H,W] (only if signature.dither)
                      -> target [N,C,H,W], loc [N,L], scale [N,L], z [N,K,L], log_q [N,K]
    decoder.onnx      z [M,L] -> mean [M,C,H,W] and each of likelihood.parameters [M,C,H,W]
    density.onnx      target [N,C,H,W], z [N,K,L], each of likelihood.parameters [N,K,C,H,W]
                      -> log_p_x [N,K], log_p_x_map [N,K,C,H,W], log_p_z [N,K]
    observation.onnx  each of likelihood.parameters [M,C,H,W], noise [M,C,H,W] -> sample [M,C,H,W]
    prior.onnx        noise [M,P], choice [M] (only if prior.choice) -> z [M,L]
    backbone.onnx     x [N,C,H,W] -> features [N,F] or [N,F,h,w]
    corruption.onnx   x [N,C,H,W] -> log_odds [N,H,W]

The encoder, the decoder and the density are always there. Where there is a backbone, ``x`` below is an image in it
alone: the other graphs know its frozen features only, F of an image (C×H×W is then 1×1×F) or F at each of h×w places.
The corruption graph is of images, and never behind a backbone: for each place log p(painted over | x) − log p(not | x),
nats, of a classifier that was trained on inliers and on noise painted over parts of them (service.scores.corruption).

``x`` holds pixels in [0, 1], or a vector's or signal's numbers in their own units:
what scales them stands inside the graphs, with its log-Jacobian in the density. ``target`` is the point at which the
density is evaluated (the binarised or dequantised pixels). Noise is standard normal, dither and choice are uniform in
[0, 1); observation's noise is what likelihood.observation_noise says. log_q, log_p_x and log_p_z are float64 and in
nats; everything else is float32.

A model without a likelihood (``evidence`` "none") gives minus its reconstruction error as log_p_x, and by place as
log_p_x_map. A bijection has no loss to speak of: its decoder is the encoder's inverse, its parameter ``loc`` x itself,
log_p_x and log_p_x_map are 0, and log_q is −log|det dz/dx|, so that log p(z) − log q(z|x) is log p(x).

A score beyond the likelihoods needs fitted numbers (a mean, a covariance, latents to compare with): they lie in
detectors.npz, an array "SCORE/PARAMETER" each (service.scores.detectors). A model of tiles of larger images brings the
tails of its tiles' scores in tiles.npz, by the same keys (service.inference.tiled).

Earlier formats are this one without what the later brought: format 1 knows images, a standard normal prior and a bound
on the evidence, format 2 the scores elbo, iwae and reconstruction, format 3 no corruption graph.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from service.errors import BundleError, BundleFormatError, BundleIntegrityError, BundleNotFound

FORMAT_VERSION: Final = 4
READABLE_VERSIONS: Final = (1, 2, 3, 4)
MANIFEST = "manifest.json"
REFERENCE = "reference.npz"
CALIBRATION = "calibration.npz"
DETECTORS = "detectors.npz"
TILES = "tiles.npz"
MAX_MANIFEST_BYTES = 8 * 2**20
MAX_ARRAYS_BYTES = 2**30  # of one .npz, unpacked: a bound on what a hostile archive can make us allocate
UNREADABLE = (
    *(ValueError, OSError, EOFError, SyntaxError, OverflowError, MemoryError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""What NumPy and zipfile raise on odd bytes; of encrypted members and unknown compression RuntimeError."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
Size = Annotated[int, Field(ge=1, le=2**20)]
FeatureName = Annotated[str, Field(max_length=128, pattern=r"^\S(.*\S)?$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127})?$")]
Graph = Literal["encoder", "decoder", "density", "observation", "prior", "backbone", "corruption"]
LikelihoodEstimator = Literal["elbo", "iwae", "reconstruction", "rate"]
FittedEstimator = Literal[
    "typicality", "complexity", "debiased", "path", "latent", "residual", "peak", "statistics", "combination"
]
LearnedEstimator = Literal["corruption"]
"""By a graph of its own: no detector is fitted, and any k and seed give the same."""
Estimator = Literal[LikelihoodEstimator, FittedEstimator, LearnedEstimator]
FITTED: Final = frozenset(get_args(FittedEstimator))
IN_NATS: Final = frozenset({"elbo", "iwae", "rate", "typicality", "complexity", "debiased"})
"""Estimators of a likelihood, or of what is made of one: they want one, and answer in nats."""


class Strict(BaseModel):
    """Base of the manifest's parts: unknown keys are refused, values are immutable and finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Tiling(Strict):
    """How an image of any size is scored by a model of tiles; computed by service.inference.tiled.

    An image is never resized. Tiles of preprocessing's height×width lie ``stride`` pixels apart, down and across, from
    the upper left corner on, and one more at the edge where the last would not reach it: together they cover the
    image. Each is a row. ``aggregate`` makes the tiles' scores the image's:

    ``maximum``: −log(−m log(1 − p)), nats, p the tail probability, among held-out tiles, of the tile that scores
    highest, and m how many tiles fit into the image's area: larger images hold more tiles, and their highest score is
    higher by chance alone (Šidák 1967: of m independent tiles one is as extreme with probability 1 − (1 − p)^m, which
    falls as this score rises). The tails are in tiles.npz. ``top``: mean of the ``share`` of the tiles that score
    highest, of one at least.
    """

    stride: tuple[int, int] = Field(description="pixels between neighbouring tiles: down, across")
    aggregate: Literal["maximum", "top"] = "maximum"
    share: float = Field(default=0.05, gt=0, le=1, description="of the tiles that ``top`` looks at; 1: of all")


class Preprocessing(Strict):
    """How any image becomes C×H×W pixels; applied by service.formats.images in training and in serving alike.

    EXIF orientation is applied, alpha is composited on ``background``, the colour mode is converted, and the image is
    brought to ``height``×``width``: ``cover`` scales the shorter side to fit and crops the centre, ``contain`` scales
    the longer side to fit and pads with ``background``, ``stretch`` ignores the aspect ratio. An image that already
    has the target size is not resampled. With ``tiling`` no image is resized: a row is a tile of it.
    """

    kind: Literal["image"] = "image"
    mode: Literal["L", "RGB"]
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    fit: Literal["cover", "contain", "stretch"] = "cover"
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    background: int = Field(default=0, ge=0, le=255)
    tiling: Tiling | None = Field(default=None, description="of a model of tiles of larger images")

    @model_validator(mode="after")
    def _tiles_cover(self) -> Preprocessing:
        if self.tiling is None:
            return self
        for stride, side in zip(self.tiling.stride, (self.height, self.width), strict=True):
            if not 1 <= stride <= side:
                raise ValueError(f"tiling.stride {stride} of tiles of {side} pixels: expected 1 to {side}")
        return self

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return 1 if self.mode == "L" else 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) inside the graphs."""
        return (self.channels, self.height, self.width)

    @property
    def natural(self) -> tuple[int, ...]:
        """Shape of one image outside the graphs: (C, H, W)."""
        return self.shape


class ArrayPreprocessing(Strict):
    """Rows of numbers in their own units: any finite float32, never scaled nor resized outside the graphs.

    ``natural`` is the shape that the outside sees: (D,) of a vector of D features, (C, T) of a signal of C channels and
    T steps. ``features`` names a vector's numbers in order; a name never reads as a number, so that a table's header
    cannot be taken for a row.
    """

    kind: Literal["vector", "signal"]
    natural: tuple[Size, ...] = Field(min_length=1, max_length=2, description="(D,) of a vector, (C, T) of a signal")
    features: list[FeatureName] | None = Field(default=None, description="D names, of a vector only")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Inside the graphs: (1, 1, D) of a vector, (C, 1, T) of a signal."""
        return (1, 1, self.natural[0]) if self.kind == "vector" else (self.natural[0], 1, self.natural[1])

    @model_validator(mode="after")
    def _consistent(self) -> ArrayPreprocessing:
        if len(self.natural) != {"vector": 1, "signal": 2}[self.kind]:
            raise ValueError(f"natural is {self.natural}, expected (D,) for a vector, (C, T) for a signal")
        if self.features is None:
            return self
        if self.kind != "vector" or len(self.features) != self.natural[0]:
            raise ValueError(f"{len(self.features)} features of a {self.kind} of shape {self.natural}")
        if len(set(self.features)) != len(self.features):
            raise ValueError("features hold the same name twice")
        numbers = [name for name in self.features if reads_as_number(name)]
        if numbers:
            raise ValueError(f"features hold {numbers[0]!r}, which reads as a number: give it a name")
        return self


def _kind(value: object) -> str:
    """Which rule is meant: an image's where nothing is said, as in format 1."""
    kind = value.get("kind", "image") if isinstance(value, dict) else getattr(value, "kind", "image")
    return "image" if kind == "image" else "array"


InputRule = Annotated[
    Annotated[Preprocessing, Tag("image")] | Annotated[ArrayPreprocessing, Tag("array")], Discriminator(_kind)
]
"""What a row is: a manifest's ``preprocessing``."""


class Backbone(Strict):
    """A frozen network that stands before the model: images go in, and all that the other graphs see are its features.

    ``natural``: (F,) of features pooled over the image, (F, h, w) of a map. ``batch``: whether backbone.onnx takes any
    number of rows, or one at a time. ``output`` and ``sha256`` tell which tensor of which file it was made from, and
    ``mean`` and ``std``, by channel, what x was normalised with, (x − mean)/std; all of it stands in the graph.
    """

    kind: Literal["vector", "map"]
    natural: tuple[Size, ...] = Field(min_length=1, max_length=3)
    batch: Literal["any", "one"] = "any"
    output: str = Field(default="", max_length=1024)
    sha256: Sha256 | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Inside the other graphs: (1, 1, F) of pooled features, (F, h, w) of a map."""
        return (1, 1, self.natural[0]) if self.kind == "vector" else (self.natural[0], self.natural[1], self.natural[2])

    @model_validator(mode="after")
    def _consistent(self) -> Backbone:
        if len(self.natural) != {"vector": 1, "map": 3}[self.kind]:
            raise ValueError(f"natural is {self.natural}, expected (F,) for a vector, (F, h, w) for a map")
        return self


class Signature(Strict):
    """Sizes of the graphs' tensors. ``dither``: the encoder also wants uniform [0,1) numbers, one for each of x."""

    shape: tuple[int, int, int] = Field(
        description="(C, H, W) of an image, (1, 1, D) of a vector, (C, 1, T) of a signal, or a backbone's features"
    )
    latent_dim: int = Field(ge=1)
    noise_dim: int = Field(ge=1, description="standard normal numbers that one posterior sample takes (E)")
    dither: bool = False


class Prior(Strict):
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


class Posterior(Strict):
    """q(z|x), and what the encoder's ``loc`` and ``scale`` say of it.

    ``exact``: mean and marginal standard deviation. ``base``: the image of the base distribution's mean, and the base's
    deviation (flows and ladders of latents). ``point``: the encoder is a function, ``scale`` is 0 and every z is loc;
    there is nothing to draw, and no rate.
    """

    family: str = "diagonal_gaussian"
    moments: Literal["exact", "base", "point"] = "exact"


class Likelihood(Strict):
    """p(x|z): its parameters are the decoder's outputs beside ``mean``.

    ``measure``: ``counting`` when log p(x) is the log of a probability (binary or 8-bit pixels), ``lebesgue`` when it
    is a density over x as it stands, ``none`` when the model has no likelihood. Bits per dimension of a density over
    pixels in [0, 1] are stated for 8-bit pixels, log2(256) higher; one over other numbers has none.
    ``pixelwise``: whether log_p_x_map tells how well each place of x is explained; it does not where x and z are each
    other's image. ``observation_noise``: the distribution that observation.onnx wants of its noise input.
    """

    family: str
    parameters: list[str] = Field(min_length=1)
    measure: Literal["counting", "lebesgue", "none"]
    pixelwise: bool = True
    observation_noise: Literal["uniform", "standard_normal"]
    binarisation: Literal["none", "dynamic", "threshold"] = "none"


class ScoreDefinition(Strict):
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


class Calibration(Strict):
    """What calibration.npz holds: for each score definition, the sorted scores of ``n`` held-out inliers (float64)."""

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


class Tolerance(Strict):
    """Largest allowed |Δ| between the trainer's output and the graph's: atol + rtol · |trainer's|."""

    atol: float = Field(ge=0)
    rtol: float = Field(ge=0)


class Reference(Strict):
    """reference.npz: fixed inputs and the outputs that the trainer saw, named ``graph.output``.

    Inputs: ``x`` [N,C,H,W], ``noise`` [N,K,E], ``dither`` [N,C,H,W] (if signature.dither), ``observation_noise``
    [N·K,C,H,W] (optional). Outputs have their graph's shapes with M = N·K: the decoder's input is ``encoder.z``, the
    density's ``encoder.target``, ``encoder.z`` and the decoder's parameters, the observation's those parameters and
    ``observation_noise``, so each graph is judged by itself. Every output of encoder, decoder and density is there.
    With a backbone ``x`` are features, and ``backbone_x`` the N images that ``backbone.features`` are of.
    With a corruption graph also ``corruption.log_odds`` [N,H,W], of ``x``.
    With a prior graph also ``prior_noise`` [M,P] and ``prior_choice`` [M] (if prior.choice), of an M of their own, and
    ``prior.z`` [M,L]. Keys of ``tolerances`` are those output names; ``max_abs_error`` is what was measured at export.
    """

    tolerances: dict[str, Tolerance]
    max_abs_error: dict[str, float]


class FileRecord(Strict):
    """Size and hash of one file beside the manifest."""

    bytes: int = Field(ge=0)
    sha256: Sha256


class Provenance(Strict):
    """Where the bundle comes from; free-form values, never read by the service except to show them."""

    config: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    seed: int | None = None
    created: str | None = None
    metrics: dict[str, dict[str, float]] = Field(default_factory=dict, description="split -> metric -> value")
    training: dict[str, Any] = Field(default_factory=dict, description="duration, epochs, machine")


class Manifest(Strict):
    """manifest.json: everything the service needs to know of a model, and all that a reader wants to.

    ``evidence``: what log w = log p(x|z) + log p(z) − log q(z|x) says of log p(x). ``bound``: its mean bounds it from
    below. ``exact``: it is log p(x) at every z, and so is every estimator (PPCA, factor analysis, ICA, flows).
    ``none``: the model has no likelihood (autoencoders, PCA), and scores by reconstruction alone.
    """

    format_version: Literal[1, 2, 3, 4] = FORMAT_VERSION
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
    files: dict[FileName, FileRecord] = Field(description="every file of the bundle but manifest.json")
    provenance: Provenance = Provenance()

    @property
    def tells_distortion(self) -> bool:
        """Whether −log p(x|z) says anything: not where x and z determine each other."""
        return self.posterior.moments != "point" or self.likelihood.pixelwise

    @property
    def modelled(self) -> InputRule | Backbone:
        """What the model is of: rows as they come in, or a backbone's features of them."""
        return self.backbone or self.preprocessing

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.backbone and self.preprocessing.kind != "image":
            raise ValueError(f"backbone stands before {self.preprocessing.kind}s, expected images")
        if self.signature.shape != self.modelled.shape:
            whose = "backbone's" if self.backbone else "preprocessing's"
            raise ValueError(f"signature.shape {self.signature.shape} is not {whose} {self.modelled.shape}")
        self._check_evidence()
        self._check_scores()
        self._check_files()
        return self

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
            if score.estimator == "reconstruction" and not self.tells_distortion:
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
        missing = {"encoder", "decoder", "density"} - set(self.graphs)
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
        if MANIFEST in self.files:
            raise ValueError(f"files lists {MANIFEST}, which cannot hold its own hash")


class TensorSpec(NamedTuple):
    """One input or output of a graph: ``shape`` holds sizes and the symbols N, K and M."""

    name: str
    dtype: Literal["float32", "float64"]
    shape: tuple[int | str, ...]


class GraphSpec(NamedTuple):
    """The inputs and outputs that the contract wants of one graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def graph_spec(manifest: Manifest, role: Graph) -> GraphSpec:
    """Inputs and outputs of the graph ``role``, as this module's docstring draws them, for the manifest's sizes.

    Raises BundleFormatError for the prior of a family that has no graph, or a backbone that there is not.
    """
    image, latent = manifest.signature.shape, manifest.signature.latent_dim
    names = manifest.likelihood.parameters

    def floats(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name, "float32", shape)

    def nats(name: str) -> TensorSpec:
        return TensorSpec(name, "float64", ("N", "K"))

    if role == "encoder":
        dither = (floats("dither", "N", *image),) if manifest.signature.dither else ()
        return GraphSpec(
            (floats("x", "N", *image), floats("noise", "N", "K", manifest.signature.noise_dim), *dither),
            (
                floats("target", "N", *image),
                floats("loc", "N", latent),
                floats("scale", "N", latent),
                floats("z", "N", "K", latent),
                nats("log_q"),
            ),
        )
    if role == "decoder":
        outputs = tuple(floats(name, "M", *image) for name in ("mean", *names))
        return GraphSpec((floats("z", "M", latent),), outputs)
    if role == "density":
        inputs = (floats("target", "N", *image), floats("z", "N", "K", latent))
        parameters = tuple(floats(name, "N", "K", *image) for name in names)
        return GraphSpec(
            (*inputs, *parameters), (nats("log_p_x"), floats("log_p_x_map", "N", "K", *image), nats("log_p_z"))
        )
    if role == "observation":
        parameters = tuple(floats(name, "M", *image) for name in names)
        return GraphSpec((*parameters, floats("noise", "M", *image)), (floats("sample", "M", *image),))
    if role == "backbone":
        return _backbone_spec(manifest)
    if role == "corruption":
        return GraphSpec((floats("x", "N", *image),), (floats("log_odds", "N", *image[1:]),))
    if manifest.prior.noise_dim is None:
        raise BundleFormatError(f"family {manifest.prior.family!r} of the prior is not drawn by a graph")
    choice = (floats("choice", "M"),) if manifest.prior.choice else ()
    return GraphSpec((floats("noise", "M", manifest.prior.noise_dim), *choice), (floats("z", "M", latent),))


def _backbone_spec(manifest: Manifest) -> GraphSpec:
    """Of the graph "backbone". Raises BundleFormatError where the manifest has none."""
    found = manifest.backbone
    if found is None:
        raise BundleFormatError("the manifest describes no backbone")
    rows: int | str = "N" if found.batch == "any" else 1
    return GraphSpec(
        (TensorSpec("x", "float32", (rows, *manifest.preprocessing.shape)),),
        (TensorSpec("features", "float32", (rows, *found.natural)),),
    )


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files were found to be what its manifest says. Made by ``open_bundle``.

    ``digest`` is the sha256 of manifest.json in hex: it names the content of the whole bundle, since the manifest
    holds every other file's hash.
    """

    path: Path
    manifest: Manifest
    digest: str

    def read(self, filename: str) -> bytes:
        """Bytes of one listed file, hashed again on each read. Raises BundleIntegrityError."""
        if filename not in self.manifest.files:
            raise BundleIntegrityError(f"{filename} is not in the manifest's files {sorted(self.manifest.files)}")
        return _read_checked(self.path, filename, self.manifest.files[filename])

    def graph(self, role: Graph) -> bytes:
        """The ONNX model of that role. Raises BundleIntegrityError."""
        return self.read(self.manifest.graphs[role])

    def arrays(self, filename: str) -> dict[str, np.ndarray]:
        """Arrays of one .npz file, never unpickled. Raises BundleIntegrityError, BundleFormatError."""
        data = self.read(filename)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_ARRAYS_BYTES:
                raise BundleFormatError(f"{filename} unpacks to {size} bytes, more than {MAX_ARRAYS_BYTES}")
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        except UNREADABLE as error:
            raise BundleFormatError(f"{filename} is not a readable .npz of plain arrays: {error}") from error


def find_bundles(root: Path) -> list[Path]:
    """Folders NAME/VERSION of ``root`` that hold a manifest."""
    return [manifest.parent for manifest in root.glob("*/*/manifest.json")]


def bundle_digests(root: Path) -> dict[str, str]:
    """Digest by NAME/VERSION of the bundles of a folder, as their manifests stand there; nothing is verified."""
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        for path in find_bundles(root)
    }


def open_bundle(path: Path | str) -> Bundle:
    """The bundle in that folder, after its manifest and every file's size and sha256 were checked.

    Raises BundleNotFound (no folder, or no manifest.json in it), BundleFormatError (manifest unreadable, of another
    format_version, or against the schema) and BundleIntegrityError (a file missing, extra, a link, or changed).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BundleNotFound(f"{folder} is not a folder; a bundle is a folder NAME/VERSION with a {MANIFEST}")
    if not (folder / MANIFEST).exists():
        raise BundleNotFound(f"{folder} holds no {MANIFEST}")
    found = set(_walk(folder))
    data = _read_regular(folder, MANIFEST, MAX_MANIFEST_BYTES)
    manifest = parse_manifest(data)
    extra = sorted(found - set(manifest.files) - {MANIFEST})
    if extra:
        raise BundleIntegrityError(f"files that the manifest does not list: {extra[:10]}; remove them")
    for name, record in manifest.files.items():
        _read_checked(folder, name, record)
    return Bundle(folder, manifest, hashlib.sha256(data).hexdigest())


def parse_manifest(data: bytes) -> Manifest:
    """Manifest from the bytes of manifest.json, strictly: no duplicate or unknown keys, no NaN, no conversions.

    Raises BundleFormatError.
    """
    try:
        document = json.loads(data, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise BundleFormatError(f"{MANIFEST} is not valid JSON: {error}") from error
    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise BundleFormatError(
            f"format_version is {version!r}, this vaeserve reads {READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}: "
            "export the bundle again, or install the vaeserve that wrote it"
        )
    try:
        return Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise BundleFormatError(f"{MANIFEST} violates the schema: {_describe(error)}") from error


def write_bundle(
    root: Path | str,
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes],
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Write root/NAME/VERSION whole or not at all, and return it.

    ``manifest``: manifest.json's content without ``files``, which is computed here from ``files`` (name -> bytes).
    Everything goes to a hidden folder beside the target first; ``verify`` gets that folder and raises to refuse it;
    the folder is renamed only then. Raises BundleError when the version exists, BundleFormatError when the manifest
    violates the schema, and whatever ``verify`` raises.
    """
    records = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    content = parse_manifest(_to_json({"format_version": FORMAT_VERSION, **manifest, "files": records}))
    target = Path(root) / content.name / content.version
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{content.version}.", dir=target.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would hide the bundle from the server's user
        for name, data in files.items():
            _write_synced(folder / name, data)
        _write_synced(folder / MANIFEST, _to_json(content.model_dump(mode="json")))
        open_bundle(folder)
        if verify is not None:
            verify(folder)
        _refuse_existing(target)
        _rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def next_version(root: Path | str, name: str) -> str:
    """The smallest version above every existing one of root/name: "1" when there is none."""
    folder = Path(root) / name
    versions = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
    return str(max(versions, default=0) + 1)


def schema_text() -> str:
    """JSON Schema of manifest.json: the content of exported/manifest.schema.json."""
    return json.dumps(Manifest.model_json_schema(), indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def _walk(folder: Path) -> Iterator[str]:
    """Relative names of all files below ``folder``; links and special files are refused."""
    for parent, folders, names in os.walk(folder, followlinks=False):
        for name in [*folders, *names]:
            entry = Path(parent, name)
            mode = entry.lstat().st_mode
            relative = entry.relative_to(folder).as_posix()
            if stat.S_ISREG(mode):
                yield relative
            elif not stat.S_ISDIR(mode):
                raise BundleIntegrityError(f"{relative} is a link or a special file; a bundle holds plain files only")


def _read_checked(folder: Path, name: str, record: FileRecord) -> bytes:
    data = _read_regular(folder, name, record.bytes)
    if len(data) != record.bytes:
        raise BundleIntegrityError(f"{name} has {len(data)} bytes, the manifest says {record.bytes}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.sha256:
        raise BundleIntegrityError(f"{name} has sha256 {digest}, the manifest says {record.sha256}")
    return data


def _read_regular(folder: Path, name: str, limit: int) -> bytes:
    """Bytes of a plain file of at most ``limit`` bytes; links are not followed, inside the folder."""
    path = folder / name
    if any((folder / parent).is_symlink() for parent in [name, *map(str, Path(name).parents)] if parent != "."):
        raise BundleIntegrityError(f"{name} is a link or lies behind one; a bundle holds plain files only")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise BundleIntegrityError(f"{name} has {size} bytes, at most {limit} are expected")
            return file.read(limit + 1)
    except OSError as error:
        raise BundleIntegrityError(f"{name} cannot be read: {error.strerror}") from error


def _write_synced(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _rename(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        _refuse_existing(target)  # which another process wrote just now
        raise


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise BundleError(f"{target} exists; versions are never overwritten, take the next one")


def _to_json(document: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleFormatError(f"the manifest cannot be written as JSON: {error}") from error


def reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate keys {sorted({key for key in keys if keys.count(key) > 1})[:5]}")
    return result


def _no_constants(token: str) -> float:
    raise ValueError(f"{token} is not a JSON number")


def _describe(error: ValidationError) -> str:
    """The first faults of a ValidationError, without the values that a hostile manifest holds."""
    faults = [f"{'.'.join(map(str, fault['loc'])) or 'manifest'}: {fault['msg']}" for fault in error.errors()]
    return "; ".join(faults[:5])


if __name__ == "__main__":  # python -m service.bundle.manifest > exported/manifest.schema.json
    print(schema_text(), end="")
