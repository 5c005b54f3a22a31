"""Numbers that are observed together count as they do one by one."""

import asyncio
import math

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest

from service.api.metrics import Amounts, Metrics

BOUNDS = (0.1, 1.0, 10.0)


def shown(observe):
    registry = CollectorRegistry()
    observe(Amounts("rows", "Rows", ["verb"], buckets=BOUNDS, registry=registry).labels("encode"))
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
    assert shown(lambda histogram: histogram.observe_all([math.inf])) == shown(lambda each: each.observe(math.inf))


def test_requests_are_counted_by_their_route_method_and_status():
    metrics = Metrics()

    async def of_one_turn():
        for seconds, status in ((0.004, 200), (0.2, 200), (0.3, 422)):
            metrics.begun()
            metrics.answered("POST", "/v1/encode", status, seconds)
        metrics.begun()
        metrics.rows("encode", 3)
        return metrics.render().decode()

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
