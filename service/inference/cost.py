"""What a row of a model costs, as this machine was measured to compute it, so that long work is refused beforehand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

MIN_SAMPLES = 64  # of a run that is learnt from: the interpreter's share of fewer would count as the model's
SHORT_SECONDS = 0.1  # a work that is over sooner is timed twice, since the first time fills caches


@dataclass
class Cost:
    """Seconds that a model takes, as measured: ``row`` of the backbone, ``sample`` of one posterior sample of a row.

    ``sample`` is the least that was measured, at the start and of every larger run since: what other work slows down
    does not raise an estimate. It is infinite, and no estimate is made, before the first measurement.
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
    """Return the seconds that the work takes; the less of two times, where the first is short."""
    seconds = math.inf
    for _ in range(2):
        started = time.perf_counter()
        work()
        seconds = min(seconds, time.perf_counter() - started)
        if seconds > SHORT_SECONDS:
            break
    return seconds
