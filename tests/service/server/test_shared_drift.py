"""Drift of several processes: told over a real socket, it is what one process would have seen."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from service.calibration.conformal import Calibrator
from service.calibration.drift_monitor import Drift
from service.errors import DeadlineExceeded
from service.repository.resolving import drift_place
from service.server import shared_drift
from service.server.channel import WorkerLine, connected_pair, encode, receive_waiting
from service.server.shared_drift import DriftKeeper, ToldDrift
from tests.service.calibration.test_drift_monitor import record

RANDOM = np.random.RandomState(0)
CALIBRATION = {"elbo": np.sort(RANDOM.standard_normal(99)), "elbo@été": np.sort(RANDOM.standard_normal(19))}
SERVED = SimpleNamespace(
    manifest=SimpleNamespace(name="m", version="1"),
    calibrator=Calibrator(CALIBRATION),
    model=SimpleNamespace(digest="a"),
)


class Keeper:
    """The supervisor's side of one line, on a thread."""

    def __init__(self, window=50, level=0.01):
        self.ours, self.theirs = connected_pair()
        self.line = WorkerLine(self.theirs)
        self.ended = threading.Event()
        self.line.listen(self.ended.set)
        self.missed = []
        self.drift = ToldDrift(self.line, window, level, self.missed.append)
        self.keeper = DriftKeeper(window, level)

    def serve(self):
        """Take and answer all that has arrived."""
        messages, _ = receive_waiting(self.ours)
        self.keeper.take(message for message in messages if message["kind"] == "rows")
        for message in messages:
            if message["kind"] != "rows":
                for answer in self.keeper.answers(message):
                    self.ours.send(encode(answer))

    def ask(self, question):
        """What the coroutine gives, with the keeper at work meanwhile."""

        async def both():
            asked = asyncio.ensure_future(question)
            while not asked.done():
                self.serve()
                await asyncio.sleep(0)
            return asked.result()

        return asyncio.run(both())


@pytest.fixture
def keeper():
    keeper = Keeper()
    yield keeper
    keeper.ours.close()
    assert keeper.ended.wait(10)
    keeper.theirs.close()


def test_told_rows_are_seen_as_rows_of_one_process(keeper, monkeypatch):
    monkeypatch.setattr(shared_drift, "ROWS", 7)
    local, told = Drift(50, 0.01), {None: [], "été": []}
    for group, spelt, count in ((None, None, 30), ("été", "été", 8), ("été", "e\u0301te\u0301", 3), (None, None, 60)):
        scores = np.random.RandomState(count).standard_normal(count) + 1
        record(keeper.drift, SERVED, "elbo", scores, spelt)
        told[group].append(scores)
    for group, parts in told.items():
        record(local, SERVED, "elbo", np.concatenate(parts), group)
    for group in (None, "été"):
        assert keeper.ask(keeper.drift.summary(drift_place(SERVED, "elbo", group))) == asyncio.run(
            local.summary(drift_place(SERVED, "elbo", group))
        )
    assert keeper.ask(keeper.drift.summaries()) == asyncio.run(local.summaries())
    assert len(keeper.ask(keeper.drift.summaries())) == 2
    assert keeper.missed == []


def test_nothing_seen_and_another_bundle_are_told_as_such(keeper):
    empty = keeper.ask(keeper.drift.summary(drift_place(SERVED, "elbo")))
    assert (empty.n, empty.seen, empty.finding) == (99, 0, None)
    record(keeper.drift, SERVED, "elbo", np.zeros(3))
    other = SimpleNamespace(**{**vars(SERVED), "model": SimpleNamespace(digest="b")})
    assert keeper.ask(keeper.drift.summary(drift_place(other, "elbo"))).seen == 0
    assert keeper.ask(keeper.drift.summary(drift_place(SERVED, "elbo"))).seen == 3


def test_a_keeper_that_does_not_read_stops_nobody_and_what_it_misses_is_counted(keeper):
    rows = np.zeros(1000)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(400):
            pool.submit(record, keeper.drift, SERVED, "elbo", rows)
    assert sum(keeper.missed) > 0
    with pytest.raises(DeadlineExceeded, match="too busy"):
        asyncio.run(keeper.drift.summaries())
    keeper.serve()
    seen = keeper.ask(keeper.drift.summary(drift_place(SERVED, "elbo"))).seen
    assert seen + sum(keeper.missed) == 400_000


def test_no_answer_is_a_deadline_and_a_late_one_is_dropped(keeper, monkeypatch):
    monkeypatch.setattr("service.server.channel.ANSWER_SECONDS", 0.05)
    with pytest.raises(DeadlineExceeded, match="no answer"):
        asyncio.run(keeper.drift.summaries())
    keeper.serve()
    monkeypatch.setattr("service.server.channel.ANSWER_SECONDS", 60)
    assert keeper.ask(keeper.drift.summaries()) == []


def test_rows_told_to_a_keeper_that_is_gone_are_counted():
    keeper = Keeper()
    keeper.ours.close()
    assert keeper.ended.wait(10)
    record(keeper.drift, SERVED, "elbo", np.zeros(3))
    assert keeper.missed == [3]
    keeper.theirs.close()
