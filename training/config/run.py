"""The whole configuration, and its sections that say how a model is trained, evaluated and scored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from service.bundle.manifest import Name
from training.config.data import DataConfig
from training.config.model import BackboneConfig, ModelConfig, Section

BUNDLE_NAME: TypeAdapter[str] = TypeAdapter(Name)


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
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: one, or half of the cores; see fitting.devices")
    validate_every: int = Field(default=1, ge=1, description="epochs between validations")
    checkpoint_seconds: float = Field(default=60.0, ge=0, description="seconds between checkpoints")


class CorruptionConfig(Section):
    """A network that tells where noise was painted over, for the score of that name; see fitting.corruption."""

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
