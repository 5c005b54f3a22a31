"""The one table from ``model.family`` to the class that it means."""

from __future__ import annotations

from training.config import ModelConfig
from training.models.base import LatentVariableModel
from training.models.vae import VAE
from training.networks import Shape

FAMILIES: dict[str, type[LatentVariableModel]] = {"vae": VAE}


def build_model(shape: Shape, config: ModelConfig) -> LatentVariableModel:
    """An untrained model of the configured family for images [C,H,W] of ``shape``."""
    return FAMILIES[config.family](shape, config)
