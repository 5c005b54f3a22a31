"""Images/s of the training loop against a bare PyTorch loop with the same network, in one run, and where the rest goes.

    python -m bench.training_loop [--preset mnist mnist-20min fashion-mnist] [--rounds 8] [--steps 40]
    python -m bench.training_loop --preset mnist-20min --variants [--set model.network.kind=conv]

Three loops train in alternating blocks, so that a drift of the machine's speed hits all; the ratio is taken between
blocks of the same round, and the median over the rounds reported, with the quartiles. ``bare`` does what any tutorial
does: batches that lie ready in memory, forward, backward, clip, Adam, at the configured precision. ``fabric`` is the
same through Lightning Fabric. ``loop`` is a whole epoch of the trainer, with its shuffling, indexing, seeding,
averaging and metrics; validation and checkpoints are left out. Wall time is what one waits for; CPU time of the process
is what the loop itself takes, also beside a neighbour. Further rounds with a clock around every part say where the
time goes.

``--variants`` times the bare loop in bfloat16, through torch.compile, and with channels_last, against itself in
float32.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from service.bundle.input_rules import Preprocessing
from training.config import Config, load_config
from training.data.batches import to_unit
from training.data.dataset import Dataset
from training.fitting import fit, metrics, trainer
from training.fitting.devices import make_fabric
from training.fitting.loop import Interrupt, Loop
from training.fitting.objectives import objective
from training.models.vae import VAE

SHAPE = (1, 28, 28)
POOL = 60_000
"""Images in memory, as many as MNIST has: where a batch comes from is not in a cache."""
UPDATE_NOT_SANE = "{} updates of the measured loop were skipped: what it takes is not what a loop takes"


def random_images(steps: int, batch_size: int, pool: int = POOL) -> Dataset:
    """Random grey 28×28 images, an epoch of ``steps`` batches: speed does not depend on what they show, and mild ones
    upset no likelihood."""
    stream = np.random.RandomState(0)
    pixels = stream.randint(96, 160, (max(pool, steps * batch_size), *SHAPE), dtype=np.uint8)
    train = stream.permutation(len(pixels))[: steps * batch_size]
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), train)
    rule = Preprocessing(mode="L", height=28, width=28)
    return Dataset("random", rule, splits, None, None, "0" * 64, [], pixels.dtype, pixels)


class BareLoop:
    """The loop that a tutorial would write, at the same precision, on batches that lie ready."""

    def __init__(self, config: Config, dataset: Dataset, compiled: bool = False, channels_last: bool = False) -> None:
        torch.manual_seed(0)
        size, order = config.optimiser.batch_size, dataset.splits["train"]
        self.batches = [dataset.pixels(order[i : i + size]) for i in range(0, len(order), size)]
        self.config = config
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model: VAE = VAE(SHAPE, config.model).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.optimiser = torch.optim.AdamW(self.model.parameters(), 1e-3, fused=True)
        if compiled:
            compile_model(self.model, config)

    def epoch(self) -> None:
        """A step on each batch."""
        for pixels in self.batches:
            self.step(pixels)

    def step(self, pixels: np.ndarray) -> None:
        """One update."""
        x = to_unit(pixels).to(memory_format=self.layout)
        noise = torch.randn(len(x), self.config.objective.samples, self.model.noise_dim)
        dither = torch.rand_like(x) if self.model.likelihood.dither else None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.run.precision == "bf16-mixed"):
            terms = self.model(x, noise, dither, stop_gradient_q=self.config.objective.kind == "dreg")
        self.optimiser.zero_grad()
        (-objective(terms, self.config.objective, 1.0)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimiser.gradient_clip)
        self.optimiser.step()


def compile_model(model: VAE, config: Config) -> None:
    """Let inductor compile the forward pass; of DReG, whose hook on z wants z to stay torch's, the parts around it."""
    if config.objective.kind == "dreg":
        model.encoder.compile()
        model.decoder.compile()
        model.likelihood.log_prob = torch.compile(model.likelihood.log_prob)  # type: ignore[method-assign]
    else:
        model.compile()


class FabricLoop(BareLoop):
    """The bare loop through Lightning Fabric, and nothing else."""

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.fabric = make_fabric(config)
        self.wrapped, self.optimiser = self.fabric.setup(self.model, self.optimiser)

    def step(self, pixels: np.ndarray) -> None:
        """One update."""
        x = self.fabric.to_device(to_unit(pixels))
        noise = torch.randn(len(x), self.config.objective.samples, self.model.noise_dim)
        dither = torch.rand_like(x) if self.model.likelihood.dither else None
        terms = self.wrapped(x, noise, dither, stop_gradient_q=self.config.objective.kind == "dreg")
        self.optimiser.zero_grad()
        self.fabric.backward(-objective(terms, self.config.objective, 1.0))
        self.fabric.clip_gradients(self.wrapped, self.optimiser, max_norm=self.config.optimiser.gradient_clip)
        self.optimiser.step()


