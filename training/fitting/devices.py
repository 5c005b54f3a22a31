"""What a training computes with: devices, precision and processes, which are Lightning Fabric's, and CPU threads.

Torch takes every core. OpenMP's threads wait for each other after each operation and spin while they do, so one other
busy process on the machine costs a training of small networks most of its speed, and on a free one they gain little.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision

from service.resources import available_cpus
from training.config import Config
from training.models.registry import FAMILIES


def set_threads(config: Config) -> None:
    """Let torch compute with the threads that ``run.threads`` says, else OMP_NUM_THREADS, else ``chosen``."""
    if config.run.threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(config.run.threads or chosen(config, available_cpus()))


def chosen(config: Config, cpus: int) -> int:
    """One thread for fully connected networks; else half of the cores (at least one), shared by the processes."""
    model = FAMILIES[config.model.family]
    convolutions = model.convolutional or config.model.network.kind == "conv"
    if not (model.closed_form or convolutions):
        return 1
    return max(1, cpus // 2 // config.run.devices)


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


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed what draws on the device; torch.manual_seed asks every backend there is, a fortieth of a step here."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
