"""How many dimensions PCA, PPCA and factor analysis may keep of a data set: fewer than would explain it whole.

With an axis for every number that varies (or for every row but one) nothing is left over: the residual, and the noise's
deviation, are what rounding makes of zero, and a score of them says nothing.
"""

from __future__ import annotations

import numpy as np

from training.config import Config
from training.data.dataset import Dataset
from training.errors import ConfigError, DataError
from training.models.registry import FAMILIES

ROWS = 1000  # read at a time


def varying(dataset: Dataset) -> int:
    """Numbers of a row that are not the same in all rows of the training split."""
    indices = dataset.splits["train"]
    low = high = dataset.pixels(indices[:1])[0]
    for rows in dataset.batches([indices[i : i + ROWS] for i in range(0, len(indices), ROWS)]):
        low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
    return int((high > low).sum())


def most_axes(dataset: Dataset) -> int:
    """Axes that the training split can have at most: of its numbers that vary, and of its rows about their mean.

    Raises DataError: fewer than two, of which none could be left out.
    """
    axes = min(varying(dataset), len(dataset.splits["train"]) - 1)
    if axes < 2:
        raise DataError(f"the training split varies along {axes} axes: a linear model expects two or more")
    return axes


def check_dimension(config: Config, dataset: Dataset) -> None:
    """Raises ConfigError: ``model.latent_dim`` leaves nothing over of these data; the text names the largest that does.

    Raises DataError: none could.
    """
    if not FAMILIES[config.model.family].leaves_axes_out:
        return
    axes, asked = most_axes(dataset), config.model.latent_dim
    if asked >= axes:
        raise ConfigError(
            f"model.latent_dim: {config.model.family} expects 1 to {axes - 1} of data that vary along {axes} axes "
            f"(numbers that are not constant, rows about their mean), got {asked}: nothing would be left over to score"
        )


def adapted(config: Config, dataset: Dataset) -> Config:
    """``config`` with a preset's ``model.latent_dim`` brought down to half of the axes that the data have.

    The presets' number is for MNIST. Raises DataError: too few axes.
    """
    half = most_axes(dataset) // 2
    if config.model.latent_dim <= half:
        return config
    return with_latent_dim(config, half)


def with_latent_dim(config: Config, latent_dim: int) -> Config:
    """``config`` with that ``model.latent_dim``."""
    return config.model_copy(update={"model": config.model.model_copy(update={"latent_dim": latent_dim})})