class WholeLoop:
    """The trainer, epoch by epoch, as ``vaetrain fit`` runs it, but for validation."""

    def __init__(self, config: Config, dataset: Dataset, folder: Path) -> None:
        silent = Console(file=io.StringIO())
        self.training = fit.ModelTraining(config, dataset, folder, make_fabric(config), silent)
        self.trainer = self.training.trainer
        self.loop = Loop(self.training, config.run.checkpoint_seconds, Interrupt(), self.training.show)

    def epoch(self) -> None:
        """One epoch. Raises RuntimeError if an update was skipped, which costs less than one that was not."""
        self.loop.train_epoch()
        if self.trainer.state.skipped:
            raise RuntimeError(UPDATE_NOT_SANE.format(self.trainer.state.skipped))


class Cost(NamedTuple):
    """Seconds of one block."""

    wall: float
    cpu: float


def cost(epoch: Callable[[], None]) -> Cost:
    """What one block takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    epoch()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(epochs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[Cost]]:
    """The cost of each block, a list over rounds; every second round runs backwards."""
    costs: dict[str, list[Cost]] = {name: [] for name in epochs}
    for i in range(rounds):
        for name in list(epochs)[:: 1 - 2 * (i % 2)]:
            costs[name].append(cost(epochs[name]))
    return costs


def ratios(reference: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Speed of ``other`` over that of ``reference`` by their times in each round: the median and the quartiles."""
    found = [a / b for a, b in zip(reference, other, strict=True)]
    low, median, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3)}


