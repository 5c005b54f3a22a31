"""The one table from ``model.family`` to the class that it names, and models built from it."""

from __future__ import annotations

from service.bundle.input_rules import Backbone, InputRule
from training.config import ModelConfig
from training.errors import ConfigError
from training.models.autoencoder import Autoencoder
from training.models.base import LatentVariableModel
from training.models.factor import PPCA, FactorAnalysis
from training.models.flow import Flow
from training.models.ica import ICA
from training.models.ladder import Ladder
from training.models.linear import PCA, LinearAutoencoder
from training.models.vae import VAE

FAMILIES: dict[str, type[LatentVariableModel]] = {
    cls.family: cls for cls in (VAE, Flow, Ladder, Autoencoder, PCA, LinearAutoencoder, PPCA, FactorAnalysis, ICA)
}
"""From ``model.family`` to the class that it names."""


def build_model(rule: InputRule | Backbone, config: ModelConfig) -> LatentVariableModel:
    """An untrained model of the configured family for rows of that rule: pixels of images, or numbers as they are.

    Numbers are a vector's, a signal's, or a backbone's features.

    Raises ConfigError: the family or its likelihood is not for such rows.
    """
    values = "pixels" if rule.kind == "image" else "reals"
    likelihood = config.likelihood.model_copy(update={"values": values})
    model = FAMILIES[config.family](rule.shape, config.model_copy(update={"likelihood": likelihood}))
    if rule.kind == "vector" and model.kl_groups == "layer":
        raise ConfigError("model.family: a ladder's latents have positions, features have none; take 'vae'")
    return model
