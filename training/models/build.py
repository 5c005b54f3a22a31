"""The one table from ``model.family`` to the class that it means."""

from __future__ import annotations

from typing import Protocol

from service.bundle import InputRule
from training.config import ModelConfig
from training.models.autoencoder import Autoencoder
from training.models.base import LatentVariableModel
from training.models.factor import PPCA, FactorAnalysis
from training.models.flow import Flow
from training.models.ica import ICA
from training.models.ladder import Ladder
from training.models.linear import PCA, LinearAutoencoder
from training.models.vae import VAE
from training.networks import Shape


class Family(Protocol):
    """A class of models, as the table needs it."""

    @property
    def closed_form(self) -> bool:
        """Whether ``finish`` alone fits it."""

    def __call__(self, shape: Shape, config: ModelConfig) -> LatentVariableModel:
        """An untrained model for rows [C,H,W]; ``config.likelihood.values`` says what they hold."""


FAMILIES: dict[str, Family] = {
    "vae": VAE,
    "flow": Flow,
    "ladder": Ladder,
    "autoencoder": Autoencoder,
    "pca": PCA,
    "linear_autoencoder": LinearAutoencoder,
    "ppca": PPCA,
    "fa": FactorAnalysis,
    "ica": ICA,
}


def build_model(rule: InputRule, config: ModelConfig) -> LatentVariableModel:
    """An untrained model of the configured family for rows of that rule: pixels of images, or numbers as they are.

    Raises ConfigError: the family or its likelihood is not for such rows.
    """
    values = "pixels" if rule.kind == "image" else "reals"
    likelihood = config.likelihood.model_copy(update={"values": values})
    return FAMILIES[config.family](rule.shape, config.model_copy(update={"likelihood": likelihood}))
