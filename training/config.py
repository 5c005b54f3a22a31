"""Typed configuration: defaults here, TOML presets in configs/ with only the differences, then ``--set a.b=value``."""

from __future__ import annotations

import difflib
import itertools
import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from service.bundle.manifest import Name
from training.data.config import DataConfig
from training.errors import ConfigError

BUNDLE_NAME: TypeAdapter[str] = TypeAdapter(Name)


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values are immutable and finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class NetworkConfig(Section):
    """Trunks of encoder and decoder; the decoder mirrors the encoder."""

    kind: Literal["mlp", "conv"] = "mlp"
    hidden: list[int] = Field(default=[300, 300], min_length=1, description="sizes of the gated dense layers")
    channels: list[int] = Field(default=[32, 64], min_length=1, description="conv: width of each stride-2 level")
    blocks: int = Field(default=1, ge=0, description="conv: gated residual blocks a level")
    dropout: float = Field(default=0.0, ge=0, lt=1)


class LikelihoodConfig(Section):
    """p(x|z), or a reconstruction error in its place."""

    family: Literal[
        "bernoulli",
        "continuous_bernoulli",
        "gaussian",
        "discretised_logistic",
        "logistic_mixture",
        "delta",
        "squared_error",
        "cross_entropy",
    ] = "bernoulli"
    values: Literal["pixels", "reals"] = Field(
        default="pixels", description="what a row holds; follows from the data, whatever is set here"
    )
    binarisation: Literal["dynamic", "static", "threshold"] = Field(
        default="dynamic", description="bernoulli: how grey pixels become binary"
    )
    scale: Literal["fixed", "shared", "diagonal", "pixel"] = Field(
        default="shared", description="gaussian: σ given, one learned, one learned a pixel, or one a pixel from z"
    )
    fixed_scale: float = Field(default=0.1, gt=0, description="gaussian: the fixed σ, of pixels or standardised values")
    components: int = Field(default=5, ge=2, description="logistic_mixture: components a pixel")
    min_scale: float = Field(default=1e-3, gt=0, description="floor of the scale; the Gaussian's own is 0.01")


class PosteriorConfig(Section):
    """q(z|x) of a VAE."""

    family: Literal["diagonal_gaussian", "householder", "planar", "sylvester", "iaf"] = "diagonal_gaussian"
    vectors: int = Field(default=8, ge=1, description="householder, and each step of sylvester: reflections")
    steps: int = Field(default=4, ge=1, description="planar, sylvester, iaf: steps of the flow")
    rank: int = Field(default=8, ge=1, description="sylvester: dimensions that a step moves, all if there are fewer")
    hidden: int = Field(default=256, ge=1, description="iaf: width of a step's masked layers")

    @property
    def evaluable(self) -> bool:
        """Whether log q(z|x) is known at any z, not only at its own draws."""
        return self.family in ("diagonal_gaussian", "householder")


class PriorConfig(Section):
    """p(z) of a VAE."""

    family: Literal["standard_normal", "vamp", "flow"] = "standard_normal"
    components: int = Field(default=500, ge=1, description="vamp: pseudo-inputs")
    steps: int = Field(default=6, ge=1, description="flow: affine couplings")
    hidden: int = Field(default=256, ge=1, description="flow: width of a coupling's network")


class LadderConfig(Section):
    """Levels of a ladder, finest first: level i has 1/2^(i+1) of the image's height and width."""

    channels: list[int] = Field(default=[32, 64], min_length=1, description="width of each level's features")
    latents: list[int] = Field(default=[4, 8], min_length=1, description="channels of a layer's latents, by level")
    layers: list[int] = Field(default=[1, 2], min_length=1, description="stochastic layers of each level")
    blocks: int = Field(default=1, ge=0, description="residual blocks that come with a layer, in either direction")
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _one_entry_a_level(self) -> LadderConfig:
        levels = {name: getattr(self, name) for name in ("channels", "latents", "layers")}
        if len({len(entries) for entries in levels.values()}) > 1:
            raise ValueError("channels, latents and layers want one entry for each level, finest first")
        if any(entry < 1 for entries in levels.values() for entry in entries):
            raise ValueError("channels, latents and layers are at least 1 at every level")
        return self


