"""Prometheus metrics. One registry an app, so that several apps live in one process without sharing counters."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """All metrics of one app. Labels are route templates, methods and statuses: their number is bounded."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vaeserve_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "vaeserve_request_seconds", "From the headers to the end of the answer", ["route"], registry=self.registry
        )
        self.in_flight = Gauge("vaeserve_requests_in_flight", "Requests being handled", registry=self.registry)
        self.refused = Counter("vaeserve_queue_refusals", "Requests refused by a full queue", registry=self.registry)
        self.images = Counter("vaeserve_images_scored", "Images scored", ["model"], registry=self.registry)
        self.batch = Histogram(
            "vaeserve_batch_size",
            "Images or latents in a request",
            ["verb"],
            buckets=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024],
            registry=self.registry,
        )
        self.p_values = Histogram(
            "vaeserve_p_value",
            "Conformal p-values handed out: uniform as long as the traffic is like the calibration data",
            ["model"],
            buckets=[0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
            registry=self.registry,
        )
        self.models = Gauge(
            "vaeserve_model_info", "1 for each model served", ["model", "version", "digest"], registry=self.registry
        )

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one answered request; ``route`` is a template such as /v1/models/{model}/score."""
        self.requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self.latency.labels(route).observe(seconds)

    def scored(self, model: str, p_values: Iterable[float | None], n: int) -> None:
        """Count ``n`` scored images of a model and their p-values, where there are any."""
        self.images.labels(model).inc(n)
        histogram = self.p_values.labels(model)
        for p in p_values:
            if p is not None:
                histogram.observe(p)

    def render(self) -> bytes:
        """The exposition format (text, version 0.0.4)."""
        return generate_latest(self.registry)
