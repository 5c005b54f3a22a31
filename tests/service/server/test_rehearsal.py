"""What autotune asks of a service, for every kind of bundle, and how it takes refusals."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

import numpy as np
import pytest

from service.bundle.files import find_bundles
from service.errors import MeasurementFailed
from service.server import probe
from service.server.layouts import Layout
from service.server.rehearsal import Asked, ask, rehearsal, repeat, requests_for
from service.server.tuning import _typical_graphs
from service.settings import Settings
from tests.service.linear_bundles import write_all
from tests.tiled_bundle import write_tiled_bundle


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Vectors, signals, models without likelihood or prior, and tiles."""
    root = tmp_path_factory.mktemp("exported")
    write_all(root)
    write_tiled_bundle(root)
    return root


def rehearse(settings, act):
    async def acting():
        async with rehearsal(settings) as app:
            return await act(app)

    return asyncio.run(acting())


def names(root):
    return sorted(path.parent.name for path in find_bundles(root))


def test_every_kind_of_bundle_is_asked_for_rows_of_its_own(root):
    found = rehearse(Settings(repository=root), lambda app: requests_for(app, names(root)))
    expected = {f"{name} {verb} {rows}" for name in names(root) for verb in ("encode", "score") for rows in (1, 64)}
    assert found.keys() == expected


def test_only_the_models_asked_for_are_asked(root):
    found = rehearse(Settings(repository=root), lambda app: requests_for(app, ["table"]))
    assert {name.split()[0] for name in found} == {"table"}


def test_no_more_rows_are_asked_than_the_settings_allow(root):
    found = rehearse(Settings(repository=root, max_batch=10), lambda app: requests_for(app, ["table"]))
    assert found.keys() == {"table encode 1", "table encode 8", "table score 1", "table score 8"}


def test_answers_are_those_of_the_service_and_each_connection_gets_one(root):
    async def act(app):
        asked = (await requests_for(app, ["table"]))["table score 64"]
        status, body = await ask(app, asked)
        return status, body, await repeat(app, asked, 5, time.monotonic())

    status, body, (latencies, end) = rehearse(Settings(repository=root), act)
    assert (status, body.count(b'"p_value"')) == (200, 64)
    assert len(latencies) == 5
    assert end <= time.monotonic()


def test_a_refusal_under_load_fails_the_measurement(root):
    async def act(app):
        return await repeat(app, Asked("/v1/models/table/score", b"no npy", 1), 2, time.monotonic())

    with pytest.raises(MeasurementFailed, match="table/score answers 422 under load"):
        rehearse(Settings(repository=root), act)


def test_the_graphs_of_every_kind_of_bundle_run_on_random_rows(root):
    for name in names(root):
        graphs = [str(path) for path in _typical_graphs(Settings(repository=root, default_model=name))]
        assert len(graphs) == 2
        made = probe._of_graphs({"graphs": graphs, "threads": 1})
        answer = probe._run(made["graphs 8"], 1, time.monotonic(), 0.0)
        assert answer["images_per_second"] > 0
        assert np.isfinite([answer["latency"], answer["cpu"]]).all()


def test_a_probe_rehearses_as_the_worker_of_its_layout(root, monkeypatch):
    seen = []

    def seeing(settings):
        seen.append((settings.workers, settings.threads))
        return rehearsal(settings)

    monkeypatch.setattr("service.server.rehearsal.rehearsal", seeing)
    monkeypatch.setattr("service.logs.configure_logs", lambda *_: None)
    settings = Settings(repository=root, workers="auto").model_dump(mode="json")
    order = {"settings": settings, "models": ["table"], **Layout(processes=3, threads=2).model_dump()}
    with ExitStack() as stack:
        made = probe._of_service(order, stack)
        assert probe._run(made["table encode 64"], 2, time.monotonic(), 0.0)["images_per_second"] > 0
    assert seen == [(3, 2)]
