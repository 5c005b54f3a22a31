"""A large run divided over threads: who computes what, what it costs, and that nobody can tell by the answer."""

from __future__ import annotations

import io
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from service.inference import batch_invariance as rows
from service.inference.batch_invariance import BatchInvariantRunner, batches_of, random_rows
from service.inference.row_threads import RowThreads
from service.inference.sessions import Runtime
from tests.service.http import npy
from tests.service.inference.test_batch_invariance import gated_mlp, same, small_conv
from tests.service.processes import NPY, until, workers

EXPORTED = Path(__file__).parents[3] / "exported"


@pytest.fixture(params=["gated MLP", "convolutions"])
def graph(request):
    return gated_mlp("Gemm") if request.param == "gated MLP" else small_conv()


def burn(seconds):
    """CPU time of this thread."""
    began = time.thread_time()
    while time.thread_time() - began < seconds:
        pass


def counted(threads, monkeypatch):
    """How many works and threads each run of these threads has had, as far as there has been one."""
    runs, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda works, number: runs.append((len(works), number)) or run(works, number))
    return runs


def test_threads_take_works_of_their_own_and_results_keep_their_order():
    meet = threading.Barrier(3, timeout=30)

    def work(number):
        meet.wait()  # which nobody leaves unless all three are here
        return number, threading.current_thread()

    numbers, threads = zip(*RowThreads(3).run([lambda i=i: work(i) for i in range(3)], threads=3), strict=True)
    assert numbers == (0, 1, 2)
    assert len(set(threads)) == 3


def test_threads_that_were_ended_are_started_again_by_the_next_run():
    divided, meet = RowThreads(2), threading.Barrier(2, timeout=30)

    def work():
        meet.wait()
        return threading.current_thread()

    first = divided.run([work] * 2, threads=2)
    divided.end_threads()
    assert [thread for thread in first if thread.is_alive()] == [threading.current_thread()]
    assert len(set(divided.run([work] * 2, threads=2))) == 2


def test_nobody_waits_for_helpers_that_have_not_begun():
    divided, go_on = RowThreads(2), threading.Event()
    begun, meet = [], threading.Barrier(2, timeout=30)

    def long():
        meet.wait()
        begun.append(threading.current_thread())
        if threading.current_thread() is not caller:
            go_on.wait(30)

    def another_run():
        divided.run([long] * 2, threads=2)

    caller = threading.Thread(target=another_run)
    caller.start()
    until(lambda: len(begun) == 2)  # the only helper has work for as long as this test likes
    assert divided.run([threading.current_thread] * 3, threads=2) == [threading.current_thread()] * 3
    assert caller.is_alive()
    go_on.set()
    caller.join()


def test_one_thread_is_the_callers():
    assert RowThreads(1).run([threading.current_thread] * 3, threads=1) == [threading.current_thread()] * 3


@pytest.mark.parametrize("at_most", [0, 1])
def test_where_no_more_threads_can_be_started_those_that_there_are_do_it_all(monkeypatch, at_most):
    divided, meet, offered = RowThreads(4), threading.Barrier(1 + at_most, timeout=30), []
    submit = divided._pool.submit

    def submit_few(*work):
        if len(offered) == at_most:
            raise RuntimeError("can't start new thread")
        offered.append(submit(*work))
        return offered[-1]

    monkeypatch.setattr(divided._pool, "submit", submit_few)
    assert len(divided.run([meet.wait] * (1 + at_most), threads=4)) == 1 + at_most
    assert all(each.done() for each in offered)


@pytest.mark.parametrize("at_fault", ["caller", "helper"])
def test_a_fault_is_raised_once_all_that_has_begun_has_ended_and_nothing_more_is_begun(at_fault):
    meet, failed, caller, ended = threading.Barrier(2, timeout=30), threading.Event(), threading.current_thread(), []

    def work():
        meet.wait()  # both have one
        if (threading.current_thread() is caller) == (at_fault == "caller"):
            failed.set()
            raise ZeroDivisionError
        failed.wait(30)
        burn(0.05)
        ended.append(threading.current_thread())

    with pytest.raises(ZeroDivisionError):
        RowThreads(2).run([work] * 50, threads=2)
    assert len(ended) == 1


