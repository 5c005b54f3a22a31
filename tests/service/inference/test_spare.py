"""CPUs that stand idle: who is told that they do, who gets them, and that nobody can tell by the answer."""

from __future__ import annotations

import io
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from service.inference import batch_invariance as rows
from service.inference import spare
from service.inference.batch_invariance import RowRunner, batches_of, random_rows
from service.inference.sessions import Runtime
from service.inference.spare import SpareCpus
from service.server.mapped import map_numbers
from tests.service.http import npy
from tests.service.inference.test_batch_invariance import gated_mlp, same, small_conv
from tests.service.processes import NPY, until, workers

EXPORTED = Path(__file__).parents[3] / "exported"
NEVER = -(10**18)


@pytest.fixture
def three(tmp_path, monkeypatch):
    """What three workers of one thread each know, on three CPUs."""
    monkeypatch.setattr(spare, "available_cpus", lambda: 3)
    made = [SpareCpus(1) for _ in range(3)]
    for number, each in enumerate(made):
        each.join(tmp_path / "cpus", number, 3)
    return made


def for_ever() -> int:
    """As RECENT: whatever has ended in the second half of the machine's time."""
    return time.monotonic_ns() // 2


@pytest.fixture(params=["gated MLP", "convolutions"])
def graph(request):
    return gated_mlp("Gemm") if request.param == "gated MLP" else small_conv()


def test_alone_a_process_has_its_own_threads():
    for threads in (1, 4):
        alone = SpareCpus(threads)
        alone.begin()
        assert alone.free() == threads - 1


@pytest.mark.parametrize(("threads", "cpus", "free"), [(1, 2, 1), (1, 64, 3), (2, 1, 1), (2, 5, 4)])
def test_more_workers_than_cpus_have_no_more_to_share(tmp_path, monkeypatch, threads, cpus, free):
    monkeypatch.setattr(spare, "available_cpus", lambda: cpus)
    one = SpareCpus(threads)
    one.join(tmp_path / "cpus", 0, 4)
    one.begin()
    assert one.free() == free


def test_idle_workers_lend_their_cpus_and_those_that_compute_do_not(three, monkeypatch):
    first, second, third = three
    monkeypatch.setattr(spare, "RECENT", NEVER)
    first.begin()
    assert first.free() == 2
    second.begin()
    assert first.free() == second.free() == 1
    third.begin()
    assert first.free() == second.free() == 0
    second.end()
    assert first.free() == third.free() == 1


def test_who_has_computed_a_moment_ago_is_taken_to_be_at_work(three, monkeypatch):
    first, second, _ = three
    second.begin()
    second.end()
    first.begin()
    monkeypatch.setattr(spare, "RECENT", for_ever())
    assert first.free() == 1
    monkeypatch.setattr(spare, "RECENT", NEVER)
    assert first.free() == 2


def test_what_is_lent_is_not_lent_twice(three, monkeypatch):
    first, second, third = three
    monkeypatch.setattr(spare, "RECENT", NEVER)
    first.begin()
    second.begin()
    both = threading.Barrier(2, timeout=30)

    def free_for(worker):
        both.wait()  # the helper is here, and counted
        found = worker.free()
        both.wait()
        return found

    assert first.run([lambda: free_for(second), lambda: free_for(third)], helpers=1) == [0, 0]
    assert second.free() == 1


def test_a_worker_in_the_place_of_a_dead_one_begins_idle(three, tmp_path, monkeypatch):
    monkeypatch.setattr(spare, "RECENT", for_ever())
    first, second, _ = three
    second.begin()
    second.end()
    second.begin()
    SpareCpus(1).join(tmp_path / "cpus", 1, 3)
    first.begin()
    assert first.free() == 2


@pytest.mark.parametrize("whose", ["lent", "its own"])
def test_helpers_take_works_of_their_own_and_results_keep_their_order(three, monkeypatch, whose):
    monkeypatch.setattr(spare, "RECENT", NEVER)
    cpus = three[0] if whose == "lent" else SpareCpus(3)
    meet = threading.Barrier(3, timeout=30)

    def work(number):
        meet.wait()  # which nobody leaves unless all three are here
        return number, threading.current_thread()

    cpus.begin()
    numbers, threads = zip(*cpus.run([lambda i=i: work(i) for i in range(3)], helpers=2), strict=True)
    assert numbers == (0, 1, 2)
    assert len(set(threads)) == 3
    assert cpus.free() == 2


