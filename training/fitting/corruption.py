"""A network that tells at each place of an image whether noise was painted over it: the score ``corruption``.

    log odds   t(x)_i = log p(painted at i | x) / p(not painted at i | x)

It is fitted by classification: cross-entropy, at every place, of training images that were painted over by
fitting.painting. With enough of everything t is the log ratio of two densities, of images painted at i and of images
that are not, up to the log of how often there is paint (noise-contrastive estimation, Gutmann & Hyvärinen 2010,
AISTATS; Sugiyama et al. 2012, "Density ratio estimation"). As a detector of anomalies and their places: Zavrtanik et
al. 2021 (DRAEM, arXiv:2108.07610). It sees inliers and noise, no outlier and no label.

A latent variable model judges an image by its own reconstruction, which a small stain hardly moves; this network
compares each place with what surrounds it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from training.config import Config, CorruptionConfig
from training.data.batches import derived_seed, epoch_batches, pixel_batches, steps_per_epoch, to_unit
from training.data.dataset import Dataset
from training.errors import CheckpointError, ConfigError
from training.fitting.checkpoint import digest_of, read_content, write_content
from training.fitting.interrupts import Interrupt
from training.fitting.painting import Painted, painted
from training.nn.networks import Shape

FILE = "corruption.pt"
PATCH = 2  # places in each direction that are one at the network's finest level
LEVELS = 3
GROUPS = 8
TOGETHER = 12  # rows of a batch that are painted by noise of one scale
CLIP = 1.0  # of the gradient's norm
WARM_UP = 100  # steps
VALIDATED = 2000  # images that the cross-entropy is measured on, at most

Progress = Callable[[int], None]


class CorruptionNetwork(nn.Module):
    """x, float32 [N,C,H,W] in [0, 1] -> log odds, float32 [N,H,W].

    A U-Net (Ronneberger et al. 2015) of three levels, the finest at half the image's size, where numbers are patches
    of 2×2 pixels. Images are continued at two edges to a multiple of 8.
    """

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.size = shape[1:]
        self.stem = _convolution(shape[0] * PATCH**2, width)
        self.fine = Residual(width, width)
        self.middle = Residual(width, 2 * width)
        self.coarse = Residual(2 * width, 2 * width)
        self.middle_up = Residual(4 * width, 2 * width)
        self.fine_up = Residual(3 * width, width)
        self.head = nn.Conv2d(width, PATCH**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        multiple = PATCH * 2 ** (LEVELS - 1)
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        fine = self.fine(self.stem(F.pixel_unshuffle(x, PATCH)))
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.middle_up(torch.cat([middle, F.interpolate(coarse, scale_factor=2.0)], dim=1))
        fine = self.fine_up(torch.cat([fine, F.interpolate(middle, scale_factor=2.0)], dim=1))
        log_odds: Tensor = F.pixel_shuffle(self.head(fine), PATCH)[:, 0, :height, :width]
        return log_odds


class Residual(nn.Module):
    """Two normalised 3×3 convolutions, the second added to what it is given: [N,inputs,h,w] -> [N,outputs,h,w]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(inputs, outputs), _convolution(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.second(x)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(GROUPS, outputs), nn.SiLU())


