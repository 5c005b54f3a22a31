"""Images/s of the training loop against a bare PyTorch loop with the same network, in one run.

    python bench/training_loop.py [--preset mnist] [--blocks 8] [--steps 40]

Both loops train in alternating blocks, so that a drift of the machine's speed hits both; the ratio of each pair of
blocks is taken, and the median printed. The bare loop does what any tutorial does: fixed batches in memory, forward,
backward, clip, Adam. The fabric loop is the same through Lightning Fabric: the difference is the library's cost. What
the real loop adds on top is seeding, weight averaging, skipped-update accounting, metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from service.bundle import Preprocessing
from training.batches import to_unit
from training.config import Config, load_config
from training.data.dataset import Dataset
from training.fit import Trainer, make_fabric
from training.models.vae import VAE
from training.objectives import objective

SHAPE = (1, 28, 28)


def random_images(count: int = 4096) -> Dataset:
    """Random grey 28×28 images: speed does not depend on what they show, and mild ones upset no likelihood."""
    pixels = np.random.RandomState(0).randint(96, 160, (count, *SHAPE)).astype(np.uint8)
    every = np.arange(count)
    splits = dict.fromkeys(("train", "validation", "calibration", "test"), every)
    rule = Preprocessing(mode="L", height=28, width=28)
    return Dataset("random", rule, splits, None, None, "0" * 64, [], pixels.dtype, pixels)


class BareLoop:
    """The loop that a tutorial would write, at the same precision."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        self.config = config
        self.model = VAE(SHAPE, config.model)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), 1e-3, fused=True)

    def step(self, pixels: np.ndarray) -> None:
        """One update."""
        x = to_unit(pixels)
        noise = torch.randn(len(x), self.config.objective.samples, self.model.noise_dim)
        dither = torch.rand_like(x) if self.model.likelihood.dither else None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.run.precision == "bf16-mixed"):
            terms = self.model(x, noise, dither, self.config.objective.kind == "dreg")
        self.optimiser.zero_grad()
        (-objective(terms, self.config.objective, 1.0)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimiser.gradient_clip)
        self.optimiser.step()


class FabricLoop(BareLoop):
    """The bare loop through Lightning Fabric, and nothing else."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.fabric = make_fabric(config)
        self.wrapped, self.optimiser = self.fabric.setup(self.model, self.optimiser)

    def step(self, pixels: np.ndarray) -> None:
        """One update."""
        x = self.fabric.to_device(to_unit(pixels))
        noise = torch.randn(len(x), self.config.objective.samples, self.model.noise_dim)
        dither = torch.rand_like(x) if self.model.likelihood.dither else None
        terms = self.wrapped(x, noise, dither, self.config.objective.kind == "dreg")
        self.optimiser.zero_grad()
        self.fabric.backward(-objective(terms, self.config.objective, 1.0))
        self.fabric.clip_gradients(self.wrapped, self.optimiser, max_norm=self.config.optimiser.gradient_clip)
        self.optimiser.step()


def seconds(step: object, batches: list[np.ndarray]) -> float:
    """Wall time of one block."""
    started = time.perf_counter()
    for pixels in batches:
        step(pixels)  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="mnist")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    config = load_config(arguments.preset, [f"run.threads={arguments.threads}"])
    dataset = random_images()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, dataset, Path(folder), make_fabric(config))
        steps = {"bare": BareLoop(config).step, "fabric": FabricLoop(config).step, "loop": trainer.training_step}
        size = config.optimiser.batch_size
        batches = [dataset.pixels(np.arange(i, i + size) % len(dataset)) for i in range(arguments.steps)]
        for step in steps.values():
            seconds(step, batches[:5])
        blocks = [{name: seconds(step, batches) for name, step in steps.items()} for _ in range(arguments.blocks)]
    result: dict[str, float | str] = {"preset": arguments.preset}
    for name in steps:
        median = statistics.median(block[name] for block in blocks)
        result[f"{name}: images/s"] = round(size * arguments.steps / median)
    for name in ("fabric", "loop"):
        result[f"{name} / bare"] = round(statistics.median(block["bare"] / block[name] for block in blocks), 3)
        extra = statistics.median(block[name] - block["bare"] for block in blocks) / arguments.steps
        result[f"{name}: extra microseconds a step"] = round(1e6 * extra)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
