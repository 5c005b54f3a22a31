"""Prometheus metrics. Each app has a registry of its own, so that several apps in one process share no counters.

Several workers write their numbers to files of one folder, and the worker that answers /metrics adds them up:
prometheus_client's multiprocess mode.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from service.api.metric_files import MetricFiles, value_class
from service.calibration.drift_monitor import Drift, Finding, MonitorName, MonitorState
from service.deferred import DeferredWriter
from service.logs import dropped_lines

_ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_P_VALUE_BUCKETS = (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_DRIFT_LABELS = ("model", "version", "score", "group")
_DRIFT_GAUGES = {
    "ks_statistic": "Largest distance between the p-values of the window and uniformity",
    "ks_p_value": "Two-sample Kolmogorov-Smirnov p-value of the window, for one look",
    "martingale_log10": "log10 of the conformal test martingale",
    "martingale_log10_maximum": "Largest log10 of the martingale: ever log10(1/a) with probability at most a",
    "share_up_to_1_percent": "Share of the window's p-values up to 0.01",
    "share_up_to_5_percent": "Share of the window's p-values up to 0.05",
    "alarm": "1 while recent inputs are not like the calibration images, at the setting drift_level over the workers",
}
"""Gauges of the drift tests. Of several workers' values the largest is shown, of the p-values the smallest."""
GAUGE_SECONDS = 1.0  # between two updates of the gauges: judging the drift tests costs too much for every request
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Answered(NamedTuple):
    """An answered request: ``route`` is its template, ``seconds`` run from its headers to the end of the answer."""

    method: str
    route: str
    status: int
    seconds: float


class BulkHistogram(Histogram):
    """A histogram that observes many amounts together, and so writes its sum and each of its buckets once."""

    def observe_all(self, amounts: Sequence[float]) -> None:
        """Observe amounts; the result is that of ``observe`` for one after the other."""
        self._sum.inc(math.fsum(amounts))
        for bucket, count in Counts(bisect_left(self._upper_bounds, amount) for amount in amounts).items():
            self._buckets[bucket].inc(count)


class Observed(NamedTuple):
    """An amount that ``histogram`` is to observe."""

    histogram: BulkHistogram
    amount: float


class Counted(NamedTuple):
    """An amount that ``counter`` is to be increased by."""

    counter: Counter
    amount: float


Measurement = Answered | Observed | Counted


