"""The training loop, on Lightning Fabric: devices, precision and processes are Fabric's, the loop is plain.

``fit`` is deterministic given (config, data): order, noise and learning rate are functions of the step. A run killed
at any moment and started again ends, on CPU, with bitwise the weights of one never killed.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from training.config import Config, OptimiserConfig
from training.data.batches import StaticallyBinarised, derived_seed, epoch_batches, steps_per_epoch, to_unit
from training.data.dataset import Dataset
from training.errors import CheckpointError, TrainingDiverged
from training.evaluation.aggregate import collapsed
from training.evaluation.evaluate import bounds
from training.fitting.checkpoint import FILE, load_checkpoint, save_checkpoint
from training.fitting.data_defaults import check_dimension
from training.fitting.guard import is_sane, remember
from training.fitting.interrupts import Interrupt
from training.fitting.journal import Journal, Row
from training.fitting.objectives import annealed_beta, objective
from training.fitting.threads import set_threads
from training.models.base import LatentVariableModel, Terms
from training.models.registry import FAMILIES, build_model

Tensors = tuple[Tensor, ...] | list[Tensor]
REFERENCE_PIXELS = 784
"""Limits of the gradient's norm are stated for images of so many numbers, and grow with larger ones, as nats do."""
FIRST_WARNING = 3
"""Epochs before a posterior that has not left the prior yet is called collapsed."""
MAX_SKIPPED_IN_A_ROW = 100
"""So many updates skipped one after the other mean that the run has diverged."""


@dataclass
class State:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_bound: float = -math.inf
    best_epoch: int = 0
    validations_since_best: int = 0
    seconds: float = 0.0
    stopped: bool = False
    finished: bool = False
    recent_norms: list[float] = field(default_factory=list)
    unaveraged: int = 0

    @property
    def updates(self) -> int:
        """Steps that moved the weights."""
        return self.step - self.skipped


def restored_state(stored: dict[str, Any]) -> State:
    """The state of a checkpoint; an earlier version called a run finished that had run out of patience."""
    return State(**{"stopped": stored["finished"]} | stored)


@dataclass
class Sums:
    """Sums of one epoch's batch means, kept on the device so that no step waits for it; ``kl`` is by group [G]."""

    values: Tensor
    steps: int = 0
    kl: Tensor | None = None

    def add(self, terms: Terms) -> None:
        """Add a batch's ELBO, rate and distortion (sampled), and its KL by latent dimension or layer."""
        with torch.no_grad():
            rate = (terms.log_q - terms.log_p_z).mean()
            fit = terms.log_p_x.mean()
            self.values += torch.stack([fit - rate, rate, -fit])
            kl = terms.kl.mean(0)
            self.kl = kl if self.kl is None else self.kl + kl
        self.steps += 1

    def means(self) -> tuple[float, float, float]:
        """Mean ELBO, rate, distortion so far."""
        elbo, rate, distortion = (self.values / max(1, self.steps)).tolist()
        return elbo, rate, distortion


