"""Which updates a run leaves out: gradients that are not finite, and those far from the run's own recent ones.

A limit in absolute numbers cannot serve: the norm of a sane gradient grows with the image, with the share of it that
is constant, and with the precision that the decoder reaches, by orders of magnitude within one training.
"""

from __future__ import annotations

import math
from statistics import median

RECENT = 64
"""Finite norms, of skipped updates as well, that an update is held against: whatever the norms become, they are their
own measure after half as many steps."""
WARM_UP = 20
"""Norms from which on a median says what is usual."""
OUTLIER = 30.0
"""A finite gradient is skipped above so many times the median of the recent norms."""


def is_sane(norm: float, recent: list[float], limit: float | None) -> bool:
    """Whether an update of that gradient norm is made, after those ``recent`` finite norms; ``limit`` is the user's."""
    if not math.isfinite(norm) or (limit is not None and norm > limit):
        return False
    return len(recent) < WARM_UP or norm <= OUTLIER * median(recent)


def remember(norm: float, recent: list[float]) -> None:
    """Append a finite norm to ``recent``, of which the newest are kept."""
    if math.isfinite(norm):
        recent.append(norm)
        del recent[:-RECENT]
