"""The contract: what a bundle is. The trainer writes it, the service reads it, nothing else passes between them.

A bundle is a folder exported/NAME/VERSION/ with a manifest, ONNX graphs, reference tensors and calibration scores.
Shapes below use N images, K posterior samples an image, M latents, L latent dimensions, E noise numbers a sample,
and C×H×W pixels. Graphs are pure functions; every random number is an input.

    encoder.onnx      x [N,C,H,W], noise [N,K,E], dither [N,C,H,W] (only if signature.dither)
                      -> target [N,C,H,W], loc [N,L], scale [N,L], z [N,K,L], log_q [N,K]
    decoder.onnx      z [M,L] -> mean [M,C,H,W] and each of likelihood.parameters [M,C,H,W]
    density.onnx      target [N,C,H,W], z [N,K,L], each of likelihood.parameters [N,K,C,H,W]
                      -> log_p_x [N,K], log_p_x_map [N,K,C,H,W], log_p_z [N,K]
    observation.onnx  each of likelihood.parameters [M,C,H,W], noise [M,C,H,W] -> sample [M,C,H,W]

``x`` holds pixels in [0, 1]; ``target`` is the point at which the density is evaluated (the binarised or dequantised
pixels). log_q, log_p_x and log_p_z are float64 and in nats; everything else is float32.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

FORMAT_VERSION = 1

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Graph = Literal["encoder", "decoder", "density", "observation"]


class Strict(BaseModel):
    """Base of the manifest's parts: unknown keys are refused, values are immutable and finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Preprocessing(Strict):
    """How any image becomes C×H×W pixels; applied by service.images in training and in serving alike.

    EXIF orientation is applied, alpha is composited on ``background``, the colour mode is converted, and the image is
    brought to ``height``×``width``: ``cover`` scales the shorter side to fit and crops the centre, ``contain`` scales
    the longer side to fit and pads with ``background``, ``stretch`` ignores the aspect ratio. An image that already
    has the target size is not resampled.
    """

    mode: Literal["L", "RGB"]
    height: int = Field(ge=1, le=4096)
    width: int = Field(ge=1, le=4096)
    fit: Literal["cover", "contain", "stretch"] = "cover"
    resample: Literal["bilinear", "bicubic", "lanczos", "box"] = "bilinear"
    background: int = Field(default=0, ge=0, le=255)

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return 1 if self.mode == "L" else 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return (self.channels, self.height, self.width)


class Signature(Strict):
    """Sizes of the graphs' tensors. ``dither``: the encoder also wants uniform [0,1) numbers, one a pixel."""

    shape: tuple[int, int, int] = Field(description="(C, H, W) of an image")
    latent_dim: int = Field(ge=1)
    noise_dim: int = Field(ge=1, description="standard normal numbers that one posterior sample takes (E)")
    dither: bool = False


class Prior(Strict):
    """p(z)."""

    family: Literal["standard_normal"] = "standard_normal"


class Likelihood(Strict):
    """p(x|z): its parameters are the decoder's outputs beside ``mean``.

    ``measure``: ``counting`` when log p(x) is the log of a probability (binary or 8-bit pixels), ``lebesgue`` when it
    is a density over pixels in [0, 1]; bits per dimension of the latter are stated for 8-bit pixels, log2(256) higher.
    ``observation_noise``: the distribution that observation.onnx wants of its noise input.
    """

    family: str
    parameters: list[str] = Field(min_length=1)
    measure: Literal["counting", "lebesgue"]
    observation_noise: Literal["uniform", "standard_normal"]
    binarisation: Literal["none", "dynamic", "threshold"] = "none"


class ScoreDefinition(Strict):
    """One anomaly score: higher is more anomalous.

    ``elbo``: −(1/k) Σ log w_i; ``iwae``: −log (1/k) Σ w_i, with log w_i = log p(x|z_i) + log p(z_i) − log q(z_i|x) at
    k sampled z_i (Burda et al. 2016, eq. 8). ``seed`` fixes the noise matrix that every image shares.
    """

    estimator: Literal["elbo", "iwae"]
    k: int = Field(ge=1)
    seed: int = Field(ge=0, lt=2**32)
    description: str = ""


class Calibration(Strict):
    """What calibration.npz holds: for each score definition, the sorted scores of ``n`` held-out inliers (float64)."""

    split: str
    n: int = Field(ge=1)
    quantiles: dict[str, dict[str, float]] = Field(description="score -> quantile -> nats, for reading only")
    realised_false_positive_rate: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="score -> asked rate -> rate measured on the test split"
    )
    n_test: int = Field(default=0, ge=0)


class Tolerance(Strict):
    """Largest allowed |Δ| between the trainer's output and the graph's: atol + rtol · |trainer's|."""

    atol: float = Field(ge=0)
    rtol: float = Field(ge=0)


class Reference(Strict):
    """reference.npz: fixed inputs (``x``, ``noise``, ``dither``) and outputs named ``graph.output``.

    Keys of ``tolerances`` are those output names; ``max_abs_error`` is what was measured at export.
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
    """manifest.json: everything the service needs to know of a model, and all that a reader wants to."""

    format_version: Literal[1] = FORMAT_VERSION
    name: Name
    version: Version
    family: str = Field(description="vae, ppca, …: shown, never branched on")
    description: str = ""
    preprocessing: Preprocessing
    signature: Signature
    prior: Prior = Prior()
    likelihood: Likelihood
    graphs: dict[Graph, str] = Field(description="role -> file name")
    scores: dict[Name, ScoreDefinition]
    default_score: Name
    calibration: Calibration | None = None
    reference: Reference
    files: dict[str, FileRecord] = Field(description="every file of the bundle but manifest.json")
    provenance: Provenance = Provenance()

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.signature.shape != self.preprocessing.shape:
            raise ValueError(f"signature.shape {self.signature.shape} is not preprocessing's {self.preprocessing.shape}")
        if self.default_score not in self.scores:
            raise ValueError(f"default_score {self.default_score!r} is not among scores {sorted(self.scores)}")
        missing = {"encoder", "decoder", "density"} - set(self.graphs)
        if missing:
            raise ValueError(f"graphs lacks {sorted(missing)}")
        unlisted = set(self.graphs.values()) - set(self.files)
        if unlisted:
            raise ValueError(f"graphs names files that are not in files: {sorted(unlisted)}")
        return self
