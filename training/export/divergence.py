"""Has a training diverged? A model is held against the best constant p(x) of its likelihood, on held-out rows.

A model that has learned anything of x is better than the constant, and one whose posterior has collapsed onto the
prior is as good. One that was trained for an epoch or two only may still be worse: it stands between where it started
and the constant, and has not diverged. So what a training has to hold is the lower one of two, the constant and the
model before its first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from training.config import Config
from training.data.dataset import Dataset
from training.errors import ModelDiverged
from training.evaluation.best_constant import best_constant
from training.evaluation.evaluate import bounds
from training.fitting.schedule import annealed_beta
from training.fitting.trainer import initial_model
from training.models.base import LatentVariableModel
from training.runs import Run

ROWS = 500  # of the validation split, at most
NOISE = 5.0  # nats: a bound by one sampled z differs by so many from the next one
A_NUMBER = 0.1  # nats a number of x
OF_AN_ERROR = 0.1  # of an error, which has no fixed unit: a tenth of it,
LEAST_ERROR = 1e-3  # and so much a number of x, lest rounding counts where nothing varies
DEVIATIONS = 4.0  # standard errors by which the mean has to be worse: few odd rows are no divergence


@dataclass(frozen=True)
class Standing:
    """Means over held-out rows, in ``unit``, more is better: the model, the best constant, the model untrained.

    ``untrained`` is None where it was not needed, and of a closed form. ``diverged``: the model is worse than both.
    """

    model: float
    constant: float
    untrained: float | None
    unit: str
    diverged: bool


def standing(model: LatentVariableModel, dataset: Dataset, config: Config, epoch: int) -> Standing:
    """How the model, of weights kept after ``epoch`` epochs, stands on the first rows of the validation split."""
    rows = dataset.splits["validation"][:ROWS]
    beta = annealed_beta(config.objective, max(0, epoch - 1))
    found = objective_by_row(model, dataset, rows, config, beta)
    constant = best_constant(model, dataset, rows, config.model.likelihood)
    slack = slack_of(model, constant) + config.objective.free_bits * model.latent_dim
    untrained, diverged = None, is_worse(found, constant, slack)
    if diverged and not model.closed_form:
        before = objective_by_row(initial_model(config, dataset).eval(), dataset, rows, config, beta)
        untrained, diverged = float(before.mean()), is_worse(found, before, slack)
    return Standing(float(found.mean()), float(constant.mean()), untrained, model.likelihood.unit_of_error, diverged)


def objective_by_row(
    model: LatentVariableModel, dataset: Dataset, rows: np.ndarray, config: Config, beta: float
) -> np.ndarray:
    """What was maximised, float64 [N]: the bound; minus β·rate where β is under 1; minus the error without a bound."""
    found = bounds(model, dataset, rows, config.objective.samples, config.evaluate.chunk)
    if model.evidence == "none":
        return -found.distortion
    return found.iwae + (max(0.0, 1 - beta) * found.rate if model.evidence == "bound" else 0.0)


def slack_of(model: LatentVariableModel, constant: np.ndarray) -> float:
    """What a model may be worse by: more than chance, and far less than what a training that diverges loses."""
    numbers = math.prod(model.shape)
    if model.evidence == "none":
        return OF_AN_ERROR * float(np.abs(constant).mean()) + LEAST_ERROR * numbers
    return NOISE + A_NUMBER * numbers


def is_worse(found: np.ndarray, other: np.ndarray, slack: float) -> bool:
    """Whether ``found`` is worse than ``other``, both by row, by more than ``slack``: in the mean beyond chance, or in
    the median, for the mean of few rows says little. What is not a number is worse than any.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        gain = found - other
        most = gain.mean() + DEVIATIONS * gain.std() / math.sqrt(len(gain))
        return not (most >= -slack and float(np.median(gain)) >= -slack)


def refuse_diverged(run: Run) -> None:
    """Raises ModelDiverged: the run's model has diverged, or no validation gave a finite bound."""
    epoch, history = run.checkpoint["state"]["best_epoch"], run.checkpoint["history"]
    if history and not epoch:
        raise ModelDiverged(f"the training has diverged: no validation gave a finite bound; {_advice(run)}")
    found = standing(run.model, run.dataset, run.config, epoch)
    if found.diverged:
        raise ModelDiverged(f"the training has diverged: {_in_words(found)}; {_advice(run)}")


def _in_words(found: Standing) -> str:
    """The numbers of a model that has diverged; of errors their amount."""
    sign, unit = (1, found.unit) if found.unit == "nats" else (-1, f"of {found.unit}")
    untrained = (
        "" if found.untrained is None else f", and than the model before training, at {sign * found.untrained:.4g}"
    )
    return (
        f"{sign * found.model:.4g} {unit} in the mean over held-out rows is worse than the best constant, at "
        f"{sign * found.constant:.4g}{untrained}"
    )


def _advice(run: Run) -> str:
    better = "train on more rows, or fit fewer parameters"
    if not run.model.closed_form:
        better = f"lower optimiser.learning_rate ({run.config.optimiser.learning_rate:g} here) and train again"
    return f"{better}, or publish it all the same with --publish-anyway"
