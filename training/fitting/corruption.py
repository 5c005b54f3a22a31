"""A network that classifies each pixel of an image, painted over with noise or not: the score ``corruption``.

    log odds   t(x)_i = log p(painted at i | x) / p(not painted at i | x), i a pixel

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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from training.config import Config, CorruptionConfig
from training.data.batches import derived_seed, epoch_batches, pixel_batches, steps_per_epoch, to_unit
from training.data.dataset import Dataset
from training.errors import CheckpointError, ConfigError
from training.fitting.averaging import MovingAverage
from training.fitting.checkpoint import check_identity, digest_of, read_content, write_content
from training.fitting.devices import seed_generators
from training.fitting.loop import Interrupt, Loop, Progress
from training.fitting.painting import Painted, painted
from training.fitting.schedule import learning_rate, set_learning_rate
from training.nn.unet import UNet

FILE = "corruption.pt"
TOGETHER = 12  # rows of a batch that are painted by noise of one scale
CLIP = 1.0  # of the gradient's norm
WARM_UP = 100  # steps
HALF_AT = 10  # updates after which the moving average keeps half of itself
VALIDATED = 2000  # images that the cross-entropy is measured on, at most


@dataclass
class State(Progress):
    """Where the training stands; ``cross_entropy``: of the validation split, once there is one."""

    cross_entropy: float = math.nan


class CorruptionTraining:
    """The network's training as the loop advances it, new or as its checkpoint has it.

    One process trains it, on ``fabric``'s device and at its precision: it is small. ``commit``: of the source tree,
    kept as a fact of a training that begins. Raises CheckpointError: of another configuration, or of other data.
    """

    def __init__(
        self, config: Config, dataset: Dataset, folder: Path, fabric: Fabric, commit: str | None = None
    ) -> None:
        self.config, self.dataset, self.fabric, self.commit = config, dataset, fabric, commit
        self.options, self.path, self.state = asked_for(config), folder / FILE, State()
        torch.manual_seed(derived_seed(config.seed, "corruption weights"))
        self.network = build_corruption(dataset, self.options).to(fabric.device)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = torch.optim.AdamW(self.network.parameters(), self.options.learning_rate, fused=True)
        self.average = MovingAverage(self.network, self.options.ema_decay, HALF_AT)
        self.steps_per_epoch = steps_per_epoch(len(dataset.splits["train"]), self.options.batch_size)
        self.total_steps = self.steps_per_epoch * self.options.epochs
        content = load_corruption(folder, config, dataset)
        self.resumed = content is not None
        if content is not None:
            self._restore(content)

    def run(self, progress: Callable[[int], None]) -> None:
        """The steps that are left; ``progress`` is told of each. Raises KeyboardInterrupt."""
        with Interrupt() as interrupt:
            Loop(self, self.config.run.checkpoint_seconds, interrupt, lambda rows_per_second: progress(1)).run()

    def batches(self, epoch: int, first: int) -> Iterator[np.ndarray]:
        """Pixels [B,C,H,W] of the batches of ``epoch``, both counted from 0, from the ``first`` on."""
        indices, seed = self.dataset.splits["train"], derived_seed(self.config.seed, "corruption")
        return self.dataset.batches(epoch_batches(indices, self.options.batch_size, seed, epoch)[first:])

    def step(self, pixels: np.ndarray) -> None:
        """One update from a batch of pixels [B,C,H,W]; what is drawn is a function of seed and step alone."""
        state, device = self.state, self.fabric.device
        seed_generators(device, derived_seed(self.config.seed, "corruption step", state.step))
        rate = learning_rate(state.step, self.total_steps, self.options.learning_rate, WARM_UP)
        set_learning_rate(self.optimiser, rate)
        noisy = painted_batch(self.fabric.to_device(to_unit(pixels)))
        with self.fabric.autocast():
            log_odds = self.network(noisy.x.contiguous(memory_format=torch.channels_last))
        self.optimiser.zero_grad()
        cross_entropy(log_odds, noisy.mask).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimiser.step()
        state.step += 1
        self.average.update(state.step)

    def end_epoch(self, epoch: int, rows_per_second: float) -> None:
        """Do nothing: the cross-entropy is measured at the end."""

    def finish(self) -> None:
        """Measure the cross-entropy on the validation split."""
        self.state.cross_entropy = self.validate()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean cross-entropy of a place, nats, over validation images painted as the seed has it."""
        torch.manual_seed(derived_seed(self.config.seed, "corruption validation"))
        indices = self.dataset.splits["validation"][:VALIDATED]
        batches = [indices[i : i + self.options.batch_size] for i in range(0, len(indices), self.options.batch_size)]
        network, total = self.average.averaged.eval(), 0.0
        for x in pixel_batches(self.dataset, batches):
            noisy = painted_batch(self.fabric.to_device(x))
            total += float(cross_entropy(network(noisy.x), noisy.mask)) * len(x)
        return total / max(1, len(indices))

    def save(self) -> None:
        """Write the checkpoint."""
        content = {
            "identity": identity(self.config, self.dataset),
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "weights": {name: value.cpu() for name, value in self.average.averaged.state_dict().items()},
            "optimiser": self.optimiser.state_dict(),
            "commit": self.commit,
            **asdict(self.state),
        }
        write_content(self.path, content)

    def _restore(self, content: dict[str, Any]) -> None:
        """Go on from a checkpoint's content."""
        self.network.load_state_dict(content["network"])
        self.average.load_state_dict(content["average"])
        self.optimiser.load_state_dict(content["optimiser"])
        names = ("step", "seconds", "finished", "cross_entropy")
        self.state, self.commit = State(**{name: content[name] for name in names}), content["commit"]


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


def build_corruption(dataset: Dataset, options: CorruptionConfig) -> UNet:
    """An untrained network for the data's images."""
    return UNet(dataset.preprocessing.shape, options.width)


def fitted_corruption(folder: Path, config: Config, dataset: Dataset) -> UNet:
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
    check_identity(path, content.get("identity"), identity(config, dataset), "remove it")
    return content


def _finished(folder: Path, config: Config, dataset: Dataset) -> dict[str, Any]:
    """Content of the checkpoint of a training that has ended. Raises CheckpointError where there is none."""
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
