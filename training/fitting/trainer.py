"""A model in training: its weights, their optimiser and moving average, and the step that advances them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from training.config import Config
from training.data.batches import derived_seed, steps_per_epoch, to_unit
from training.data.dataset import Dataset
from training.fitting.averaging import MovingAverage
from training.fitting.devices import seed_generators
from training.fitting.loop import Progress
from training.fitting.objectives import objective
from training.fitting.schedule import annealed_beta, learning_rate, set_learning_rate
from training.fitting.skipping import Skipping
from training.models.base import LatentVariableModel, Terms
from training.models.registry import build_model

REFERENCE_PIXELS = 784
"""Limits of the gradient's norm are stated for images of so many numbers, and grow with larger ones, as nats do."""
HALF_AT = 9
"""Updates after which the moving average keeps half of itself."""
UNAVERAGED = "unaveraged"
"""In a checkpoint's state: updates that the moving average has not taken in yet."""


@dataclass
class State(Progress, Skipping):
    """Where a run stands; all of it is in the checkpoint."""

    best_bound: float = -math.inf
    best_epoch: int = 0
    validations_since_best: int = 0

    @property
    def updates(self) -> int:
        """Steps that moved the weights."""
        return self.step - self.skipped

    def is_best(self, epoch: int, bound: float, warmed_up: bool) -> bool:
        """Record a validation; True if none was better. Before β has risen for good the newest is the best."""
        if warmed_up and not bound > self.best_bound:  # nor is what is not a number
            self.validations_since_best += 1
            return False
        self.best_bound = bound if warmed_up else -math.inf
        self.best_epoch, self.validations_since_best = epoch, 0
        return True


def stored_state(stored: dict[str, Any]) -> State:
    """The state in a checkpoint; in an earlier version's, ``finished`` stands for ``stopped`` too."""
    values = {name: value for name, value in stored.items() if name != UNAVERAGED}
    return State(**{"stopped": stored["finished"]} | values)


class Trainer:
    """A model and what trains it, as a new run begins. It knows steps, and neither files nor validations."""

    def __init__(self, config: Config, dataset: Dataset, fabric: Fabric) -> None:
        self.config, self.fabric, self.state = config, fabric, State()
        model, options = initial_model(config, dataset), config.optimiser
        optimiser = torch.optim.AdamW(
            model.parameters(), options.learning_rate, weight_decay=options.weight_decay, fused=True
        )
        self.model, self.optimiser = fabric.setup(model, optimiser)
        self.average = MovingAverage(self.bare, options.ema_decay, HALF_AT, options.ema_every)
        rows = len(dataset.splits["train"])
        self.steps_per_epoch = steps_per_epoch(rows, options.batch_size, fabric.world_size)
        self.total_steps = self.steps_per_epoch * options.epochs
        scale = max(1.0, math.prod(dataset.preprocessing.shape) / REFERENCE_PIXELS)
        self.clip = options.gradient_clip * scale
        self.limit = None if options.skip_above is None else options.skip_above * scale

    @property
    def bare(self) -> LatentVariableModel:
        """The model without what Fabric puts around it."""
        bare: LatentVariableModel = self.model.module
        return bare

    @property
    def averaged(self) -> LatentVariableModel:
        """The model with the moving average of the weights."""
        averaged = self.average.averaged
        assert isinstance(averaged, LatentVariableModel)
        return averaged

    def content(self) -> dict[str, Any]:
        """The trainer's part of a checkpoint."""
        return {
            "model": self.bare.state_dict(),
            "ema": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "state": asdict(self.state) | {UNAVERAGED: self.average.pending},
        }

    def restore(self, content: dict[str, Any]) -> None:
        """Go on from what ``content`` gave."""
        self.bare.load_state_dict(content["model"])
        self.average.load_state_dict(content["ema"], content["state"].get(UNAVERAGED, 0))
        self.optimiser.load_state_dict(content["optimiser"])
        self.state = stored_state(content["state"])

    def training_step(self, pixels: np.ndarray) -> Terms:
        """One update from a batch of pixels [B,C,H,W]; skipped and counted if the gradient's norm is not sane."""
        config, step = self.config, self.state.step
        seed_generators(self.fabric.device, derived_seed(config.seed, "step", step, self.fabric.global_rank))
        set_learning_rate(self.optimiser, self.learning_rate(step))
        x = self.fabric.to_device(to_unit(pixels))
        noise = torch.randn(len(x), config.objective.samples, self.bare.noise_dim, device=x.device)
        dither = torch.rand_like(x) if self.bare.likelihood.dither else None
        terms: Terms = self.model(x, noise, dither, stop_gradient_q=config.objective.kind == "dreg")
        beta = annealed_beta(config.objective, step / self.steps_per_epoch)
        self.optimiser.zero_grad()
        self.fabric.backward(-objective(terms, config.objective, beta))
        norm = self.fabric.clip_gradients(self.model, self.optimiser, max_norm=self.clip, error_if_nonfinite=False)
        self.state.step += 1
        self.update(float(torch.as_tensor(norm)))
        return terms

    def learning_rate(self, step: int) -> float:
        """The learning rate of ``step``."""
        options = self.config.optimiser
        return learning_rate(step, self.total_steps, options.learning_rate, options.warmup_steps, options.schedule)

    def update(self, gradient_norm: float) -> None:
        """Move the weights, unless the gradient's norm is not sane. Raises TrainingDiverged: too many are not."""
        if self.state.admits(gradient_norm, self.limit):
            self.optimiser.step()
            self.average.update(self.state.updates)


def initial_model(config: Config, dataset: Dataset) -> LatentVariableModel:
    """The model before its first step: weights drawn from the seed, and initialised from training rows."""
    model = new_model(config, dataset)
    start(model, dataset)
    return model


def new_model(config: Config, dataset: Dataset) -> LatentVariableModel:
    """The model with weights drawn from the seed."""
    torch.manual_seed(derived_seed(config.seed, "weights"))
    return build_model(dataset.preprocessing, config.model)


def start(model: LatentVariableModel, dataset: Dataset, rows: int = 5000, examples: int = 500) -> None:
    """Initialise the model from the mean and deviation of its first training rows, and from some examples."""
    indices = dataset.splits["train"][:rows]
    parts = [indices[i : i + examples] for i in range(0, len(indices), examples)]
    first = to_unit(dataset.pixels(parts[0]))
    origin = first.mean(0)  # the sums are of what differs from it, lest squares of far-off numbers cancel
    total, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for pixels in dataset.batches(parts):
        shifted = to_unit(pixels) - origin
        total += shifted.sum(0) / len(indices)
        squares += (shifted**2).sum(0) / len(indices)
    model.likelihood.initialise_values(origin + total, torch.sqrt((squares - total**2).clamp(min=0)))
    model.initialise(origin + total, first)


def cpu_copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they are now, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in weights.items()}