class Trainer:
    """One run: model, optimiser, averaged weights and state, and the steps that advance them."""

    def __init__(self, config: Config, dataset: Dataset, folder: Path, fabric: Fabric) -> None:
        self.config, self.dataset, self.folder, self.fabric = config, dataset, folder, fabric
        torch.manual_seed(derived_seed(config.seed, "weights"))
        model = build_model(dataset.preprocessing, config.model)
        start(model, dataset)
        self.source: Dataset | StaticallyBinarised = dataset
        if config.model.likelihood.family == "bernoulli" and config.model.likelihood.binarisation == "static":
            self.source = StaticallyBinarised(dataset, config.seed)
        optimiser = torch.optim.AdamW(
            model.parameters(),
            config.optimiser.learning_rate,
            weight_decay=config.optimiser.weight_decay,
            fused=True,
        )
        self.model, self.optimiser = fabric.setup(model, optimiser)
        self.ema = AveragedModel(self._bare, multi_avg_fn=self._blend)
        self.best = _copy(self.averaged.state_dict())
        self.state = State()
        self.sums = Sums(torch.zeros(3, device=fabric.device))
        self.history: list[Row] = []
        self.kl: np.ndarray | None = None
        self.warned = False
        self.train_indices = dataset.splits["train"]
        self.steps_per_epoch = steps_per_epoch(len(self.train_indices), config.optimiser.batch_size, fabric.world_size)
        self.total_steps = self.steps_per_epoch * config.optimiser.epochs
        self.scale = max(1.0, math.prod(dataset.preprocessing.shape) / REFERENCE_PIXELS)
        self._saved = time.perf_counter()
        self.interrupt = Interrupt()

    @property
    def _bare(self) -> LatentVariableModel:
        bare: LatentVariableModel = self.model.module
        return bare

    @property
    def averaged(self) -> LatentVariableModel:
        """The model with the moving average of the weights."""
        averaged = self.ema.module
        assert isinstance(averaged, LatentVariableModel)
        return averaged

    def resume(self) -> bool:
        """Load the run's checkpoint, if there is one; the first rank reads it for all.

        Raises CheckpointError: of another configuration, or of other data.
        """
        first = self.fabric.is_global_zero
        content = self.fabric.broadcast(load_checkpoint(self.folder, self.config) if first else None)
        if content is None:
            return False
        if content["fingerprint"] != self.dataset.fingerprint:
            raise CheckpointError(
                f"the data of {self.folder} have changed since its checkpoint was written: what was trained on "
                "could now be in the test split; use --restart to discard it, or another --run-dir"
            )
        self._bare.load_state_dict(content["model"])
        self.ema.load_state_dict(content["ema"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.best = content["best"]
        self.state = restored_state(content["state"])
        kl = content.get("sum_kl")
        self.sums = Sums(
            self.fabric.to_device(content["sums"]),
            content["sum_steps"],
            None if kl is None else self.fabric.to_device(kl),
        )
        self.history = content["history"]
        return True

    @property
    def standing(self) -> str:
        """Where a resumed run stands, in words."""
        if self.state.finished:
            return f"done before, {self.folder / FILE}"
        if self.state.stopped or self.state.step == self.total_steps:
            return "goes on after its last epoch"
        epoch, done = divmod(self.state.step, self.steps_per_epoch)
        within = f", step {done + 1} of {self.steps_per_epoch}" if done else ""
        return f"goes on from epoch {epoch + 1} of {self.config.optimiser.epochs}{within}"

    def save(self) -> None:
        """Write a checkpoint (first rank only)."""
        self._saved = time.perf_counter()
        if not self.fabric.is_global_zero:
            return
        content: dict[str, Any] = {
            "model": self._bare.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "best": self.best,
            "state": asdict(self.state),
            "sums": self.sums.values.cpu(),
            "sum_steps": self.sums.steps,
            "sum_kl": None if self.sums.kl is None else self.sums.kl.cpu(),
            "history": self.history,
            "fingerprint": self.dataset.fingerprint,
        }
        save_checkpoint(self.folder, self.config, content)

    def training_step(self, pixels: np.ndarray) -> Terms:
        """One update from a batch of pixels [B,C,H,W]; skipped and counted if the gradient's norm is not sane."""
        config, step = self.config, self.state.step
        self._seed(derived_seed(config.seed, "step", step, self.fabric.global_rank))
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config.optimiser, step, self.total_steps)
        x = self.fabric.to_device(to_unit(pixels))
        noise = torch.randn(len(x), config.objective.samples, self._bare.noise_dim, device=x.device)
        dither = torch.rand_like(x) if self._bare.likelihood.dither else None
        terms = self.model(x, noise, dither, config.objective.kind == "dreg")
        beta = annealed_beta(config.objective, step / self.steps_per_epoch)
        self.optimiser.zero_grad()
        self.fabric.backward(-objective(terms, config.objective, beta))
        norm = self.fabric.clip_gradients(
            self.model, self.optimiser, max_norm=config.optimiser.gradient_clip * self.scale, error_if_nonfinite=False
        )
        self.state.step += 1
        self._update(float(torch.as_tensor(norm)))
        return terms

    def _seed(self, seed: int) -> None:
        """Seed what draws on the device; torch.manual_seed asks every backend there is, a fortieth of a step here."""
        if self.fabric.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _update(self, gradient_norm: float) -> None:
        state, limit = self.state, self.config.optimiser.skip_above
        limit = None if limit is None else limit * self.scale
        sane = is_sane(gradient_norm, state.recent_norms, limit)
        remember(gradient_norm, state.recent_norms)
        if not sane:
            self._skip(gradient_norm, limit)
            return
        state.skipped_in_a_row = 0
        self.optimiser.step()
        state.unaveraged += 1
        if state.unaveraged >= self.config.optimiser.ema_every:
            self.average()

    def average(self) -> None:
        """Bring the moving average up to the weights as they stand."""
        if self.state.unaveraged:
            self.ema.update_parameters(self._bare)
            self.state.unaveraged = 0

    @torch.no_grad()
    def _blend(self, averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        decay = average_decay(self.config.optimiser, self.state.updates - 1, self.state.unaveraged)
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def _skip(self, gradient_norm: float, limit: float | None) -> None:
        """Count an update that is not made. Raises TrainingDiverged: there have been too many in a row."""
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        told = f"{MAX_SKIPPED_IN_A_ROW} updates in a row were skipped: the last gradient's norm is {gradient_norm:.3g}"
        if limit is None or not math.isfinite(gradient_norm):
            raise TrainingDiverged(f"{told}; lower optimiser.learning_rate")
        raise TrainingDiverged(
            f"{told}, at most {limit:.3g} expected; lower optimiser.learning_rate, or leave optimiser.skip_above unset "
            "if the norm was sane from the start"
        )

    def train_epoch(self, journal: Journal) -> Row:
        """The rest of the epoch in which the state stands; its means."""
        epoch, offset = divmod(self.state.step, self.steps_per_epoch)
        batches = epoch_batches(
            self.train_indices,
            self.config.optimiser.batch_size,
            self.config.seed,
            epoch,
            self.fabric.global_rank,
            self.fabric.world_size,
        )[offset:]
        self.model.train()
        before, started, images = self.state.seconds, time.perf_counter(), 0
        for pixels in self.source.batches(batches):
            self.sums.add(self.training_step(pixels))
            images += len(pixels) * self.fabric.world_size
            elapsed = time.perf_counter() - started
            self.state.seconds = before + elapsed
            if journal.is_due(self.state.step):
                journal.step(self.state.step, *self.sums.means(), images / elapsed)
            if self.state.step % self.steps_per_epoch:  # after the last step comes the validation, then the pause
                self._pause()
        return self._epoch_row(epoch + 1, images / max(1e-9, time.perf_counter() - started))

    def _pause(self) -> None:
        """A moment at which the state is whole: checkpoint if it is time, stop if asked."""
        if self.interrupt.requested or time.perf_counter() - self._saved > self.config.run.checkpoint_seconds:
            self.save()
        self.interrupt.check()

    def _epoch_row(self, epoch: int, images_per_second: float) -> Row:
        means = torch.as_tensor(
            self.fabric.all_reduce(self.sums.values / max(1, self.sums.steps), reduce_op="mean")
        ).tolist()
        self.kl = None if self.sums.kl is None else (self.sums.kl / self.sums.steps).cpu().numpy()
        self.sums = Sums(torch.zeros(3, device=self.fabric.device))
        names = ("train_elbo", "train_rate", "train_distortion")
        return {
            "epoch": epoch,
            "step": self.state.step,
            **dict(zip(names, means, strict=True)),
            "images_per_second": images_per_second,
            "learning_rate": self.optimiser.param_groups[0]["lr"],
            "beta": annealed_beta(self.config.objective, epoch - 1),
            "skipped": self.state.skipped,
        }

    def validate(self) -> dict[str, float]:
        """The averaged weights on the validation split: ``bound`` is the ELBO, or IWAE at the objective's K (β = 1)."""
        objective_config = self.config.objective
        means = bounds(
            self.averaged.eval(),
            self.dataset,
            self.dataset.splits["validation"],
            objective_config.samples,
            self.config.evaluate.chunk,
        ).means()
        if self.averaged.evidence == "none":  # no prior yet, and no rate ever
            means |= {"elbo": -means["distortion"], "rate": 0.0}
        bound = means["elbo"] if objective_config.kind == "elbo" else means["iwae"]
        return {"bound": bound, "elbo": means["elbo"], "rate": means["rate"], "distortion": means["distortion"]}

    def judge(self, row: Row, warmed_up: bool) -> bool:
        """Keep the weights if their validation bound is the best; True if patience is at its end."""
        state = self.state
        if row["bound"] > state.best_bound or not warmed_up:
            state.best_bound = row["bound"] if warmed_up else -math.inf
            state.best_epoch = int(row["epoch"])
            state.validations_since_best = 0
            self.best = _copy(self.averaged.state_dict())
            return False
        state.validations_since_best += 1
        return state.validations_since_best >= self.config.optimiser.patience

    def run(self, journal: Journal) -> None:
        """Epochs until the last, or until patience ends."""
        validate_every = self.config.run.validate_every
        while self.state.step < self.total_steps and not self.state.stopped:
            row = self.train_epoch(journal)
            epoch = int(row["epoch"])
            if epoch % validate_every == 0 or self.state.step == self.total_steps:
                self.average()
                row |= self.fabric.broadcast(self.validate())  # one judgement for all ranks, to the last bit
                self.history.append(row)
                warmed_up = epoch > self.config.objective.warmup_epochs
                self.state.stopped = self.judge(row, warmed_up)
                journal.epoch(self.history)
                if warmed_up and epoch >= FIRST_WARNING:
                    self._warn_of_collapse(journal)
            self._pause()
        if not self.state.finished:
            self.finish(journal)

    def _warn_of_collapse(self, journal: Journal) -> None:
        """Say once in a run that the posterior has fallen onto the prior, by the last epoch's KL of each group."""
        if self.warned or self.kl is None or self._bare.evidence != "bound":
            return
        text = collapsed(self.kl, layers=self._bare.kl_groups == "layer")
        if text:
            journal.warn(text)
            self.warned = True

    def finish(self, journal: Journal) -> None:
        """What is fitted once the weights stand, on the best ones; then the run is finished."""
        started = time.perf_counter()
        self.best = finished_weights(self.config, self.dataset, self.best, journal)
        self.state.seconds += time.perf_counter() - started
        self.state.finished = True
        self.save()


@dataclass(frozen=True)
class Fitted:
    """A finished run: the averaged weights with the best validation bound, and how they came about."""

    model: LatentVariableModel
    state: State
    history: list[Row]


def average_decay(config: OptimiserConfig, t: int, updates: int) -> float:
    """What the moving average keeps of itself as it takes in the last ``updates`` updates at once, up to the t-th.

    The decay of an update rises as (1+t)/(10+t) up to ``ema_decay``: short runs are not all start.
    """
    decay: float = min(config.ema_decay, (1 + t) / (10 + t)) ** updates
    return decay


def learning_rate(config: OptimiserConfig, step: int, total: int) -> float:
    """Linear warm-up over ``warmup_steps``, then constant, or a half cosine to 0 (Loshchilov & Hutter 2017)."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / total))
    return rate


def start(model: LatentVariableModel, dataset: Dataset, rows: int = 5000, examples: int = 500) -> None:
    """Let the model start from the mean and deviation of the first training rows, and from some of them as they are."""
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


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in weights.items()}


def make_fabric(config: Config) -> Fabric:
    """Fabric for the configured devices and precision; under torchrun it joins the processes that torchrun started."""
    run = config.run
    set_threads(config)
    precision: dict[str, Any] = {"precision": "32-true"}
    if run.precision == "bf16-mixed":
        gpu = run.accelerator == "cuda" or (run.accelerator == "auto" and torch.cuda.is_available())
        precision = {"plugins": NetworksInBfloat16("bf16-mixed", "cuda" if gpu else "cpu")}
    fabric = Fabric(accelerator=run.accelerator, devices=run.devices, num_nodes=run.nodes, **precision)
    fabric.launch()
    return fabric


class NetworksInBfloat16(MixedPrecision):
    """Autocast alone: Fabric's own also rounds the inputs, of which bfloat16 keeps 8 bits.

    That would move grey levels, turn one white pixel in 500 black under a dynamic binarisation, and leave two points of
    the 65,536 that a dither spreads a level over.
    """

    def convert_input(self, data: Any) -> Any:
        """The inputs as they are."""
        return data


def finished_weights(
    config: Config, dataset: Dataset, weights: dict[str, Tensor] | None, journal: Journal
) -> dict[str, Tensor]:
    """``weights`` (or a fresh model's) after the model's own ``finish`` on the training split, on the CPU."""
    torch.manual_seed(derived_seed(config.seed, "weights"))
    model = build_model(dataset.preprocessing, config.model)
    if weights is None:
        start(model, dataset)
    else:
        model.load_state_dict(weights)
    model.eval().finish(dataset, derived_seed(config.seed, "finish"), journal.say)
    return _copy(model.state_dict())


def solve(config: Config, dataset: Dataset, folder: Path, fabric: Fabric, console: Console | None = None) -> Fitted:
    """Fit a model of closed form, or load it; the first rank does it for all.

    Raises CheckpointError, DataError, ConfigError.
    """
    first = fabric.is_global_zero
    content: dict[str, Any] = fabric.broadcast(_solved(config, dataset, folder, console) if first else {})
    return Fitted(fitted_model(config, dataset, content["best"]), restored_state(content["state"]), [])


def _solved(config: Config, dataset: Dataset, folder: Path, console: Console | None) -> dict[str, Any]:
    """The checkpoint's content."""
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


def fitted_model(config: Config, dataset: Dataset, weights: dict[str, Tensor]) -> LatentVariableModel:
    """The model with those weights, in eval mode on the CPU."""
    model = build_model(dataset.preprocessing, config.model)
    model.load_state_dict(weights)
    return model.eval()


def fit(
    config: Config, dataset: Dataset, folder: Path, fabric: Fabric | None = None, console: Console | None = None
) -> Fitted:
    """Train, or go on with, the run in ``folder``. Raises CheckpointError, TrainingDiverged, DataError."""
    fabric = fabric or make_fabric(config)
    if FAMILIES[config.model.family].closed_form:
        return solve(config, dataset, folder, fabric, console)
    trainer = Trainer(config, dataset, folder, fabric)
    resumed = trainer.resume()
    journal = Journal(folder, trainer.total_steps, trainer.state.step, trainer.fabric.is_global_zero, console)
    with journal, trainer.interrupt:
        if resumed:
            journal.say(f"fit: {trainer.standing}")
        trainer.run(journal)
    return Fitted(fitted_model(config, dataset, trainer.best), trainer.state, trainer.history)
