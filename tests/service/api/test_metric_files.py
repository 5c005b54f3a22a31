"""Numbers of a worker in files: they are those of prometheus_client, and a full disk costs them, not the worker."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector
from structlog.testing import capture_logs

from service.api.metric_files import MetricFiles, value_class
from service.api.metrics import Metrics
from service.calibration.drift_monitor import Drift


def fill(rounds=3):
    """Some numbers of each kind; the text of the registry that holds them in memory."""
    registry = CollectorRegistry()
    counter = Counter("asked", "How many", ["route"], registry=registry)
    histogram = Histogram("seconds", "How long", ["route"], buckets=(0.1, 1), registry=registry)
    gauges = [
        Gauge(f"at_{mode}", "Now", ["worker"], registry=registry, multiprocess_mode=mode) for mode in ("livesum", "max")
    ]
    for number in range(rounds):
        for route in ("/é", "/" + "x" * number):
            counter.labels(route).inc(number + 0.5)
            histogram.labels(route).observe(number / 2)
            for gauge in gauges:
                gauge.labels(route).set(number)
    return generate_latest(registry).decode()


def lines_of(text):
    return sorted(line for line in text.splitlines() if not line.startswith("#") and "_created" not in line)


def shown(folder):
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    return lines_of(generate_latest(registry).decode())


@pytest.fixture
def files(tmp_path, monkeypatch):
    files = MetricFiles(tmp_path)
    monkeypatch.setattr(values, "ValueClass", value_class(files))
    return files


def test_the_files_say_what_the_memory_holds(files, tmp_path):
    assert lines_of(fill(300)) == shown(tmp_path)  # more than a page


def test_a_worker_with_the_number_of_a_dead_one_adds_to_it(files, tmp_path, monkeypatch):
    fill()
    monkeypatch.setattr(values, "ValueClass", value_class(MetricFiles(tmp_path)))
    fill()
    asked = [line for line in shown(tmp_path) if line.startswith("asked_total{")]
    assert 'asked_total{route="/é"} 9.0' in asked


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 10, 40])
def test_a_full_disk_costs_the_numbers_and_is_said_once(files, tmp_path, monkeypatch, writes):
    left, pwrite = [writes], os.pwrite

    def full(descriptor, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with capture_logs() as lines:
        text = fill()
    monkeypatch.setattr(values, "ValueClass", values.MutexValue)
    assert lines_of(text) == lines_of(fill())  # in memory all goes on
    (line,) = lines
    assert (line["event"], line["log_level"]) == ("metrics of this worker are lost", "error")
    assert "No space left" in line["reason"]
    shown(tmp_path)  # what was written can be read


FULL = """
import json, resource, sys
from pathlib import Path
from service.api.metrics import Metrics
from service.calibration.drift_monitor import Drift
from service.logs import configure_logs
configure_logs("info", "json")
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
metrics = Metrics(Path(sys.argv[1]))
for number in range(1000):
    metrics.begun()
    metrics.answered("GET", f"/{number}", 200, 0.01)
print(json.dumps(len(metrics.render(Drift(20, 0.01)))))
"""


def test_a_process_lives_on_a_full_disk_and_answers_what_is_left(tmp_path):
    """A real limit of the kernel, on the size of files; the library's own files would end the process here."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, check=True)
    assert json.loads(done.stdout) > 0
    assert done.stderr.count(b"metrics of this worker are lost") == 1


def test_metrics_of_a_worker_are_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)  # put back afterwards
    metrics = Metrics(tmp_path)
    metrics.begun()
    metrics.answered("GET", "/a", 200, 0.01)
    assert b'vaeserve_requests_total{method="GET",route="/a",status="200"} 1.0' in metrics.render(Drift(20, 0.01))
