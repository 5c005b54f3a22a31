"""Prometheus metrics. One registry an app, so that several apps live in one process without sharing counters.

Several workers write their numbers to files of one folder, and whichever is asked adds them up: prometheus_client's
multiprocess mode.
"""

from __future__ import annotations

import asyncio
import math
import os
from bisect import bisect_left
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from service.calibration.drift_monitor import Drift, Finding, Name, Seen
from service.deferred import DeferredWriter

_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_P_VALUES = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_OF_DRIFT = ("model", "version", "score", "group")
_DRIFT_GAUGES = {
    "ks_statistic": "Largest distance between the p-values of the window and uniformity",
    "ks_p_value": "Two-sample Kolmogorov-Smirnov p-value of the window, for one look",
    "martingale_log10": "log10 of the conformal test martingale",
    "martingale_log10_maximum": "Largest log10 of the martingale: ever log10(1/a) with probability at most a",
    "share_up_to_1_percent": "Share of the window's p-values up to 0.01",
    "share_up_to_5_percent": "Share of the window's p-values up to 0.05",
    "alarm": "1 while recent inputs are not like the calibration images, at the setting drift_level over the workers",
}
"""Each is of the worker that has the largest, the p-value of the one that has the smallest."""
DRIFT_SECONDS = 1.0  # from one look at the drift tests to the next
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Answered(NamedTuple):
    """An answered request: its route's template, and the seconds from its headers to the end of the answer."""

    method: str
    route: str
    status: int
    seconds: float


class Amounts(Histogram):
    """A histogram that takes many numbers as it takes one, but writes each of its own numbers once."""

    def observe_all(self, amounts: Sequence[float]) -> None:
        """As ``observe`` of each."""
        self._sum.inc(math.fsum(amounts))
        for bucket, count in Counts(bisect_left(self._upper_bounds, amount) for amount in amounts).items():
            self._buckets[bucket].inc(count)


class Observed(NamedTuple):
    """A number for a histogram."""

    by: Amounts
    amount: float


class Counted(NamedTuple):
    """A number for a counter."""

    by: Counter
    amount: float


Gatherable = Answered | Observed | Counted | None
"""None: a request that was begun."""