class Clock:
    """Time spent in each watched part itself, without the parts called inside it."""

    def __init__(self, now: Callable[[], int] = time.process_time_ns) -> None:
        self.spent: Counter[str] = Counter()
        self._now = now
        self._within: list[str] = []
        self._since = 0

    def _turn(self) -> None:
        now = self._now()
        if self._within:
            self.spent[self._within[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time in here is ``name``'s."""
        self._turn()
        self._within.append(name)
        try:
            yield
        finally:
            self._turn()
            self._within.pop()

    @contextmanager
    def watch(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Calls of ``owner.attribute`` are ``name``'s."""
        original, own = getattr(owner, attribute), attribute in vars(owner)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return original(*arguments, **options)

        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)


Watched = list[tuple[Any, str, str]]


def parts_of_torch(model: VAE) -> Watched:
    """What both loops call: owner, attribute, the part's name."""
    return [
        (sys.modules[__name__], "to_unit", "levels to numbers"),
        (trainer, "to_unit", "levels to numbers"),
        (torch, "randn", "noise"),
        (torch, "rand_like", "noise"),
        (model, "forward", "forward"),
        (sys.modules[__name__], "objective", "objective"),
        (trainer, "objective", "objective"),
        (torch.Tensor, "backward", "backward"),
        (torch.nn.utils, "clip_grad_norm_", "clip"),
        (torch.autocast, "__enter__", "autocast"),
        (torch.autocast, "__exit__", "autocast"),
        (torch.optim.Optimizer, "zero_grad", "Adam"),
        (torch.optim.AdamW, "step", "Adam"),
    ]


def parts_of_the_loop(whole: WholeLoop) -> Watched:
    """What the trainer adds."""
    ours = whole.trainer
    return [
        (Dataset, "pixels", "data indexing"),
        (fit, "epoch_batches", "order of the epoch"),
        (trainer, "derived_seed", "seeding"),
        (trainer, "seed_generators", "seeding"),
        (trainer, "learning_rate", "learning rate and β"),
        (trainer, "set_learning_rate", "learning rate and β"),
        (trainer, "annealed_beta", "learning rate and β"),
        (ours.fabric, "to_device", "Fabric"),
        (type(ours.model), "forward", "Fabric"),
        (ours.fabric, "backward", "Fabric"),
        (ours.fabric, "clip_gradients", "Fabric"),
        (type(ours.optimiser), "step", "Fabric"),
        (ours, "update", "skip accounting"),
        (ours.average, "update", "averaging"),
        (metrics.Sums, "add", "sums of metrics"),
        (whole.training.journal, "step", "journal"),
        (whole.loop, "pause", "pause"),
    ]


def where_it_goes(bare: BareLoop, whole: WholeLoop, rounds: int) -> dict[str, dict[str, float]]:
    """CPU microseconds a step of each part, the median over rounds: in the bare loop, in the whole loop, and the extra.

    ``unwatched`` is what stands between the parts, and half of what the clock itself takes.
    """
    model = whole.trainer.model.module
    watched = {"bare": parts_of_torch(bare.model), "loop": parts_of_torch(model) + parts_of_the_loop(whole)}
    epochs: dict[str, Callable[[], None]] = {"bare": bare.epoch, "loop": whole.epoch}
    spent: dict[str, list[Counter[str]]] = {"bare": [], "loop": []}
    for _ in range(rounds):
        for name, epoch in epochs.items():
            clock = Clock()
            with ExitStack() as stack:
                for owner, attribute, part in watched[name]:
                    stack.enter_context(clock.watch(owner, attribute, part))
                with clock.part("unwatched"):
                    epoch()
            spent[name].append(clock.spent)
    per_step = 1e-3 / len(bare.batches)

    def row(part: str) -> dict[str, float]:
        in_bare, in_loop = ([counts[part] * per_step for counts in spent[name]] for name in ("bare", "loop"))
        extra = [b - a for a, b in zip(in_bare, in_loop, strict=True)]
        medians = map(statistics.median, (in_bare, in_loop, extra))
        return dict(zip(("bare", "loop", "extra"), (round(median, 1) for median in medians), strict=True))

    names = dict.fromkeys(name for _, _, name in watched["loop"])
    return {part: row(part) for part in [*names, "unwatched"]}


def measure(config: Config, rounds: int, steps: int, clocked: int) -> dict[str, Any]:
    """One preset: images/s, ratios to the bare loop in wall and CPU time, and the parts of the difference."""
    dataset = random_images(steps, config.optimiser.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        bare, fabric = BareLoop(config, dataset), FabricLoop(config, dataset)
        whole = WholeLoop(config, dataset, Path(folder))
        epochs = {"bare": bare.epoch, "fabric": fabric.epoch, "loop": whole.epoch}
        in_turn(epochs, 1)
        costs = in_turn(epochs, rounds)
        parts = where_it_goes(bare, whole, clocked) if clocked else {}
    images = steps * config.optimiser.batch_size
    result: dict[str, Any] = {"bare images/s": round(images / statistics.median(c.wall for c in costs["bare"]))}
    for kind in Cost._fields:
        times = {name: [getattr(c, kind) for c in found] for name, found in costs.items()}
        result |= {f"{name} / bare, {kind}": ratios(times["bare"], times[name]) for name in ("fabric", "loop")}
        extra = statistics.median(b - a for a, b in zip(times["bare"], times["loop"], strict=True))
        result[f"microseconds a step, {kind}"] = {
            "bare": round(1e6 * statistics.median(times["bare"]) / steps),
            "extra": round(1e6 * extra / steps),
        }
    return result | ({"parts, CPU microseconds a step": parts} if parts else {})


def cpu_with_children(loop: BareLoop) -> float:
    """CPU seconds of a loop's first step, those of a compiler's processes that have ended with it."""
    before = os.times()
    loop.step(loop.batches[0])
    return sum(os.times()[:4]) - sum(before[:4])


def variants(config: Config, rounds: int, steps: int) -> dict[str, Any]:
    """The bare loop in float32 and otherwise: ratios of speed, and the seconds before the first step was through."""
    dataset = random_images(steps, config.optimiser.batch_size)
    plain, mixed = (with_precision(config, precision) for precision in ("32-true", "bf16-mixed"))
    loops = {
        "float32": BareLoop(plain, dataset),
        "bf16-mixed": BareLoop(mixed, dataset),
        "float32, compiled": BareLoop(plain, dataset, compiled=True),
        "bf16-mixed, compiled": BareLoop(mixed, dataset, compiled=True),
    }
    if config.model.network.kind == "conv":
        loops["float32, channels_last"] = BareLoop(plain, dataset, channels_last=True)
        loops["bf16-mixed, channels_last"] = BareLoop(mixed, dataset, channels_last=True)
    first = {name: cpu_with_children(loop) for name, loop in loops.items()}
    epochs = {name: loop.epoch for name, loop in loops.items()}
    in_turn(epochs, 1)
    costs = in_turn(epochs, rounds)
    result: dict[str, Any] = {}
    for name, found in costs.items():
        result[name] = {"first step, CPU seconds": round(first[name], 1)}
        for kind in Cost._fields:
            result[name][kind] = ratios([getattr(c, kind) for c in costs["float32"]], [getattr(c, kind) for c in found])
    return result


def with_precision(config: Config, precision: str) -> Config:
    """``config`` at that precision."""
    return config.model_copy(update={"run": config.run.model_copy(update={"precision": precision})})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", default=["mnist"])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clocked", type=int, default=4, help="rounds with a clock around every part")
    parser.add_argument("--steps", type=int, default=40, help="steps a block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", action="store_true", help="bfloat16, torch.compile, channels_last instead")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    never = ["run.checkpoint_seconds=1e9", "optimiser.skip_above=1e9"]  # random images have larger gradients
    fixed = [f"run.threads={arguments.threads}", *never, *arguments.set]
    for preset in arguments.preset:
        config = load_config(preset, fixed)
        if arguments.variants:
            result = variants(config, arguments.rounds, arguments.steps)
        else:
            result = measure(config, arguments.rounds, arguments.steps, arguments.clocked)
        print(json.dumps({"preset": preset, **result}, ensure_ascii=False, indent=2), flush=True)


if __name__ == "__main__":
    main()