class FlowConfig(Section):
    """A normalising flow (``model.family`` flow)."""

    levels: int = Field(default=3, ge=1, description="images: most squeezings; fewer where the sides turn odd")
    steps: int = Field(default=8, ge=1, description="steps of flow a level, or couplings of a vector")
    hidden: int = Field(default=64, ge=1, description="width of a coupling's network")
    bound: float = Field(default=0.05, gt=0, lt=0.5, description="images: α of logit(α + (1 − 2α)x)")


class LinearConfig(Section):
    """PCA and the linear autoencoder (``model.family`` pca, linear_autoencoder)."""

    prior: Literal["gaussian", "none"] = Field(
        default="gaussian", description="gaussian: fitted to the training codes afterwards, to sample from"
    )


class FactorConfig(Section):
    """EM of factor analysis (``model.family`` fa)."""

    iterations: int = Field(default=5000, ge=1, description="at most")
    tolerance: float = Field(default=1e-6, gt=0, description="nats a row: an iteration that gains less is the last")


class IcaConfig(Section):
    """Maximum-likelihood ICA (``model.family`` ica)."""

    source: Literal["logistic", "extended"] = Field(
        default="logistic", description="density of the sources; extended: sub-Gaussian ones have their own"
    )
    rows: int = Field(default=60_000, ge=1, description="training rows that the fit holds in memory, at most")
    iterations: int = Field(default=500, ge=1, description="of L-BFGS, at most")
    tolerance: float = Field(default=1e-3, ge=0, description="nats a held-out row that ten iterations have to gain")


class MixtureConfig(Section):
    """A Gaussian mixture fitted to the training codes."""

    components: int = Field(default=10, ge=1)
    covariance: Literal["full", "diagonal"] = "full"


class AutoencoderConfig(Section):
    """A deterministic autoencoder."""

    prior: Literal["mixture", "none"] = Field(default="mixture", description="fitted to the codes once they stand")
    mixture: MixtureConfig = MixtureConfig()


class BackboneConfig(Section):
    """A frozen ONNX network before the model, which is then of its features (training.backbone)."""

    path: str = Field(min_length=1, description="the .onnx file: float32 images N×C×H×W in, features out")
    output: str = Field(default="", description="the tensor that is the features; the file's only output if empty")
    mean: list[float] = Field(default=[], description="by channel, or one: x is (pixel − mean)/std, pixels in [0, 1]")
    std: list[Annotated[float, Field(gt=0)]] = Field(default=[], description="by channel, or one for all")
    sha256: str = Field(default="", description="of the file; found by fit, whatever is set here")

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_number_is_for_all_channels(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) else value


IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
"""What networks trained on ImageNet by torchvision's recipe, and most others, were given: of pixels in [0, 1]."""


class ModelConfig(Section):
    """The latent variable model."""

    family: Literal["vae", "ladder", "flow", "autoencoder", "pca", "linear_autoencoder", "ppca", "fa", "ica"] = "vae"
    latent_dim: int = Field(default=40, ge=1)
    network: NetworkConfig = NetworkConfig()
    likelihood: LikelihoodConfig = LikelihoodConfig()
    posterior: PosteriorConfig = PosteriorConfig()
    prior: PriorConfig = PriorConfig()
    ladder: LadderConfig = LadderConfig()
    flow: FlowConfig = FlowConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    linear: LinearConfig = LinearConfig()
    factor: FactorConfig = FactorConfig()
    ica: IcaConfig = IcaConfig()

    @model_validator(mode="after")
    def _vamp_mixes_diagonal_gaussians(self) -> ModelConfig:
        if self.prior.family == "vamp" and self.posterior.family != "diagonal_gaussian":
            raise ValueError(
                "prior.family 'vamp' is a mixture of diagonal Gaussian posteriors: expected posterior.family "
                f"'diagonal_gaussian', got {self.posterior.family!r}"
            )
        return self


