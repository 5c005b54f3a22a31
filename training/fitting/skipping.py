"""Which updates a run skips: those of gradients that are not finite, or far larger than its recent ones.

A limit in absolute numbers cannot serve: the norm of a sane gradient grows with the image, with the share of it that
is constant, and with the precision that the decoder reaches, by orders of magnitude within one training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

from training.errors import TrainingDiverged

RECENT = 64
"""Finite norms, of skipped updates as well, that an update is held against: whatever the norms become, they are their
own measure after half as many steps."""
WARM_UP = 20
"""Norms from which on a median says what is usual."""
OUTLIER = 30.0
"""A finite gradient is skipped above so many times the median of the recent norms."""
MAX_SKIPPED_IN_A_ROW = 100
"""So many updates skipped one after the other mean that the run has diverged."""


@dataclass
class Skipping:
    """Counts of the updates that a run has skipped, and the newest finite norms of its gradients."""

    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_norms: list[float] = field(default_factory=list)

    def admits(self, norm: float, limit: float | None) -> bool:
        """Whether an update of that gradient norm is made; it is remembered, and counted if not.

        ``limit`` is the user's. Raises TrainingDiverged: MAX_SKIPPED_IN_A_ROW were not, one after the other.
        """
        sane = is_sane(norm, self.recent_norms, limit)
        remember(norm, self.recent_norms)
        if sane:
            self.skipped_in_a_row = 0
            return True
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(_diverged(norm, limit))
        return False


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


def _diverged(norm: float, limit: float | None) -> str:
    """The error's text: the norm, the limit, and what to do."""
    text = f"{MAX_SKIPPED_IN_A_ROW} updates in a row were skipped: the last gradient's norm is {norm:.3g}"
    if limit is None or not math.isfinite(norm):
        return f"{text}; lower optimiser.learning_rate"
    return (
        f"{text}, at most {limit:.3g} expected; lower optimiser.learning_rate, or leave optimiser.skip_above unset "
        "if the norm was sane from the start"
    )