@pytest.mark.parametrize("count", [2, 3, 17, 33, 64, 100])
def test_rows_divided_over_threads_are_bitwise_rows_in_order(graph, monkeypatch, count):
    monkeypatch.setattr(rows, "THREAD_SECONDS", 0.0)
    model, shape = graph
    session, trial = Runtime("cpu", threads=1).session(model), random_rows({"x": shape}, frozenset({"x"}))
    threads = RowThreads(3)
    divided, ordered = BatchInvariantRunner(session, trial, threads=threads), BatchInvariantRunner(session, trial)
    runs = counted(threads, monkeypatch)
    x = np.random.RandomState(count).random_sample((count, *shape)).astype(np.float32)
    expected = ordered.run({"x": x})
    for _ in range(3):  # the first time nobody knows what a row costs
        assert same(divided.run({"x": x}), expected)
    assert max(number for _, number in runs) >= 2


def test_the_first_run_of_many_rows_is_divided_once_one_batch_has_told_what_rows_cost(graph, monkeypatch):
    monkeypatch.setattr(rows, "THREAD_SECONDS", 0.0)
    model, shape = graph
    session, trial = Runtime("cpu", threads=1).session(model), random_rows({"x": shape}, frozenset({"x"}))
    threads = RowThreads(2)
    runs = counted(threads, monkeypatch)
    BatchInvariantRunner(session, trial, threads=threads).run({"x": np.zeros((160, *shape), np.float32)})
    assert runs == [(4, 2)]


def test_the_trials_of_sizes_are_not_taken_for_the_cost_of_rows(monkeypatch):
    model, shape = gated_mlp("Gemm")
    session = Runtime("cpu", threads=1).session(model)
    runner = BatchInvariantRunner(session, random_rows({"x": shape}), threads=RowThreads(2))
    find = runner._find_sizes

    def slowly():
        burn(0.5)
        return find()

    monkeypatch.setattr(runner, "_find_sizes", slowly)
    runner.run({"x": np.zeros((2, *shape), np.float32)})
    assert 0 < runner._seconds_per_row < 0.5 / (2 + rows.RUN_ROWS)


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
    session, trial = Runtime("cpu", threads=1).session(model), random_rows({"x": shape}, frozenset({"x"}))
    runner = BatchInvariantRunner(session, trial, threads=RowThreads(4))
    monkeypatch.setattr(rows, "THREAD_SECONDS", 1.0)
    for seconds, count, threads in [(0.01, 64, 1), (0.1, 64, 2), (1, 64, 4), (1, 3, 2), (1, 1, 1), (0, 64, 1)]:
        runner._seconds_per_row = seconds
        assert runner._threads_for(count) == threads, (seconds, count)
    many = BatchInvariantRunner(session, trial, threads=RowThreads(64))
    many._seconds_per_row = 1.0
    monkeypatch.setattr(rows, "THREAD_SECONDS", 1e-9)
    assert [many._threads_for(count) for count in (2, 3, 1000)] == [2, 3, rows.MAX_THREADS]


def test_a_session_of_several_threads_is_not_divided():
    model, shape = gated_mlp("Gemm")
    session = Runtime("cpu", threads=2).session(model)
    runner = BatchInvariantRunner(session, random_rows({"x": shape}), threads=RowThreads(4))
    runner._seconds_per_row = 10.0
    assert runner._threads_for(64) == 1


DIVIDES_EVERY_RUN = """
import os
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as main does, before numpy is imported
from service.inference import batch_invariance
batch_invariance.THREAD_SECONDS = -1.0
from service.__main__ import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="several workers need Linux")
def test_a_large_request_to_a_worker_is_answered_bitwise_as_small_ones(tmp_path):
    shutil.copytree(EXPORTED / "mnist", tmp_path / "mnist")
    x = np.random.RandomState(0).randint(0, 256, (1024, 1, 28, 28), dtype=np.uint8)
    with workers(tmp_path, start=("-c", DIVIDES_EVERY_RUN)) as service, service.client() as client:
        assert len(service.logged("model loaded")) == 1  # by the master, whose threads have ended before it forks

        def encoded(images):
            headers = {**NPY, "accept": "application/x-npy"}
            return np.load(io.BytesIO(client.post("/v1/encode", content=npy(images), headers=headers).content))

        expected = np.concatenate([encoded(x[i : i + 8]) for i in range(0, 1024, 8)])
        assert encoded(x).tobytes() == expected.tobytes()
