"""What a row of a model costs, as this machine was measured to compute it, so that long work is refused beforehand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

MIN_SAMPLES = 64  # of a run that is learnt from: the interpreter's share of fewer would count as the model's
TIMED_SECONDS = 0.02  # that a measurement takes at least


@dataclass
class Cost:
    """CPU seconds of a thread that a model was measured to take: ``row`` of its backbone, ``sample`` of one of k.

    ``sample`` is of one posterior sample of one row, the least of the start and of every larger run since, so that what
    slows the machine down raises no estimate. It is infinite, and nothing is estimated, before the first measurement.
    """

    row: float = 0.0
    sample: float = math.inf

    def learn(self, samples: int, seconds: float) -> None:
        """Take a run of so many samples, over all of its rows, for a measurement unless it was small."""
        if samples >= MIN_SAMPLES:
            self.sample = min(self.sample, seconds / samples)

    def estimate(self, rows: int, samples: int) -> float:
        """Return the seconds of ``rows`` rows with ``samples`` posterior samples each; 0 of what was never measured."""
        return rows * (self.row + (0.0 if math.isinf(self.sample) else samples * self.sample))


def timed(work: Callable[[], object]) -> float:
    """Return the least CPU seconds that the work takes this thread, once it has run: the first tries batch sizes, too.

    It is repeated until TIMED_SECONDS are over. Time in which the thread waits for a CPU does not count.
    """
    work()
    least, total = math.inf, 0.0
    while total < TIMED_SECONDS:
        started = time.thread_time()
        work()
        seconds = time.thread_time() - started
        least, total = min(least, seconds), total + seconds
    return least
