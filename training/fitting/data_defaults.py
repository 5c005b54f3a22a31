"""Defaults that depend on the data: ``model.latent_dim`` of linear models, and ``optimiser.batch_size``.

A preset's numbers are for its own data. On smaller ones they are brought down, where the user set neither key; what
the user set stays, and a run that goes on keeps what it had.

**latent_dim.** PCA, PPCA and factor analysis keep fewer axes than would explain the data whole. With an axis for every
number that varies (or for every row but one) nothing is left over: the residual, and the noise's deviation, are what
rounding makes of zero, and a score of them says nothing.

**batch_size.** Of few rows a preset's batch makes so few steps an epoch that the weights hardly move. On 619 small
digits the preset ``one-class`` made 4 steps an epoch, and the model it ended with told odd digits from even ones with
AUROC .86, mean of three seeds; in batches of 27 it is .94 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from training.config import Config
from training.data.dataset import Dataset
from training.errors import ConfigError, DataError
from training.models.base import LatentVariableModel
from training.models.registry import FAMILIES

ROWS = 1000  # read at a time
STEPS = 20  # an epoch, at least
LEAST = 16  # rows of a batch: gradients of fewer are mostly noise


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


def half_of_the_axes(dataset: Dataset) -> int:
    """Half of the axes that the data have. Raises DataError: too few axes."""
    return most_axes(dataset) // 2


def batch_of_enough_steps(dataset: Dataset) -> int:
    """Rows of a batch that gives STEPS an epoch, or LEAST."""
    return max(LEAST, len(dataset.splits["train"]) // STEPS)


class DataDefault(NamedTuple):
    """A key whose default is at most ``largest(dataset)``, in families of which ``applies`` is true; and ``why``."""

    section: str
    field: str
    applies: Callable[[type[LatentVariableModel]], bool]
    largest: Callable[[Dataset], int]
    why: str

    @property
    def key(self) -> str:
        """The dotted key."""
        return f"{self.section}.{self.field}"

    def of(self, config: Config) -> int:
        """The key's value in ``config``."""
        value: int = getattr(getattr(config, self.section), self.field)
        return value

    def replaced(self, config: Config, value: int) -> Config:
        """``config`` with that value."""
        section = getattr(config, self.section).model_copy(update={self.field: value})
        return config.model_copy(update={self.section: section})


DATA_DEFAULTS = (
    DataDefault(
        "model", "latent_dim", lambda family: family.leaves_axes_out, half_of_the_axes, "half of the axes of these data"
    ),
    DataDefault(
        "optimiser",
        "batch_size",
        lambda family: not family.closed_form,
        batch_of_enough_steps,
        "for more steps with so few rows",
    ),
)


def _open_to_data(config: Config, chosen: Collection[str]) -> Iterator[DataDefault]:
    """The defaults that the data may change: of the configured family, and of keys that the user did not set."""
    family = FAMILIES[config.model.family]
    return (default for default in DATA_DEFAULTS if default.applies(family) and default.key not in chosen)


def adapted(config: Config, dataset: Dataset, chosen: Collection[str]) -> Config:
    """``config`` with its defaults brought down to what suits the data; ``chosen``: dotted keys that the user set.

    Raises DataError: too few axes for a linear model.
    """
    for default in _open_to_data(config, chosen):
        most = default.largest(dataset)
        if default.of(config) > most:
            config = default.replaced(config, most)
    return config


def as_before(config: Config, stored: Mapping[str, Any], chosen: Collection[str]) -> Config:
    """``config`` with such defaults as a run's checkpoint has them, ``stored`` by section and field."""
    for default in _open_to_data(config, chosen):
        config = default.replaced(config, stored[default.section][default.field])
    return config