def test_a_helper_goes_when_its_cpu_is_wanted(three, monkeypatch):
    first, second, third = three
    monkeypatch.setattr(spare, "RECENT", NEVER)
    both, mine = threading.Barrier(2, timeout=30), threading.current_thread()
    done: list[threading.Thread] = []

    def work():
        done.append(threading.current_thread())
        if len(done) <= 2:
            both.wait()
        if threading.current_thread() is not mine:
            second.begin()
            third.begin()
        else:
            until(lambda: first.free() == 0)  # once both want their CPUs

    first.begin()
    first.run([work] * 8, helpers=1)
    assert [thread is mine for thread in done].count(False) == 1
    assert len(done) == 8


def test_nobody_waits_for_helpers_that_have_not_begun():
    cpus, begun, go_on = SpareCpus(2), threading.Event(), threading.Event()

    def long():
        begun.set()
        go_on.wait(30)

    other = cpus._threads.submit(long)  # as another run's helper would
    assert begun.wait(30)
    cpus.begin()
    assert cpus.run([lambda: threading.current_thread()] * 3, helpers=1) == [threading.current_thread()] * 3
    assert other.running()
    go_on.set()


def test_two_runs_of_one_process_do_not_both_have_its_threads():
    cpus = SpareCpus(4)
    cpus.begin()
    cpus.begin()
    assert cpus.free() == 0


def test_where_no_thread_can_be_started_the_caller_does_it_all(three, monkeypatch):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(spare, "RECENT", NEVER)
    monkeypatch.setattr(three[0]._threads, "submit", refuse)
    three[0].begin()
    assert three[0].run([lambda: 1, lambda: 2], helpers=2) == [1, 2]
    assert three[0].free() == 2


def test_where_no_more_threads_can_be_started_the_first_helper_is_waited_for(three, monkeypatch):
    monkeypatch.setattr(spare, "RECENT", NEVER)
    meet, submit, offered = threading.Barrier(2, timeout=30), three[0]._threads.submit, []

    def submit_once(*asked):
        if offered:
            raise RuntimeError("can't start new thread")
        offered.append(submit(*asked))
        return offered[0]

    monkeypatch.setattr(three[0]._threads, "submit", submit_once)
    three[0].begin()
    assert len(three[0].run([meet.wait] * 2, helpers=2)) == 2
    assert offered[0].done()
    assert three[0].free() == 2


def burn(seconds):
    """CPU time of this thread."""
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


@pytest.mark.parametrize("at_fault", ["caller", "helper"])
def test_a_fault_is_raised_once_all_that_has_begun_has_ended_and_nothing_stays_lent(three, monkeypatch, at_fault):
    monkeypatch.setattr(spare, "RECENT", NEVER)
    meet, caller, ended = threading.Barrier(2, timeout=30), threading.current_thread(), []

    def work():
        if len(ended) < 2:
            ended.append(None)
            meet.wait()  # both have one
        if (threading.current_thread() is caller) == (at_fault == "caller"):
            raise ZeroDivisionError
        burn(0.05)
        ended.append(threading.current_thread())

    three[0].begin()
    with pytest.raises(ZeroDivisionError):
        three[0].run([work] * 50, helpers=1)
    assert three[0].free() == 2
    assert len(ended) == (2 + 1 if at_fault == "caller" else 2 + 49)


def test_the_clock_counts_what_others_computed(three, monkeypatch):
    monkeypatch.setattr(spare, "RECENT", NEVER)
    meet = threading.Barrier(3, timeout=30)

    def work():
        meet.wait()
        burn(0.02)

    began = three[0].clock()
    three[0].begin()
    three[0].run([work] * 3, helpers=2)
    assert three[0].clock() - began >= 3 * 0.02


@pytest.mark.parametrize("count", [2, 3, 17, 33, 64, 100])
def test_rows_divided_over_threads_are_bitwise_rows_in_order(graph, monkeypatch, count):
    monkeypatch.setattr(rows, "HOP", 0.0)
    model, shape = graph
    session, trial = Runtime("cpu", threads=1).session(model), random_rows({"x": shape}, frozenset({"x"}))
    cpus = SpareCpus(3)
    divided, ordered = RowRunner(session, trial, spare=cpus), RowRunner(session, trial)
    helpers, run = [], cpus.run
    monkeypatch.setattr(cpus, "run", lambda works, number: helpers.append(number) or run(works, number))
    x = np.random.RandomState(count).random_sample((count, *shape)).astype(np.float32)
    wanted = ordered.run({"x": x})
    for _ in range(3):  # the first time nobody knows what a row costs
        assert same(divided.run({"x": x}), wanted)
    assert max(helpers) >= 1


