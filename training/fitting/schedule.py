"""Schedules: the learning rate, and β of the objective, as functions of the step."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer

from training.config import ObjectiveConfig


def learning_rate(
    step: int, total: int, peak: float, warmup_steps: int, schedule: Literal["constant", "cosine"] = "cosine"
) -> float:
    """The rate of ``step``, from 0, of ``total``: a linear warm-up to ``peak``, then constant or half a cosine to 0.

    Loshchilov & Hutter 2017. The cosine begins with the first step, and so lowers the end of the warm-up, too.
    """
    rate = peak * min(1.0, (step + 1) / max(1, warmup_steps))
    if schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / total))
    return rate


def set_learning_rate(optimiser: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimiser.param_groups:
        group["lr"] = rate


def annealed_beta(config: ObjectiveConfig, epoch: float) -> float:
    """β at ``epoch`` (may be fractional): from 0 to ``beta`` in the course of ``warmup_epochs``, then ``beta``.

    ``linear``: in proportion (Bowman et al. 2016). ``cyclic``: in each of ``cycles`` equal parts anew, linearly over
    the first ``ramp`` of the part and constant over the rest (Fu et al. 2019, eq. 6–7).
    """
    if epoch >= config.warmup_epochs:
        return config.beta
    progress = epoch / config.warmup_epochs
    if config.annealing == "cyclic":
        progress = min(1.0, progress * config.cycles % 1 / config.ramp)
    return config.beta * progress
