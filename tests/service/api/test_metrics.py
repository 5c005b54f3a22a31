"""Numbers that are observed together count as they do one by one."""

import asyncio
import math

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from service.api import metrics as of_metrics
from service.api.metrics import BulkHistogram, Metrics
from service.calibration.drift_monitor import Drift, MonitorKey, MonitorName

BOUNDS = (0.1, 1.0, 10.0)


def shown(observe):
    registry = CollectorRegistry()
    observe(BulkHistogram("rows", "Rows", ["verb"], buckets=BOUNDS, registry=registry).labels("encode"))
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_amounts_together_are_as_amounts_one_by_one():
    amounts = [0.0, 0.1, 1.0, 10.0, 10.5, math.inf, *np.random.RandomState(0).uniform(0, 20, 50).round(3)]
    amounts = [amount for amount in amounts if math.isfinite(amount)]

    def one_by_one(histogram):
        for amount in sorted(amounts):
            histogram.observe(amount)

    together, alone = shown(lambda histogram: histogram.observe_all(amounts)), shown(one_by_one)
    assert [line for line in together if "_sum" not in line] == [line for line in alone if "_sum" not in line]
    sums = [float(line.split()[-1]) for lines in (together, alone) for line in lines if "_sum" in line]
    assert math.isclose(*sums, rel_tol=1e-12)
    assert shown(lambda histogram: histogram.observe_all([])) == shown(lambda histogram: None)
    assert shown(lambda histogram: histogram.observe_all([math.inf])) == shown(
        lambda histogram: histogram.observe(math.inf)
    )


def test_requests_are_counted_by_their_route_method_and_status():
    metrics = Metrics()

    async def of_one_turn():
        for seconds, status in ((0.004, 200), (0.2, 200), (0.3, 422)):
            metrics.begun()
            metrics.answered("POST", "/v1/encode", status, seconds)
        metrics.begun()
        metrics.rows("encode", 3)
        return metrics.render(Drift(20, 0.01)).decode()

    text = asyncio.run(of_one_turn())
    for line in (
        'vaeserve_requests_total{method="POST",route="/v1/encode",status="200"} 2.0',
        'vaeserve_requests_total{method="POST",route="/v1/encode",status="422"} 1.0',
        'vaeserve_request_seconds_bucket{le="0.005",route="/v1/encode"} 1.0',
        'vaeserve_request_seconds_count{route="/v1/encode"} 3.0',
        "vaeserve_requests_in_flight 1.0",
        'vaeserve_batch_size_bucket{le="2.0",verb="encode"} 0.0',
        'vaeserve_batch_size_bucket{le="4.0",verb="encode"} 1.0',
    ):
        assert line in text.splitlines()


def test_a_process_that_serves_alone_sets_no_gauges_before_it_is_asked(monkeypatch):
    metrics, asked = Metrics(), []
    monkeypatch.setattr(metrics, "set_gauges", asked.append)
    asyncio.run(asyncio.wait_for(metrics.follow(Drift(20, 0.01)), 60))
    assert asked == []


def metrics_of_a_worker(folder):
    """Metrics that are shown each second, but in this process's registry: no value is written to a file."""
    metrics = Metrics()
    metrics.folder = folder
    return metrics


def test_requests_in_flight_are_shown_each_second_by_workers_that_are_not_asked(monkeypatch, tmp_path):
    metrics, lines = metrics_of_a_worker(tmp_path), []
    monkeypatch.setattr(of_metrics, "GAUGE_SECONDS", 0)

    async def follow():
        following = asyncio.create_task(metrics.follow(Drift(20, 0.01)))
        metrics.begun()
        for _ in range(3):
            await asyncio.sleep(0)
        lines.extend(generate_latest(metrics.registry).decode().splitlines())
        following.cancel()

    asyncio.run(follow())
    assert "vaeserve_requests_in_flight 1.0" in lines


KEY = MonitorKey(MonitorName("m", "1", "elbo", ""), 99)


def note(drift, ranks):
    ranks = np.array(ranks)
    drift.record(KEY, ranks, ranks)


def drift_lines(metrics):
    """Values of the drift metrics of the process's own registry, by what follows vaeserve_drift_."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    values = [line.removeprefix("vaeserve_drift_") for line in lines if line.startswith("vaeserve_drift_")]
    return {line.split("{")[0]: float(line.split()[-1]) for line in values if "_created" not in line}


def test_drift_is_shown_each_second_of_what_is_new(monkeypatch, tmp_path):
    metrics, drift, turns = metrics_of_a_worker(tmp_path), Drift(20, 0.01), []
    monkeypatch.setattr(of_metrics, "GAUGE_SECONDS", 0)

    async def follow():
        following = asyncio.create_task(metrics.follow(drift))
        for ranks in ([], [50], [], [0] * 20):
            if ranks:
                note(drift, ranks)
            for _ in range(3):
                await asyncio.sleep(0)
            turns.append(drift_lines(metrics))
        following.cancel()

    asyncio.run(follow())
    nothing, first, same, more = turns
    assert nothing == {}
    assert (first["p_values_total"], first["alarm"], first["share_up_to_1_percent"]) == (1, 0, 0)
    assert same == first
    assert (more["p_values_total"], more["alarm"], more["share_up_to_1_percent"]) == (21, 1, 1)
    finding = drift.state(KEY).judge(0.01)
    assert (more["ks_statistic"], more["ks_p_value"]) == (finding.ks_statistic, finding.ks_p_value)


def test_p_values_of_an_apps_next_lifespan_come_on_top():
    metrics = Metrics()
    for ranks in ([1, 2, 3], [1, 2]):
        drift = Drift(20, 0.01)
        note(drift, ranks)
        metrics.set_gauges(drift)
        metrics.set_gauges(drift)
    assert drift_lines(metrics)["p_values_total"] == 5