def test_the_first_run_of_many_rows_is_divided_once_one_batch_has_told_what_rows_cost(graph, monkeypatch):
    monkeypatch.setattr(rows, "HOP", 0.0)
    model, shape = graph
    session, trial = Runtime("cpu", threads=1).session(model), random_rows({"x": shape}, frozenset({"x"}))
    cpus, helpers = SpareCpus(2), []
    runner, run = RowRunner(session, trial, spare=cpus), cpus.run
    monkeypatch.setattr(cpus, "run", lambda works, number: helpers.append((len(works), number)) or run(works, number))
    runner.run({"x": np.zeros((160, *shape), np.float32)})
    assert helpers == [(4, 1)]


def test_the_trials_of_sizes_are_not_taken_for_the_cost_of_rows(monkeypatch):
    model, shape = gated_mlp("Gemm")
    runner = RowRunner(Runtime("cpu", threads=1).session(model), random_rows({"x": shape}), spare=SpareCpus(2))
    find = runner._find_sizes

    def slowly():
        burn(0.5)
        return find()

    monkeypatch.setattr(runner, "_find_sizes", slowly)
    runner.run({"x": np.zeros((2, *shape), np.float32)})
    assert 0 < runner._seconds < 0.5 / (2 + rows.RUN)


@pytest.mark.parametrize("count", [1, 9])
def test_a_run_that_fails_is_over(count):
    model, shape = gated_mlp("Gemm")
    cpus = SpareCpus(2)
    runner = RowRunner(Runtime("cpu", threads=1).session(model), random_rows({"x": shape}), spare=cpus)
    with pytest.raises(InvalidArgument):
        runner.run({"x": np.zeros((count, 1, 1), np.float32)})
    cpus.begin()
    assert cpus.free() == 1


@pytest.mark.parametrize("sizes", [(1,), (1, 2, 4, 8, 16, 32), (4, 16)])
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16])
def test_batches_hold_every_row_once_and_few_of_them_at_a_time(sizes, threads):
    for count in (threads, 31, 64, 100, 1000):
        batches = batches_of(sizes, count, threads)
        assert [row for start, end, _ in batches for row in range(start, end)] == list(range(count))
        assert all(0 < end - start <= size for start, end, size in batches)
        assert threads * max(batch.size for batch in batches) <= max(2 * sizes[-1], threads * sizes[0])


def test_rows_are_divided_only_where_that_pays(monkeypatch):
    model, shape = gated_mlp("Gemm")
    session = Runtime("cpu", threads=1).session(model)
    cpus = SpareCpus(4)
    runner = RowRunner(session, random_rows({"x": shape}, frozenset({"x"})), spare=cpus)
    cpus.begin()
    monkeypatch.setattr(rows, "HOP", 1.0)
    for seconds, count, threads in [(0.01, 64, 1), (0.1, 64, 2), (1, 64, 4), (1, 3, 2), (1, 1, 1), (0, 64, 1)]:
        runner._seconds = seconds
        assert runner._threads_for(count) == threads, (seconds, count)
    cpus.begin()
    assert runner._threads_for(64) == 1
    runner._spare, runner._seconds = SpareCpus(64), 1.0
    runner._spare.begin()
    monkeypatch.setattr(rows, "HOP", 1e-9)
    assert [runner._threads_for(count) for count in (2, 3, 1000)] == [2, 3, rows.MOST_THREADS]


def test_a_session_of_several_threads_is_not_divided():
    model, shape = gated_mlp("Gemm")
    runner = RowRunner(Runtime("cpu", threads=2).session(model), random_rows({"x": shape}), spare=SpareCpus(4))
    runner._seconds = 10.0
    assert runner._threads_for(64) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")
def test_a_large_request_gets_the_idle_workers_cpu_and_gives_it_back(tmp_path):
    """Over real HTTP, in bits that are those of few rows at a time, which no worker divides."""
    shutil.copytree(EXPORTED / "mnist", tmp_path / "mnist")
    x = np.random.RandomState(0).randint(0, 256, (1024, 1, 28, 28), dtype=np.uint8)
    most, done = 0, threading.Event()

    def watch(told):
        nonlocal most
        while not done.is_set():
            most = max(most, *told[:: spare.TOLD].tolist())

    with workers(tmp_path) as service, service.client() as client:

        def encoded(images):
            headers = {**NPY, "accept": "application/x-npy"}
            return np.load(io.BytesIO(client.post("/v1/encode", content=npy(images), headers=headers).content))

        wanted = np.concatenate([encoded(x[i : i + 8]) for i in range(0, 1024, 8)])
        told = map_numbers(service.folder / "cpus", 2 * spare.TOLD)
        watcher = threading.Thread(target=watch, args=(told,))
        watcher.start()
        try:
            until(lambda: encoded(x).tobytes() == wanted.tobytes() and most == 2)
        finally:
            done.set()
            watcher.join()
        assert told[:: spare.TOLD].tolist() == [0, 0]
