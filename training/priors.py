"""Priors p(z)."""

from __future__ import annotations

from torch import Tensor

from training.posteriors import HALF_LOG_2PI


def log_standard_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) for each element, in nats."""
    return -0.5 * z**2 - HALF_LOG_2PI