class CorruptionTrainer:
    """The network, its optimiser and moving average, and the steps that advance them.

    One process trains it, on ``fabric``'s device and at its precision: it is small. ``commit``: of the source tree,
    kept as a fact of a training that begins.
    """

    def __init__(
        self, config: Config, dataset: Dataset, folder: Path, fabric: Fabric, commit: str | None = None
    ) -> None:
        self.config, self.dataset, self.folder, self.fabric = config, dataset, folder, fabric
        self.options = asked_for(config)
        torch.manual_seed(derived_seed(config.seed, "corruption weights"))
        self.network = build_corruption(dataset, self.options).to(fabric.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = torch.optim.AdamW(self.network.parameters(), self.options.learning_rate, fused=True)
        self.average = AveragedModel(self.network, multi_avg_fn=self._blend)
        self.step, self.seconds, self.finished = 0, 0.0, False
        self.cross_entropy = math.nan
        self.commit = commit
        self.steps_per_epoch = steps_per_epoch(len(dataset.splits["train"]), self.options.batch_size)
        self.total_steps = self.steps_per_epoch * self.options.epochs
        self._saved = time.perf_counter()

    def resume(self) -> bool:
        """Load the checkpoint, if there is one. Raises CheckpointError: of another configuration, or of other data."""
        content = load_corruption(self.folder, self.config, self.dataset)
        if content is None:
            return False
        self.network.load_state_dict(content["network"])
        self.average.load_state_dict(content["average"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.step, self.seconds, self.finished = content["step"], content["seconds"], content["finished"]
        self.cross_entropy, self.commit = content["cross_entropy"], content["commit"]
        return True

    @property
    def standing(self) -> str:
        """Where a resumed training stands, in words."""
        done = self.step // self.steps_per_epoch
        return f"done before, {self.folder / FILE}" if self.finished else f"goes on from epoch {done + 1}"

    def save(self) -> None:
        """Write a checkpoint: a crash leaves the old one or the new one."""
        self._saved = time.perf_counter()
        content = {
            "identity": identity(self.config, self.dataset),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "weights": {name: value.cpu() for name, value in self.average.module.state_dict().items()},
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "finished": self.finished,
            "cross_entropy": self.cross_entropy,
            "commit": self.commit,
        }
        write_content(self.folder / FILE, content)

    def run(self, interrupt: Interrupt, progress: Progress) -> None:
        """The steps that are left, of which ``progress`` is told, then the cross-entropy on the validation split."""
        if self.finished:
            return
        progress(self.step)
        while self.step < self.total_steps:
            epoch, offset = divmod(self.step, self.steps_per_epoch)
            batches = epoch_batches(
                self.dataset.splits["train"],
                self.options.batch_size,
                derived_seed(self.config.seed, "corruption"),
                epoch,
            )[offset:]
            for pixels in self.dataset.batches(batches):
                started = time.perf_counter()
                self.training_step(to_unit(pixels))
                self.seconds += time.perf_counter() - started
                progress(1)
                self._pause(interrupt)
        self.cross_entropy = self.validate()
        self.finished = True
        self.save()

    def training_step(self, x: Tensor) -> None:
        """One update from images x, float32 [B,C,H,W]; what is drawn is a function of seed and step alone."""
        torch.manual_seed(derived_seed(self.config.seed, "corruption step", self.step))
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate()
        found = painted_batch(self.fabric.to_device(x))
        with self.fabric.autocast():
            log_odds = self.network(found.x.contiguous(memory_format=torch.channels_last))
        self.optimiser.zero_grad()
        cross_entropy(log_odds, found.mask).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimiser.step()
        self.step += 1
        self.average.update_parameters(self.network)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross-entropy of a place, nats, over validation images painted as the seed has it."""
        torch.manual_seed(derived_seed(self.config.seed, "corruption validation"))
        indices = self.dataset.splits["validation"][:VALIDATED]
        batches = [indices[i : i + self.options.batch_size] for i in range(0, len(indices), self.options.batch_size)]
        network, total = self.average.module.eval(), 0.0
        for x in pixel_batches(self.dataset, batches):
            found = painted_batch(self.fabric.to_device(x))
            total += float(cross_entropy(network(found.x), found.mask)) * len(x)
        return total / max(1, len(indices))

    def _learning_rate(self) -> float:
        """A linear warm-up, then half a cosine to 0."""
        rate = self.options.learning_rate * min(1.0, (self.step + 1) / WARM_UP)
        return rate * 0.5 * (1 + math.cos(math.pi * self.step / self.total_steps))

    @torch.no_grad()
    def _blend(self, averaged: Any, current: Any, count: Tensor | int) -> None:
        decay = min(self.options.ema_decay, self.step / (10 + self.step))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def _pause(self, interrupt: Interrupt) -> None:
        if interrupt.requested or time.perf_counter() - self._saved > self.config.run.checkpoint_seconds:
            self.save()
        interrupt.check()


def painted_batch(x: Tensor) -> Painted:
    """A batch painted over, a few rows at a time: each few have noise of another scale."""
    parts = [painted(part) for part in x.split(TOGETHER)]
    return Painted(torch.cat([part.x for part in parts]), torch.cat([part.mask for part in parts]))


def cross_entropy(log_odds: Tensor, mask: Tensor) -> Tensor:
    """Mean over places of −log p(mask | x), nats; both [N,H,W]."""
    return F.binary_cross_entropy_with_logits(log_odds.float(), mask)


def asked_for(config: Config) -> CorruptionConfig:
    """The section ``corruption``. Raises ConfigError where there is none."""
    if config.corruption is None:
        raise ConfigError("the configuration has no section corruption: --set corruption.epochs=20, say")
    return config.corruption


def check_corruption(config: Config, dataset: Dataset) -> None:
    """Raise ConfigError where the section ``corruption`` is asked for of rows that it is not for."""
    if config.corruption is not None and (config.backbone is not None or dataset.preprocessing.kind != "image"):
        kind = "features" if config.backbone is not None else f"{dataset.preprocessing.kind}s"
        raise ConfigError(f"section corruption: noise is painted over images, and the model is of {kind}")


def build_corruption(dataset: Dataset, options: CorruptionConfig) -> CorruptionNetwork:
    """An untrained network for the data's images."""
    return CorruptionNetwork(dataset.preprocessing.shape, options.width)


def fitted_corruption(folder: Path, config: Config, dataset: Dataset) -> CorruptionNetwork:
    """The averaged weights in half precision, in eval mode on the CPU: the half is what a bundle has room for.

    Raises CheckpointError if they are not there.
    """
    content = _finished(folder, config, dataset)
    network = build_corruption(dataset, asked_for(config))
    network.load_state_dict({name: value.half().float() for name, value in content["weights"].items()})
    return network.eval()


def load_corruption(folder: Path, config: Config, dataset: Dataset) -> dict[str, Any] | None:
    """Content of the checkpoint, None where there is none. Raises CheckpointError: unreadable, or of another run."""
    path = folder / FILE
    if not path.is_file():
        return None
    content = read_content(path)
    if content.get("identity") != identity(config, dataset):
        raise CheckpointError(
            f"{path} was made with another section corruption, seed or data: remove it, or use another --run-dir"
        )
    return content


def _finished(folder: Path, config: Config, dataset: Dataset) -> dict[str, Any]:
    """As ``load_corruption``, of a training that has come to its end. Raises CheckpointError where there is none."""
    content = load_corruption(folder, config, dataset)
    if content is None or not content["finished"]:
        raise CheckpointError(f"{folder} holds no finished {FILE}: go on with `vaetrain fit`")
    return content


def identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What must not change between a training and its resume."""
    return {"corruption": asked_for(config).model_dump(), "seed": config.seed, "data": dataset.fingerprint}


def describe_corruption(folder: Path, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Facts of the finished training, for the manifest's provenance. Raises CheckpointError."""
    content = _finished(folder, config, dataset)
    return {
        "epochs": asked_for(config).epochs,
        "steps": content["step"],
        "seconds": round(content["seconds"], 1),
        "cross_entropy": content["cross_entropy"],
        "commit": content["commit"],
        "weights_sha256": digest_of(content["weights"]),
    }