class ObjectiveConfig(Section):
    """What is maximised."""

    kind: Literal["elbo", "iwae", "dreg"] = "elbo"
    samples: int = Field(default=1, ge=1, description="posterior samples K an image")
    beta: float = Field(default=1.0, ge=0)
    warmup_epochs: float = Field(default=0, ge=0, description="KL annealing: epochs until β is ``beta`` for good")
    annealing: Literal["linear", "cyclic"] = Field(
        default="linear", description="β rises once over warmup_epochs, or once in each of the cycles they hold"
    )
    cycles: int = Field(default=4, ge=1, description="cyclic: how often β starts again from 0")
    ramp: float = Field(default=0.5, gt=0, le=1, description="cyclic: the share of a cycle over which β rises")
    free_bits: float = Field(
        default=0.0,
        ge=0,
        description="elbo: nats that cost nothing, a latent dimension (Gaussian posterior and prior), a layer "
        "of a ladder, or else the whole of z",
    )

    @model_validator(mode="after")
    def _free_bits_are_the_elbos(self) -> ObjectiveConfig:
        if self.free_bits and self.kind != "elbo":
            raise ValueError(f"free_bits are defined for the elbo, not for {self.kind}")
        return self

    @model_validator(mode="after")
    def _cycles_want_epochs(self) -> ObjectiveConfig:
        if self.annealing == "cyclic" and not self.warmup_epochs:
            raise ValueError("annealing 'cyclic' divides warmup_epochs into cycles: expected more than 0 of them")
        return self


class OptimiserConfig(Section):
    """Adam and what surrounds it."""

    learning_rate: float = Field(default=1e-3, gt=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = Field(default=200, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=128, ge=1)
    epochs: int = Field(default=100, ge=1)
    gradient_clip: float = Field(
        default=200.0, gt=0, description="gradients of 784 pixels are scaled down to this norm"
    )
    skip_above: float | None = Field(
        default=None, gt=0, description="a fixed limit: larger norms (of 784 pixels) are skipped; outliers always are"
    )
    ema_decay: float = Field(default=0.999, ge=0, lt=1, description="moving average of the weights: decay a step")
    ema_every: int = Field(default=8, ge=1, description="updates that the moving average takes in one, for speed")
    patience: int = Field(default=50, ge=1, description="stop after this many validations without a better bound")


class RunConfig(Section):
    """How the loop runs. ``precision`` rounds otherwise, and each of the ``devices`` × ``nodes`` processes takes a
    batch: a step sees ``optimiser.batch_size`` times their number, an epoch has as many steps fewer. The rest changes
    no result but, by ``validate_every``, which epoch's weights are kept.
    """

    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    accelerator: Literal["cpu", "cuda", "auto"] = "cpu"
    devices: int = Field(default=1, ge=1)
    nodes: int = Field(default=1, ge=1)
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: one, or half of the cores (training.threads)")
    validate_every: int = Field(default=1, ge=1, description="epochs between validations")
    checkpoint_seconds: float = Field(default=60.0, ge=0, description="seconds between checkpoints")


class CorruptionConfig(Section):
    """A network that tells places that noise was painted over, for the score of that name (training.corruption)."""

    width: int = Field(default=32, ge=8, multiple_of=8, description="channels of its finest level")
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=48, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    ema_decay: float = Field(default=0.998, ge=0, lt=1, description="moving average of the weights: decay a step")


class EvaluateConfig(Section):
    """The final evaluation on the test split."""

    k: int = Field(default=1000, ge=1, le=100_000, description="samples of the IWAE-k log-likelihood")
    images: int | None = Field(default=None, ge=1, description="first images of the split only; none means all")
    chunk: int | None = Field(default=None, ge=1, description="decodes at a time; none suits cache or GPU")
    precision: Literal["32-true", "bf16-mixed"] = Field(
        default="32-true", description="bf16-mixed: the decoder rounds, densities and sums do not"
    )
    gaps: int = Field(default=0, ge=0, description="first images whose inference gap is split; 0: not measured")
    gap_steps: int = Field(default=300, ge=1, description="gradient steps on each image's own posterior")


ScoreName = Literal[
    "combined", "elbo", "iwae", "rate", "reconstruction", "typicality", "complexity", "debiased", "path", "path-copod",
    "latent", "residual", "peak", "statistics", "corruption",
]  # fmt: skip


class ScoreConfig(Section):
    """The calibrated anomaly scores: all share ``k`` posterior samples, drawn from ``seed``.

    ``default``: the one that a request without a choice gets. ``estimator``: the one it gets where nothing could be
    fitted, for want of validation images.
    """

    default: ScoreName = "combined"
    estimator: Literal["elbo", "iwae"] = "elbo"
    k: int = Field(default=16, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, lt=2**32)


class Config(Section):
    """Everything that defines a training run."""

    name: str = Field(default="", description="name of the bundle; the data's name if empty")
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**31)
    data: DataConfig = DataConfig(source="digits")
    backbone: BackboneConfig | None = None
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    run: RunConfig = RunConfig()
    corruption: CorruptionConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    score: ScoreConfig = ScoreConfig()

    @model_validator(mode="after")
    def _several_samples_want_a_posterior(self) -> Config:
        if self.objective.kind != "elbo" and self.model.family not in ("vae", "ladder"):
            raise ValueError(
                f"objective.kind {self.objective.kind!r} weighs samples of q(z|x); family {self.model.family!r} has "
                "none to weigh: take 'elbo'"
            )
        return self

    @model_validator(mode="after")
    def _dreg_wants_one_layer(self) -> Config:
        if self.model.family == "ladder" and self.objective.kind == "dreg":
            raise ValueError(
                "objective.kind 'dreg' is for one stochastic layer: in a ladder each layer's z sets the parameters of "
                "the layers below it; take 'elbo' or 'iwae'"
            )
        return self

    @model_validator(mode="after")
    def _dreg_evaluates_the_posterior(self) -> Config:
        if self.objective.kind == "dreg" and not self.model.posterior.evaluable:
            raise ValueError(
                "objective.kind 'dreg' needs log q(z|x) with its parameters held constant: expected "
                "model.posterior.family 'diagonal_gaussian' or 'householder', whose density is known at any z, "
                f"got {self.model.posterior.family!r}"
            )
        return self

    @field_validator("name")
    @classmethod
    def _may_name_a_bundle(cls, name: str) -> str:
        """Refused here, not by the export after the training; nor is a folder outside runs/ ever meant."""
        try:
            return name and BUNDLE_NAME.validate_python(name)
        except ValidationError as error:
            raise ValueError(
                "1 to 64 lower-case letters, digits, dots, dashes and underscores expected, a letter or digit first"
            ) from error