class Metrics:
    """All metrics of one app. Labels are route templates, methods and statuses: their number is bounded.

    ``folder`` holds the files of all workers, if there are several.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        if folder is not None:
            _write_to(folder)
        self.registry = CollectorRegistry()
        self._of_requests()
        self._of_rows()
        self._of_processes()
        self._of_drift()

    def _of_requests(self) -> None:
        self.requests = Counter(
            "vaeserve_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.latency = Amounts(
            "vaeserve_request_seconds", "From the headers to the end of the answer", ["route"], registry=self.registry
        )
        self.in_flight = Gauge(
            "vaeserve_requests_in_flight",
            "Requests being handled",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.refused = Counter("vaeserve_queue_refusals", "Requests refused by a full queue", registry=self.registry)
        self._under_way = 0
        self._gathered: DeferredWriter[Gatherable] = DeferredWriter(self._sum_up)
        # Looking up a child by its labels takes longer than counting.
        self._answered, self._taken = cache(self.requests.labels), cache(self.latency.labels)

    def _of_rows(self) -> None:
        self.images = Counter("vaeserve_images_scored", "Images scored", ["model"], registry=self.registry)
        self.batch = Amounts(
            "vaeserve_batch_size", "Images or latents in a request", ["verb"], buckets=_ROWS, registry=self.registry
        )
        self.run = Amounts(
            "vaeserve_run_rows",
            "Images or latents computed in one run, those of several requests together",
            buckets=_ROWS,
            registry=self.registry,
        )
        self.p_values = Amounts(
            "vaeserve_p_value",
            "Conformal p-values handed out: uniform as long as the traffic is like the calibration data",
            ["model"],
            buckets=_P_VALUES,
            registry=self.registry,
        )
        self._rows, self._scored = cache(self.batch.labels), cache(self.images.labels)
        self._judged = cache(self.p_values.labels)

    def _of_processes(self) -> None:
        self.models = Gauge(
            "vaeserve_model_info",
            "1 for each model served",
            ["model", "version", "digest"],
            registry=self.registry,
            multiprocess_mode="max",
        )
        self.workers = Gauge(
            "vaeserve_workers",
            "Processes that have loaded their models",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.worker_starts = Counter(
            "vaeserve_worker_starts",
            "Processes that have loaded their models so far, those in place of dead ones too",
            registry=self.registry,
        )

    def _of_drift(self) -> None:
        self._drift_seen: dict[Name, int] = {}  # p-values that are counted already
        self.drift_p_values = Counter(
            "vaeserve_drift_p_values", "P-values that the drift tests have seen", _OF_DRIFT, registry=self.registry
        )
        self.drift_gauges = {
            name: Gauge(
                f"vaeserve_drift_{name}",
                text,
                _OF_DRIFT,
                registry=self.registry,
                multiprocess_mode="livemin" if name == "ks_p_value" else "livemax",
            )
            for name, text in _DRIFT_GAUGES.items()
        }

    def begun(self) -> None:
        """Count a request as under way, until it is counted as answered."""
        self._under_way += 1
        self._gathered.add(None)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request; ``route`` is a template such as /v1/models/{model}/score."""
        self._under_way -= 1
        self._gathered.add(Answered(method, route, status, seconds))

    def rows(self, verb: str, n: int) -> None:
        """Count a request of ``n`` images or latents."""
        self._gathered.add(Observed(self._rows(verb), n))

    def ran(self, n: int) -> None:
        """Count a run of ``n`` images or latents."""
        self._gathered.add(Observed(self.run, n))

    def _sum_up(self, gathered: list[Gatherable]) -> None:
        self.in_flight.set(self._under_way)
        many: Counts[tuple[str, str, int]] = Counts()
        counted: defaultdict[Counter, float] = defaultdict(float)
        observed: defaultdict[Amounts, list[float]] = defaultdict(list)
        for each in gathered:
            if type(each) is Answered:
                many[each[:3]] += 1
                observed[self._taken(each.route)].append(each.seconds)
            elif type(each) is Observed:
                observed[each.by].append(each.amount)
            elif type(each) is Counted:
                counted[each.by] += each.amount
        for (method, route, status), count in many.items():
            self._answered(method if method in _METHODS else "other", route, str(status)).inc(count)
        for counter, amount in counted.items():
            counter.inc(amount)
        for histogram, amounts in observed.items():
            histogram.observe_all(amounts)

    def scored(self, model: str, p_values: Iterable[float], n: int) -> None:
        """Count ``n`` scored images of a model and their p-values, where there are any."""
        self._gathered.add(Counted(self._scored(model), n))
        histogram = self._judged(model)
        for p in p_values:
            self._gathered.add(Observed(histogram, p))

    async def follow(self, drift: Drift) -> None:
        """Show what the drift tests say, once a second until cancelled."""
        while True:
            self.show(drift)
            await asyncio.sleep(DRIFT_SECONDS)

    def show(self, drift: Drift) -> None:
        """Set the gauges to what the drift tests of this process say of the scores that have new p-values."""
        for name, seen in drift:
            before = self._drift_seen.get(name, 0)
            if seen.seen == before or (finding := seen.judge(drift.level)) is None:
                continue
            self._drift_seen[name] = seen.seen
            labels = (name.model, name.version, name.score, name.group)
            # A bundle that has taken another's place is watched anew: its p-values come on top.
            self.drift_p_values.labels(*labels).inc(seen.seen - before if seen.seen > before else seen.seen)
            for gauge, value in _drift_values(seen, finding).items():
                self.drift_gauges[gauge].labels(*labels).set(value)

    def render(self, drift: Drift) -> bytes:
        """The exposition format (text, version 0.0.4), in which this process's drift is that of now."""
        self._gathered.flush()
        self.show(drift)
        shown = self.registry
        if self.folder is not None:
            shown = CollectorRegistry()
            MultiProcessCollector(shown, str(self.folder))
        return generate_latest(shown)


def _write_to(folder: Path) -> None:
    """Have prometheus_client keep the numbers of this process in files there.

    It looks the process's number up with every number that it writes, unless it is told.
    """
    own = os.getpid()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: own)


def _drift_values(seen: Seen, finding: Finding) -> dict[str, float]:
    return {
        "ks_statistic": finding.ks_statistic,
        "ks_p_value": finding.ks_p_value,
        "martingale_log10": seen.log10_value,
        "martingale_log10_maximum": seen.log10_maximum,
        "share_up_to_1_percent": seen.share_up_to(0.01),
        "share_up_to_5_percent": seen.share_up_to(0.05),
        "alarm": float(finding.drifting),
    }
