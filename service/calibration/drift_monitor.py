"""Have the inputs moved away from the calibration set? Recent conformal p-values, compared with uniformity.

Every calibrated score that a request computes leaves its rank among the calibration scores here, whatever
false-positive rate the request asked for: one ``DriftMonitor`` for each served bundle, score and group of the
calibration that rows are held against. Where several workers serve, each has monitors of its own, of the rows that it
has answered itself, from its start to its end.

What an alarm means: these rows are not exchangeable with the calibration images. That is a fact about the traffic, and
the same image sent a thousand times over is such traffic too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from service.calibration.exchangeability import Martingale, Urn, ks_two_sample

BINS = 10
MAX_WAITING = 32  # rows that wait to be evaluated together, since one alone takes as long as ten


@dataclass(frozen=True)
class MonitorState:
    """What a monitor has recorded: ``count`` rows, ranks of the window, and the martingale of all rows.

    ``ranks``: int64 [m], oldest first, among ``n`` calibration scores.
    """

    n: int
    count: int
    ranks: np.ndarray
    log10_value: float
    log10_maximum: float

    @property
    def p_values(self) -> np.ndarray:
        """Conformal p-values of the window, float64 [m], ties with the calibration broken at random."""
        return (1.0 + self.ranks) / (self.n + 1.0)

    def share_up_to(self, rate: float) -> float:
        """Share of the window's p-values ≤ rate; at least one row must have been recorded."""
        return float(np.mean(self.p_values <= rate))

    @property
    def histogram(self) -> list[int]:
        """How many p-values lie in (0, 0.1], (0.1, 0.2], … (0.9, 1]."""
        # In integers, since (0.3 − 0) · 10 is not 3: p ≤ j/10 exactly when (1 + r) · 10 ≤ j (n + 1).
        tenths = ((1 + self.ranks) * BINS - 1) // (self.n + 1)
        return np.bincount(tenths, minlength=BINS).tolist()

    def judge(self, level: float) -> Finding | None:
        """Both tests, each at half the level: P(drifting) ≤ level at any one look, while the traffic is exchangeable.

        None where no row has been recorded.
        """
        if not self.count:
            return None
        statistic, p_value = ks_two_sample(self.ranks, self.n)
        return Finding(statistic, p_value, p_value <= level / 2, self.log10_value >= log10_alarm(level))


@dataclass(frozen=True)
class Finding:
    """What the tests say of a window that is not empty; ``martingale_alarm`` is about its value now."""

    ks_statistic: float
    ks_p_value: float
    ks_alarm: bool
    martingale_alarm: bool

    @property
    def drifting(self) -> bool:
        """True if one of the tests alarms."""
        return self.ks_alarm or self.martingale_alarm


def log10_alarm(level: float) -> float:
    """Return log10 M from which the martingale alarms, by Ville's inequality at half the level."""
    return -math.log10(level / 2)


class DriftMonitor:
    """Ranks of one score of one bundle: the last ``window`` of them, and a martingale over all. Safe between threads.

    Memory is O(n + window). Random numbers (for ties, and for the urn) come from a stream of its own: the same rows in
    the same order give the same state. Rows are evaluated MAX_WAITING at a time, or when the state is read.
    """

    def __init__(self, n: int, window: int) -> None:
        self.n = n
        self.window = window
        self._lock = threading.Lock()
        self._random = np.random.RandomState(0)
        # A tie is broken by a number of each of the two scores, so that ranks with ties follow the urn as well.
        self._tie_breakers = self._random.random_sample(n)
        self._urn = Urn(n)
        self._martingale = Martingale()
        self._ring = np.zeros(window, np.int64)
        self._count = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def record(self, above: np.ndarray, at_least: np.ndarray) -> None:
        """Record rows by the number of calibration scores > and ≥ each one's score, int64 [N] twice."""
        with self._lock:
            self._waiting.append((above, at_least))
            if sum(len(rows) for rows, _ in self._waiting) >= MAX_WAITING:
                self._evaluate()

    def _evaluate(self) -> None:
        """Put the ranks of the rows that wait into the ring and the martingale."""
        if not self._waiting:
            return
        above, at_least = (np.concatenate(part) for part in zip(*self._waiting, strict=True))
        self._waiting = []
        draws = self._random.random_sample((len(above), 2))
        ranks = self._break_ties(above, at_least, draws[:, 0])
        pairs = zip(ranks.tolist(), (1 - draws[:, 1]).tolist(), strict=True)
        self._martingale.bet(np.array([self._urn.p_value(rank, draw) for rank, draw in pairs]))
        kept = ranks[-self.window :]
        slots = (self._count + len(ranks) - len(kept) + np.arange(len(kept))) % self.window
        self._ring[slots] = kept
        self._count += len(ranks)

    def state(self) -> MonitorState:
        """Return a copy of the state."""
        with self._lock:
            self._evaluate()
            start = max(0, self._count - self.window)
            ranks = self._ring[np.arange(start, self._count) % self.window]
            martingale, nat = self._martingale, math.log(10)
            return MonitorState(self.n, self._count, ranks, martingale.log_value / nat, martingale.log_maximum / nat)

    def _break_ties(self, above: np.ndarray, at_least: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return the ranks, int64 [N], ties broken by ``own``, a random number of each row."""
        ranks = above.copy()
        for row in np.flatnonzero(at_least > above):
            tied = self._tie_breakers[above[row] : at_least[row]]
            ranks[row] += np.count_nonzero(tied >= own[row])
        return ranks


@dataclass(frozen=True)
class MonitorName:
    """The score of a model that is watched, and the group of the calibration that it is compared with ("": all)."""

    model: str
    version: str
    score: str
    group: str


class MonitorKey(NamedTuple):
    """The monitor that records rows: its name, and its number ``n`` of calibration scores."""

    name: MonitorName
    n: int


class Drift:
    """The monitors of this process. Each begins with a score's first row.

    ``worker`` is the number of this process among ``workers``, None where it serves alone. Each of them tests at
    ``level`` / ``workers``: by the union bound the probability that any of them alarms falsely is then at most the
    level, at one look at all of them, and for the martingales ever. A worker that replaces another has monitors that
    begin anew, and may alarm falsely with that probability anew.
    """

    def __init__(self, window: int, level: float, workers: int = 1, worker: int | None = None) -> None:
        self.window = window
        self.level = level / workers
        self.worker = worker
        self._lock = threading.Lock()
        self._monitors: dict[MonitorName, DriftMonitor] = {}

    def record(self, key: MonitorKey, above: np.ndarray, at_least: np.ndarray) -> None:
        """Record rows by the number of calibration scores > and ≥ each one's score, int64 [N] twice."""
        self._monitor(key).record(above, at_least)

    def state(self, key: MonitorKey) -> MonitorState:
        """Return the state of that monitor, which is empty if it has recorded nothing."""
        with self._lock:
            monitor = self._monitors.get(key.name)
        if monitor is None:
            return MonitorState(key.n, 0, np.empty(0, np.int64), 0.0, 0.0)
        return monitor.state()

    def __iter__(self) -> Iterator[tuple[MonitorName, MonitorState]]:
        with self._lock:
            monitors = list(self._monitors.items())
        yield from ((name, monitor.state()) for name, monitor in monitors)

    def _monitor(self, key: MonitorKey) -> DriftMonitor:
        """Return the monitor of that key, a new one if there is none yet."""
        with self._lock:
            if key.name not in self._monitors:
                self._monitors[key.name] = DriftMonitor(key.n, self.window)
            return self._monitors[key.name]
