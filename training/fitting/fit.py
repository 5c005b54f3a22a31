"""Fitting a model to data: by the training loop, or in closed form.

``fit`` is deterministic given (config, data): a run that was killed at any moment and started again ends, on the CPU,
with bitwise the weights of one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor

from training.config import Config
from training.data.batches import SplitRows, StaticallyBinarised, derived_seed, epoch_batches
from training.data.dataset import Dataset
from training.errors import CheckpointError
from training.evaluation.aggregate import collapsed
from training.evaluation.evaluate import bounds
from training.fitting.checkpoint import FILE, load_checkpoint, save_checkpoint
from training.fitting.data_defaults import check_dimension
from training.fitting.devices import make_fabric
from training.fitting.journal import Journal, Row
from training.fitting.loop import Interrupt, Loop, describe_progress
from training.fitting.metrics import SAMPLED, Sums, validate
from training.fitting.schedule import annealed_beta
from training.fitting.trainer import State, Trainer, cpu_copy, initial_model, new_model, stored_state
from training.models.base import LatentVariableModel
from training.models.registry import FAMILIES, build_model

FIRST_WARNING = 3
"""Epochs before a posterior that has not left the prior yet is called collapsed."""


@dataclass(frozen=True)
class Fitted:
    """A finished run: the averaged weights with the best validation bound, and how they came about."""

    model: LatentVariableModel
    state: State
    history: list[Row]


def fit(
    config: Config, dataset: Dataset, folder: Path, fabric: Fabric | None = None, console: Console | None = None
) -> Fitted:
    """Train, or go on with, the run in ``folder``. Raises CheckpointError, TrainingDiverged, DataError."""
    fabric = fabric or make_fabric(config)
    if FAMILIES[config.model.family].closed_form:
        return solve(config, dataset, folder, fabric, console)
    training = ModelTraining(config, dataset, folder, fabric, console)
    training.run()
    return Fitted(fitted_model(config, dataset, training.best), training.state, training.history)


class ModelTraining:
    """A model's training as the loop advances it, new or as its checkpoint has it: batches, validations, the journal.

    ``best``: the averaged weights with the best validation bound so far, on the CPU. ``history``: a row a validation.
    Raises CheckpointError: of another configuration, or of other data.
    """

    def __init__(
        self, config: Config, dataset: Dataset, folder: Path, fabric: Fabric, console: Console | None = None
    ) -> None:
        self.config, self.dataset, self.folder, self.fabric = config, dataset, folder, fabric
        self.path = folder / FILE
        self.trainer = Trainer(config, dataset, fabric)
        self.steps_per_epoch, self.total_steps = self.trainer.steps_per_epoch, self.trainer.total_steps
        static = self.trainer.bare.likelihood.binarisation == "static"
        self.source = StaticallyBinarised(dataset, config.seed) if static else dataset
        self.best = cpu_copy(self.trainer.averaged.state_dict())
        self.sums = Sums.zero(fabric.device)
        self.history: list[Row] = []
        self.warned = False
        self.resumed = self._resume()
        self.journal = Journal(folder, self.total_steps, self.state.step, fabric.is_global_zero, console)

    @property
    def state(self) -> State:
        """Where the training stands."""
        return self.trainer.state

    def run(self) -> None:
        """Make the steps that are left, then ``finish``. Raises TrainingDiverged, KeyboardInterrupt."""
        with self.journal, Interrupt() as interrupt:
            if self.resumed:
                self.journal.say(f"fit: {describe_progress(self)}")
            Loop(self, self.config.run.checkpoint_seconds, interrupt, self.show).run()

    def batches(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Pixels [B,C,H,W] of this rank's batches of ``epoch``, both counted from 0, from the ``first`` on."""
        indices, size = self.dataset.splits["train"], self.config.optimiser.batch_size
        rank, ranks = self.fabric.global_rank, self.fabric.world_size
        return self.source.batches(epoch_batches(indices, size, self.config.seed, epoch, rank, ranks)[first:])

    def step(self, pixels: np.ndarray) -> None:
        """Make one step, and add its terms to those of the epoch."""
        self.sums.add(self.trainer.training_step(pixels))

    def show(self, rows_per_second: float) -> None:
        """Show progress, every few steps or seconds."""
        if self.journal.is_due(self.state.step):
            elbo, rate, distortion = self.sums.means.tolist()
            self.journal.step(self.state.step, elbo, rate, distortion, rows_per_second * self.fabric.world_size)

    def end_epoch(self, epoch: int, rows_per_second: float) -> None:
        """Validate the averaged weights if it is due, keep them if they are the best, and log the epoch."""
        sums, self.sums = self.sums, Sums.zero(self.fabric.device)
        if epoch % self.config.run.validate_every and self.state.step < self.total_steps:
            return
        row = self._row(epoch, rows_per_second, sums)
        self.trainer.average.catch_up(self.state.updates)
        metrics = validate(self.trainer.averaged, self.dataset, self.config)
        row |= self.fabric.broadcast(metrics)  # one judgement for all ranks, to the last bit
        self.history.append(row)
        warmed_up = epoch > self.config.objective.warmup_epochs
        if self.state.is_best(epoch, row["bound"], warmed_up):
            self.best = cpu_copy(self.trainer.averaged.state_dict())
        self.state.stopped = self.state.validations_since_best >= self.config.optimiser.patience
        self.journal.epoch(self.history)
        if warmed_up and epoch >= FIRST_WARNING and sums.kl is not None:
            self._warn_of_collapse((sums.kl / sums.steps).cpu().numpy())

    def finish(self) -> None:
        """Let the model fit what gradients do not, with the best weights."""
        started = time.perf_counter()
        self.best = finished_weights(self.config, self.dataset, self.best, self.journal)
        self.state.seconds += time.perf_counter() - started

    def save(self) -> None:
        """Write the checkpoint (first rank only)."""
        if not self.fabric.is_global_zero:
            return
        content: dict[str, Any] = {
            **self.trainer.content(),
            "best": self.best,
            "sums": self.sums.values.cpu(),
            "sum_steps": self.sums.steps,
            "sum_kl": None if self.sums.kl is None else self.sums.kl.cpu(),
            "history": self.history,
            "fingerprint": self.dataset.fingerprint,
        }
        save_checkpoint(self.folder, self.config, content)

    def _resume(self) -> bool:
        """Load the checkpoint, if there is one; the first rank reads it for all."""
        first = self.fabric.is_global_zero
        content = self.fabric.broadcast(load_checkpoint(self.folder, self.config) if first else None)
        if content is None:
            return False
        if content["fingerprint"] != self.dataset.fingerprint:
            raise CheckpointError(
                f"the data of {self.folder} have changed since its checkpoint was written: what was trained on "
                "could now be in the test split; use --restart to discard it, or another --run-dir"
            )
        self.trainer.restore(content)
        values, kl = self.fabric.to_device((content["sums"], content.get("sum_kl")))
        self.sums = Sums(values, content["sum_steps"], kl)
        self.best, self.history = content["best"], content["history"]
        return True

    def _row(self, epoch: int, rows_per_second: float, sums: Sums) -> Row:
        means = torch.as_tensor(self.fabric.all_reduce(sums.means, reduce_op="mean")).tolist()
        return {
            "epoch": epoch,
            "step": self.state.step,
            **dict(zip(SAMPLED, means, strict=True)),
            "images_per_second": rows_per_second * self.fabric.world_size,
            "learning_rate": self.trainer.learning_rate(self.state.step - 1),
            "beta": annealed_beta(self.config.objective, epoch - 1),
            "skipped": self.state.skipped,
        }

    def _warn_of_collapse(self, kl: np.ndarray) -> None:
        """Warn, once in a run, that the posterior has collapsed, by the epoch's mean KL of each group [G]."""
        model = self.trainer.bare
        if self.warned or model.evidence != "bound":
            return
        text = collapsed(kl, layers=model.kl_groups == "layer")
        if text:
            self.journal.warn(text)
            self.warned = True


