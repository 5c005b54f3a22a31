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
TOGETHER = 32  # rows


@dataclass(frozen=True)
class Seen:
    """What a monitor has seen: ranks of the window (int64 [m], oldest first), and the martingale of all rows."""

    n: int
    seen: int
    ranks: np.ndarray
    log10_value: float
    log10_maximum: float

    @property
    def p_values(self) -> np.ndarray:
        """Conformal p-values of the window, float64 [m], ties with the calibration broken at random."""
        return (1.0 + self.ranks) / (self.n + 1.0)

    def share_up_to(self, rate: float) -> float:
        """Share of the window's p-values ≤ rate; 0 where it holds none."""
        return float(np.mean(self.p_values <= rate)) if len(self.ranks) else 0.0

    @property
    def histogram(self) -> list[int]:
        """How many p-values lie in (0, 0.1], (0.1, 0.2], … (0.9, 1]."""
        # In integers, since (0.3 − 0) · 10 is not 3: p ≤ j/10 exactly when (1 + r) · 10 ≤ j (n + 1).
        tenths = ((1 + self.ranks) * BINS - 1) // (self.n + 1)
        return np.bincount(tenths, minlength=BINS).tolist()

    def judge(self, level: float) -> Finding | None:
        """Both tests, each at half the level: P(drifting) ≤ level at any one look, while the traffic is exchangeable.

        None where nothing has been seen.
        """
        if not self.seen:
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
        """One of the tests alarms."""
        return self.ks_alarm or self.martingale_alarm


def log10_alarm(level: float) -> float:
    """log10 M from which the martingale alarms: by Ville's inequality at half the level."""
    return -math.log10(level / 2)


class DriftMonitor:
    """Ranks of one score of one bundle: the last ``window`` of them, and a martingale over all. Safe between threads.

    Memory is O(n + window). Random numbers (for ties, and for the urn) come from a stream of its own: the same rows in
    the same order give the same state. Rows are taken up TOGETHER at a time, or when somebody looks: one alone costs as
    much as ten.
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
        self._seen = 0
        self._noted: list[tuple[np.ndarray, np.ndarray]] = []

    def record(self, above: np.ndarray, at_least: np.ndarray) -> None:
        """Take note of rows by the number of calibration scores > and ≥ each one's score: int64 [N] twice."""
        with self._lock:
            self._noted.append((above, at_least))
            if sum(len(rows) for rows, _ in self._noted) >= TOGETHER:
                self._take_up()

    def _take_up(self) -> None:
        """The rows that were noted, into the ring and the martingale."""
        if not self._noted:
            return
        above, at_least = (np.concatenate(part) for part in zip(*self._noted, strict=True))
        self._noted = []
        draws = self._random.random_sample((len(above), 2))
        ranks = self._break_ties(above, at_least, draws[:, 0])
        pairs = zip(ranks.tolist(), (1 - draws[:, 1]).tolist(), strict=True)
        self._martingale.bet(np.array([self._urn.p_value(rank, each) for rank, each in pairs]))
        kept = ranks[-self.window :]
        places = (self._seen + len(ranks) - len(kept) + np.arange(len(kept))) % self.window
        self._ring[places] = kept
        self._seen += len(ranks)

    def seen(self) -> Seen:
        """A copy of the state."""
        with self._lock:
            self._take_up()
            start = max(0, self._seen - self.window)
            ranks = self._ring[np.arange(start, self._seen) % self.window]
            martingale, nat = self._martingale, math.log(10)
            return Seen(self.n, self._seen, ranks, martingale.log_value / nat, martingale.log_maximum / nat)

    def _break_ties(self, above: np.ndarray, at_least: np.ndarray, own: np.ndarray) -> np.ndarray:
        ranks = above.copy()
        for row in np.flatnonzero(at_least > above):
            tied = self._tie_breakers[above[row] : at_least[row]]
            ranks[row] += np.count_nonzero(tied >= own[row])
        return ranks


@dataclass(frozen=True)
class Name:
    """Which score of which model in which version is watched, and against which group ("": all calibration images)."""

    model: str
    version: str
    score: str
    group: str


class Place(NamedTuple):
    """Where rows are noted: under which name, of the bundle with which digest, among how many calibration scores."""

    name: Name
    digest: str
    n: int


class Drift:
    """The monitors of this process. Each begins with a score's first row, and anew with another bundle in its place.

    ``worker`` is the number of this process among ``workers``, None where it serves alone. Each of them tests at
    ``level`` / ``workers``: by the union bound the probability that any of them alarms falsely is then at most the
    level, at one look at all of them, and for the martingales ever. A worker that takes the place of another has
    monitors that begin anew, and may alarm falsely with that probability anew.
    """

    def __init__(self, window: int, level: float, workers: int = 1, worker: int | None = None) -> None:
        self.window = window
        self.level = level / workers
        self.worker = worker
        self._lock = threading.Lock()
        self._monitors: dict[Name, tuple[str, DriftMonitor]] = {}

    def note(self, place: Place, above: np.ndarray, at_least: np.ndarray) -> None:
        """Take note of rows by the number of calibration scores > and ≥ each one's score: int64 [N] twice."""
        self._monitor(place).record(above, at_least)

    def seen(self, place: Place) -> Seen:
        """What was seen there: nothing, if it was of another bundle."""
        with self._lock:
            digest, monitor = self._monitors.get(place.name, ("", None))
        if monitor is None or digest != place.digest:
            return Seen(place.n, 0, np.empty(0, np.int64), 0.0, 0.0)
        return monitor.seen()

    def __iter__(self) -> Iterator[tuple[Name, Seen]]:
        with self._lock:
            monitors = [(name, monitor) for name, (_, monitor) in self._monitors.items()]
        yield from ((name, monitor.seen()) for name, monitor in monitors)

    def _monitor(self, place: Place) -> DriftMonitor:
        with self._lock:
            digest, monitor = self._monitors.get(place.name, ("", None))
            if monitor is None or digest != place.digest:
                monitor = DriftMonitor(place.n, self.window)
                self._monitors[place.name] = place.digest, monitor
            return monitor