class Metrics:
    """All metrics of one app. Labels are route templates, methods and statuses, so that their number is bounded.

    ``folder`` holds the files of all workers; it is None where one process serves alone.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        if folder is not None:
            _write_to(folder)
        self.registry = CollectorRegistry()
        self._make_request_metrics()
        self._make_row_metrics()
        self._make_process_metrics()
        self._make_drift_metrics()

    def _make_request_metrics(self) -> None:
        self.requests = Counter(
            "vaeserve_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.latency = BulkHistogram(
            "vaeserve_request_seconds", "From the headers to the end of the answer", ["route"], registry=self.registry
        )
        self.in_flight = Gauge(
            "vaeserve_requests_in_flight",
            "Requests being handled",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.dropped_lines = Counter(
            "vaeserve_log_lines_dropped", "Lines of the log that stderr did not take", registry=self.registry
        )
        self._counted_dropped_lines = 0
        self.refused = Counter("vaeserve_queue_refusals", "Requests refused by a full queue", registry=self.registry)
        self._in_flight = 0
        self._deferred: DeferredWriter[Measurement] = DeferredWriter(self._write)
        # Children are remembered by their labels, since prometheus_client takes longer to find one than to count.
        self._requests_of, self._latency_of = cache(self.requests.labels), cache(self.latency.labels)

    def _make_row_metrics(self) -> None:
        self.images = Counter("vaeserve_images_scored", "Images scored", ["model"], registry=self.registry)
        self.batch = BulkHistogram(
            "vaeserve_batch_size",
            "Images or latents in a request",
            ["verb"],
            buckets=_ROW_BUCKETS,
            registry=self.registry,
        )
        self.run = BulkHistogram(
            "vaeserve_run_rows",
            "Images or latents computed in one run, those of several requests together",
            buckets=_ROW_BUCKETS,
            registry=self.registry,
        )
        self.p_values = BulkHistogram(
            "vaeserve_p_value",
            "Conformal p-values handed out: uniform as long as the traffic is like the calibration data",
            ["model"],
            buckets=_P_VALUE_BUCKETS,
            registry=self.registry,
        )
        self._batch_of, self._images_of = cache(self.batch.labels), cache(self.images.labels)
        self._p_values_of = cache(self.p_values.labels)

    def _make_process_metrics(self) -> None:
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

    def _make_drift_metrics(self) -> None:
        self._counted_p_values: dict[MonitorName, int] = {}
        self.drift_p_values = Counter(
            "vaeserve_drift_p_values", "P-values that the drift tests have seen", _DRIFT_LABELS, registry=self.registry
        )
        self.drift_gauges = {
            name: Gauge(
                f"vaeserve_drift_{name}",
                text,
                _DRIFT_LABELS,
                registry=self.registry,
                multiprocess_mode="livemin" if name == "ks_p_value" else "livemax",
            )
            for name, text in _DRIFT_GAUGES.items()
        }

    def begun(self) -> None:
        """Count a request as in flight until ``answered`` counts it as answered."""
        self._in_flight += 1

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request; ``route`` is a template such as /v1/models/{model}/score."""
        self._in_flight -= 1
        self._deferred.add(Answered(method, route, status, seconds))

    def rows(self, verb: str, n: int) -> None:
        """Observe the size of a request to ``verb`` that holds ``n`` images or latents."""
        self._deferred.add(Observed(self._batch_of(verb), n))

    def ran(self, n: int) -> None:
        """Observe the size of a run that has computed ``n`` images or latents."""
        self._deferred.add(Observed(self.run, n))

    def scored(self, model: str, p_values: Iterable[float], n: int) -> None:
        """Count ``n`` scored images of a model, and observe their p-values, of which there may be none."""
        self._deferred.add(Counted(self._images_of(model), n))
        histogram = self._p_values_of(model)
        for p_value in p_values:
            self._deferred.add(Observed(histogram, p_value))

    def _write(self, measurements: list[Measurement]) -> None:
        """Add up what many requests have left, and write each number once."""
        answered: Counts[tuple[str, str, int]] = Counts()
        counted: defaultdict[Counter, float] = defaultdict(float)
        observed: defaultdict[BulkHistogram, list[float]] = defaultdict(list)
        for item in measurements:
            if type(item) is Answered:
                answered[item[:3]] += 1
                observed[self._latency_of(item.route)].append(item.seconds)
            elif type(item) is Observed:
                observed[item.histogram].append(item.amount)
            elif type(item) is Counted:
                counted[item.counter] += item.amount
        for (method, route, status), count in answered.items():
            self._requests_of(method if method in _METHODS else "other", route, str(status)).inc(count)
        for counter, amount in counted.items():
            counter.inc(amount)
        for histogram, amounts in observed.items():
            histogram.observe_all(amounts)

    async def follow(self, drift: Drift) -> None:
        """Set the gauges once every GAUGE_SECONDS until cancelled, for a /metrics that another worker answers.

        A process that serves alone sets them when it is asked, and this returns at once.
        """
        while self.folder is not None:
            self.set_gauges(drift)
            await asyncio.sleep(GAUGE_SECONDS)

    def set_gauges(self, drift: Drift) -> None:
        """Set the gauges of this process: its requests in flight, and its drift tests that have new p-values."""
        self.in_flight.set(self._in_flight)
        dropped = dropped_lines()
        self.dropped_lines.inc(dropped - self._counted_dropped_lines)
        self._counted_dropped_lines = dropped
        for name, state in drift:
            before = self._counted_p_values.get(name, 0)
            if state.count == before or (finding := state.judge(drift.level)) is None:
                continue
            self._counted_p_values[name] = state.count
            labels = (name.model, name.version, name.score, name.group)
            # The monitors begin anew with the app's next lifespan: their p-values come on top.
            self.drift_p_values.labels(*labels).inc(state.count - before if state.count > before else state.count)
            for gauge, value in _drift_values(state, finding).items():
                self.drift_gauges[gauge].labels(*labels).set(value)

    def render(self, drift: Drift) -> bytes:
        """Write all metrics in the exposition format (text, version 0.0.4); this process's are those of this moment."""
        self._deferred.flush()
        self.set_gauges(drift)
        registry = self.registry
        if self.folder is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(self.folder))
        return generate_latest(registry)


def _write_to(folder: Path) -> None:
    """Have prometheus_client keep the numbers of this process in files of ``folder``."""
    values.ValueClass = value_class(MetricFiles(folder))


def _drift_values(state: MonitorState, finding: Finding) -> dict[str, float]:
    """Return the values of the drift gauges, by the names of _DRIFT_GAUGES."""
    return {
        "ks_statistic": finding.ks_statistic,
        "ks_p_value": finding.ks_p_value,
        "martingale_log10": state.log10_value,
        "martingale_log10_maximum": state.log10_maximum,
        "share_up_to_1_percent": state.share_up_to(0.01),
        "share_up_to_5_percent": state.share_up_to(0.05),
        "alarm": float(finding.drifting),
    }
