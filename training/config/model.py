"""Sections of the configuration that say what the model is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


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
    """A frozen ONNX network before the model, which is then of its features (training.data.backbone)."""

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
