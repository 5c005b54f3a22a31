"""How many CPU threads torch computes with, where ``run.threads`` leaves it open.

Torch takes every core. OpenMP's threads wait for each other after each operation and spin while they do, so one other
busy process on the machine costs a training of small networks most of its speed, and on a free one they gain little.
"""

from __future__ import annotations

import os

import torch

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