def solve(config: Config, dataset: Dataset, folder: Path, fabric: Fabric, console: Console | None = None) -> Fitted:
    """Fit a model of closed form, or load it; the first rank does it for all.

    Raises CheckpointError, DataError, ConfigError.
    """
    first = fabric.is_global_zero
    content: dict[str, Any] = fabric.broadcast(_solved(config, dataset, folder, console) if first else {})
    return Fitted(fitted_model(config, dataset, content["best"]), stored_state(content["state"]), [])


def _solved(config: Config, dataset: Dataset, folder: Path, console: Console | None) -> dict[str, Any]:
    """Content of the checkpoint of a model of closed form, fitted here unless it is there."""
    content = load_checkpoint(folder, config)
    if content is not None and content["fingerprint"] == dataset.fingerprint:
        return content
    check_dimension(config, dataset)
    started = time.perf_counter()
    with Journal(folder, 1, 0, True, console) as journal:
        weights = finished_weights(config, dataset, None, journal)
    model = fitted_model(config, dataset, weights)
    means = bounds(model, dataset, dataset.splits["validation"], 1, config.evaluate.chunk).means()
    bound = -means["distortion"] if model.evidence == "none" else means["elbo"]
    state = State(best_bound=bound, seconds=time.perf_counter() - started, stopped=True, finished=True)
    content = {"best": weights, "state": asdict(state), "history": [], "fingerprint": dataset.fingerprint}
    save_checkpoint(folder, config, content)
    return content


def finished_weights(
    config: Config, dataset: Dataset, weights: dict[str, Tensor] | None, journal: Journal
) -> dict[str, Tensor]:
    """``weights`` (or a fresh model's) after the model's own ``finish`` on the training split, on the CPU."""
    if weights is None:
        model = initial_model(config, dataset)
    else:
        model = new_model(config, dataset)
        model.load_state_dict(weights)
    train, validation = (SplitRows(dataset, dataset.splits[name]) for name in ("train", "validation"))
    for sentence in model.eval().finish(train, validation, derived_seed(config.seed, "finish")):
        journal.say(sentence)
    return cpu_copy(model.state_dict())


def fitted_model(config: Config, dataset: Dataset, weights: dict[str, Tensor]) -> LatentVariableModel:
    """The model with those weights, in eval mode on the CPU."""
    model = build_model(dataset.preprocessing, config.model)
    model.load_state_dict(weights)
    return model.eval()