def presets() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("training") / "configs"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_preset(name: str) -> dict[str, Any]:
    """A shipped preset by name, or any .toml file by path. Raises ConfigError."""
    path = Path(name)
    try:
        if path.suffix == ".toml":
            return tomllib.loads(path.read_text())
        if name not in presets():
            raise ConfigError(
                f"unknown preset {name!r}: expected one of {', '.join(presets())}{_nearest(name, presets())}"
            )
        return tomllib.loads((resources.files("training") / "configs" / f"{name}.toml").read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"preset {name!r} cannot be read: {error}") from error


def summary_of(preset: str) -> str:
    """What a shipped preset is: the first sentence of the comment that it begins with."""
    text = (resources.files("training") / "configs" / f"{preset}.toml").read_text()
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return re.split(r"(?<=\.)\s", " ".join(line.removeprefix("#").strip() for line in comment))[0]


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=value`` -> (["a", "b"], value), the value in TOML; a bare word is a string. Raises ConfigError."""
    key, separator, value = text.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"--set {text!r}: expected section.key=value, for example model.latent_dim=16")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    return [part.strip() for part in key.split(".")], parsed


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` laid over ``base``, table by table; neither is modified."""
    merged = dict(base)
    for key, value in changes.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return merged


def load_config(preset: str | None = None, overrides: Iterable[str] = (), base: dict[str, Any] | None = None) -> Config:
    """Defaults, then the preset, then ``base`` (flags of the command line), then ``--set`` overrides.

    Raises ConfigError: an unknown key is named with the nearest known one.
    """
    tree = merge(read_preset(preset) if preset else {}, base or {})
    for text in overrides:
        keys, value = parse_override(text)
        for key in reversed(keys):
            value = {key: value}
        tree = merge(tree, value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item["loc"], item) for item in error.errors())) from error


def _explain(location: tuple[int | str, ...], item: Mapping[str, Any]) -> str:
    dotted = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}{_nearest(dotted, known_keys(Config))}"
    message = ": ".join(filter(None, (dotted, item["msg"])))
    if item["type"] == "value_error" and isinstance(item["input"], Mapping):
        return message  # a rule for several keys of a section: it names them itself
    return f"{message} (got {item['input']!r})"


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)
    return f"; did you mean {found[0]!r}?" if found else ""


def known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            keys += known_keys(nested, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys
