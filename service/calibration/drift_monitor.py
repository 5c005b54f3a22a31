"""Have the inputs moved away from the calibration set? Recent conformal p-values, compared with uniformity.

Every calibrated score that a request computes leaves its rank among the calibration scores here, whatever
false-positive rate the request asked for: one ``Watch`` for each served bundle, score and group of the calibration
that rows are held against. One process keeps them itself (``Drift``). Several tell one keeper, the supervisor, since
shares of the traffic that were tested apart could not be added up: service/server/shared_drift.py.

What an alarm means: these rows are not exchangeable with the calibration images. That is a fact about the traffic, and
the same image sent a thousand times over is such traffic too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from service.calibration.exchangeability import Martingale, Urn, ks_two_sample

BINS = 10
TOGETHER = 32  # rows


@dataclass(frozen=True)
class Seen:
    """What a watch has seen: ranks of the window (int64 [m], oldest first), and the martingale of the whole stream."""

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
        """Share of the window's p-values ≤ rate, where it holds any."""
        return float(np.mean(self.p_values <= rate))

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

    def summary(self, level: float) -> Summary:
        """What an answer tells of it, without the window itself."""
        some = len(self.ranks) > 0
        return Summary(
            self.n,
            self.seen,
            len(self.ranks),
            self.log10_value,
            self.log10_maximum,
            self.share_up_to(0.01) if some else 0.0,
            self.share_up_to(0.05) if some else 0.0,
            self.histogram,
            self.judge(level),
        )


@dataclass(frozen=True)
class Summary:
    """A watch in a few numbers, fit to be sent to another process: the fields of ``Seen``, the shares of p-values up to
    0.01 and 0.05 (0 of none), the histogram, and what the tests find (None where nothing has been seen)."""

    n: int
    seen: int
    in_window: int
    log10_value: float
    log10_maximum: float
    up_to_1_percent: float
    up_to_5_percent: float
    histogram: list[int]
    finding: Finding | None


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


class Watch:
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


class DriftWatch(Protocol):
    """What routes and metrics ask, whoever keeps the watches."""

    window: int
    level: float

    def note(self, place: Place, above: np.ndarray, at_least: np.ndarray) -> None:
        """Take note of rows by the number of calibration scores > and ≥ each one's score: int64 [N] twice."""

    async def summary(self, place: Place) -> Summary:
        """What was seen there: of that score of this very bundle."""

    async def summaries(self) -> list[tuple[Name, Summary]]:
        """Of every watch that has seen a row."""


class Drift:
    """The watches in this process. Each begins with a score's first row, and anew with another bundle in its place."""

    def __init__(self, window: int, level: float) -> None:
        self.window = window
        self.level = level
        self._lock = threading.Lock()
        self._watches: dict[Name, tuple[str, Watch]] = {}

    def note(self, place: Place, above: np.ndarray, at_least: np.ndarray) -> None:
        """See DriftWatch."""
        self._watch(place).record(above, at_least)

    def seen(self, place: Place) -> Seen:
        """What was seen there: nothing, if it was of another bundle."""
        with self._lock:
            digest, watch = self._watches.get(place.name, ("", None))
        if watch is None or digest != place.digest:
            return Seen(place.n, 0, np.empty(0, np.int64), 0.0, 0.0)
        return watch.seen()

    async def summary(self, place: Place) -> Summary:
        """See DriftWatch."""
        return self.seen(place).summary(self.level)

    async def summaries(self) -> list[tuple[Name, Summary]]:
        """See DriftWatch."""
        return [(name, seen.summary(self.level)) for name, seen in self]

    def __iter__(self) -> Iterator[tuple[Name, Seen]]:
        with self._lock:
            watches = [(name, watch) for name, (_, watch) in self._watches.items()]
        yield from ((name, watch.seen()) for name, watch in watches)

    def _watch(self, place: Place) -> Watch:
        with self._lock:
            digest, watch = self._watches.get(place.name, ("", None))
            if watch is None or digest != place.digest:
                watch = Watch(place.n, self.window)
                self._watches[place.name] = place.digest, watch
            return watch
