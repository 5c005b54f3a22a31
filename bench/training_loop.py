"""Images/s of the training loop against a bare PyTorch loop with the same network, in one run.

    python bench/training_loop.py [--preset mnist] [--blocks 8] [--steps 40]

Both loops train in alternating blocks, so that a drift of the machine's speed hits both; the ratio of each pair of
blocks is taken, and the median printed. The bare loop does what any tutorial does: fixed batches in memory, forward,
backward, clip, Adam. What the real loop adds is Fabric, seeding, weight averaging, skipped-update accounting, metrics.
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
    """Random 28×28 images: speed does not depend on what they show."""
    pixels = np.random.RandomState(0).randint(0, 256, (count, *SHAPE)).astype(np.uint8)
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
        bare = BareLoop(config)
        size = config.optimiser.batch_size
        batches = [dataset.pixels(np.arange(i, i + size) % len(dataset)) for i in range(arguments.steps)]
        seconds(bare.step, batches[:5])
        seconds(trainer.training_step, batches[:5])
        pairs = [
            (seconds(bare.step, batches), seconds(trainer.training_step, batches)) for _ in range(arguments.blocks)
        ]
    images = size * arguments.steps
    result = {
        "preset": arguments.preset,
        "bare images/s": round(images / statistics.median(pair[0] for pair in pairs)),
        "loop images/s": round(images / statistics.median(pair[1] for pair in pairs)),
        "loop / bare": round(statistics.median(bare / loop for bare, loop in pairs), 3),
        "extra microseconds a step": round(
            1e6 * statistics.median((loop - bare) / arguments.steps for bare, loop in pairs)
        ),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
