"""A task: inliers, and outliers that are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Outliers(NamedTuple):
    """Outliers uint8 [M,C,H,W], and where each of them is one, bool [M,H,W], if that is known."""

    images: np.ndarray
    masks: np.ndarray | None


@dataclass(frozen=True)
class Inliers:
    """What a detector is fitted on, ``train``, and unseen images of the same kind, ``held_out``; uint8 [N,C,H,W].

    ``classes`` are those of the source that it consists of, None for all.
    """

    name: str
    source: str
    classes: tuple[int, ...] | None
    train: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class Task:
    """Inliers against outliers, which are made when they are asked for; None where there are inliers only.

    ``name`` is INLIERS/OUTLIERS, ``group`` one of bench.anomaly.tasks.GROUPS.
    """

    name: str
    group: str
    inliers: Inliers
    outliers: Callable[[], Outliers] | None
