"""Jobs of several requests in one run: what waits together runs together, and nobody gets another's result."""

import asyncio
import math
import threading

import numpy as np
import pytest

from service.errors import ClientDisconnected, DeadlineExceeded, InvalidInput, Overloaded
from service.inference import batcher as batching
from service.inference.batcher import INLINE_SECONDS, MAX_ROWS, Batcher
from service.inference.jobs import Job, finish, split_result
from service.inference.model import Encoding
from service.inference.thread_pool import WorkerPool


async def never():
    await asyncio.Event().wait()


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def scenario(body, concurrency=1, queue=100, timeout=30, max_concurrent=1):
    """``body(batcher, runs, pool)`` on a loop; ``runs`` collects the rows of every run."""

    async def whole():
        pool, runs = WorkerPool(concurrency, queue, timeout), []
        try:
            return await body(Batcher(pool, max_concurrent, runs.append), runs, pool)
        finally:
            pool.close()

    return asyncio.run(asyncio.wait_for(whole(), timeout=30))


def doubled(rows):
    return Encoding(2 * rows, rows + 1, rows[:, None])


def job(*numbers, key="double", run=doubled):
    return Job(key, np.array(numbers, np.float32)[:, None], run)


def costs(batcher, seconds, key="double"):
    """A row of that key takes so many seconds, among few rows or many."""
    for is_few in (True, False):
        batcher._row_seconds[key, is_few] = seconds


async def known(batcher, key="double"):
    """What a row of that key costs is known from here on, and little; of what is not, each job runs alone."""
    await batcher.run(job(0, key=key), never)
    costs(batcher, 1e-5, key)


async def learnt_as_long(batcher, monkeypatch):
    """Known, and too long for the event loop."""
    await known(batcher)
    monkeypatch.setattr(batching, "INLINE_SECONDS", 0.0)


def costs_stay(monkeypatch):
    """Nothing is learnt of what a row takes."""
    monkeypatch.setattr(batching, "NEWEST", 0.0)


def assert_doubled(result, *numbers):
    np.testing.assert_array_equal(result.loc[:, 0], 2 * np.array(numbers))
    np.testing.assert_array_equal(result.samples[:, 0, 0], numbers)


def test_what_arrives_together_runs_together_and_each_gets_its_own_rows():
    async def body(batcher, runs, pool):
        await known(batcher)
        results = await asyncio.gather(*(batcher.run(job(i, -i), never) for i in range(5)))
        for i, result in enumerate(results):
            assert_doubled(result, i, -i)
        assert runs == [1, 10]

    scenario(body)


def test_a_short_job_runs_on_the_event_loop_and_a_long_or_unknown_one_on_the_pool(monkeypatch):
    async def body(batcher, runs, pool):
        threads = []
        here = job(1, run=lambda rows: threads.append(threading.current_thread()) or rows)
        await batcher.run(here, never)
        costs(batcher, 1e-5)
        await batcher.run(here, never)
        monkeypatch.setattr(batching, "INLINE_SECONDS", 0.0)
        await batcher.run(here, never)
        assert [thread is threading.main_thread() for thread in threads] == [False, True, False]

    scenario(body)


def test_what_arrives_while_a_batch_is_under_way_makes_up_the_next_one(monkeypatch):
    async def body(batcher, runs, pool):
        release, begun = threading.Event(), threading.Event()

        def slow(rows):
            begun.set()
            release.wait()
            return rows

        await learnt_as_long(batcher, monkeypatch)
        first = asyncio.create_task(batcher.run(job(0, run=slow), never))
        await until(begun.is_set)
        others = [asyncio.create_task(batcher.run(job(i, run=slow), never)) for i in range(1, 8)]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(first, *others)
        assert runs == [1, 1, 7]

    scenario(body)


@pytest.mark.parametrize(
    ("seconds", "rows", "here"), [(0.0001, 1, True), (0.001, 1, False), (0.00004, 64, True), (0.00006, 64, False)]
)
def test_only_what_is_short_as_a_good_batch_runs_on_the_event_loop(seconds, rows, here):
    """A row of 1 ms alone would hold up nobody, but on the pool others wait with it and make up a batch. Many rows are
    one already."""

    async def body(batcher, runs, pool):
        await known(batcher)
        threads = []
        costs(batcher, max(seconds, 1e-5))
        seen = job(
            *range(rows), run=lambda rows: threads.append(threading.current_thread() is threading.main_thread()) or rows
        )
        await batcher.run(seen, never)
        assert threads == [here]

    scenario(body)


def test_what_a_row_takes_is_learnt_of_few_rows_and_of_many():
    async def body(batcher, runs, pool):
        assert batcher._seconds_per_row("double", 1) == math.inf
        batcher._learn("double", 32, 3.2)
        assert batcher._seconds_per_row("double", 1) == batcher._seconds_per_row("double", 32) == pytest.approx(0.1)
        batcher._learn("double", 2, 2.0)
        batcher._learn("double", 2, 4.0)
        assert batcher._seconds_per_row("double", 8) == pytest.approx(1.3)
        assert batcher._seconds_per_row("double", 9) == pytest.approx(0.1)

    scenario(body)


def test_rows_that_are_short_in_large_batches_alone_stay_on_the_pool():
    """Else they would go to the event loop, be found to be long there, come back, be found to be short, and so on."""

    async def body(batcher, runs, pool):
        batcher._learn("double", 4, 4 * 1.01 * INLINE_SECONDS / 4)
        for _ in range(50):
            batcher._learn("double", 32, 32 * 0.4 * INLINE_SECONDS / 4)
        assert not batcher.is_short("double", 1)

    scenario(body)


async def landing(batcher, monkeypatch, waiting, pause, rows=1, seconds=0.0):
    """A batch of two lands while so many jobs of so many rows wait: their tasks, after some turns of the loop.

    ``seconds``: what a row is held to take, as long as it is not what keeps jobs from the event loop.
    """
    release = threading.Event()

    def slow(rows):
        release.wait()
        return doubled(rows)

    await learnt_as_long(batcher, monkeypatch)
    monkeypatch.setattr(batching, "PAUSE", pause)
    costs_stay(monkeypatch)  # or who waits here is told that a row takes long
    first = [asyncio.create_task(batcher.run(job(number, run=slow), never)) for number in range(2)]
    try:
        await until(lambda: sum(batcher._under_way.values()))
        others = [asyncio.create_task(batcher.run(job(*[number] * rows), never)) for number in range(waiting)]
        await asyncio.sleep(0)
        costs(batcher, max(seconds, 1e-5))
    finally:
        release.set()
    await asyncio.gather(*first)
    for _ in range(5):
        await asyncio.sleep(0)
    return others


def test_those_who_wait_when_a_batch_lands_are_joined_by_its_callers(monkeypatch):
    async def body(batcher, runs, pool):
        others = await landing(batcher, monkeypatch, waiting=3, pause=1e9)
        assert runs == [1, 2]
        more = [asyncio.create_task(batcher.run(job(number), never)) for number in (3, 4)]
        for number, result in enumerate(await asyncio.gather(*others, *more)):
            assert_doubled(result, number)
        assert runs == [1, 2, 5]

    scenario(body)


def test_the_wait_for_the_callers_of_a_batch_ends(monkeypatch):
    async def body(batcher, runs, pool):
        others = await landing(batcher, monkeypatch, waiting=3, pause=0.1)
        await asyncio.gather(*others)
        assert runs == [1, 2, 3]

    scenario(body)


@pytest.mark.parametrize(("count", "rows", "seconds"), [(2, MAX_ROWS // 2, 0.0), (2, MAX_ROWS, 0.0), (1, 1, 0.1)])
def test_a_whole_batch_is_counted_in_rows_and_in_what_they_take(monkeypatch, count, rows, seconds):
    """There is no pause, which would last for ever here, where one more job would not fit into the next batch."""

    async def body(batcher, runs, pool):
        others = await landing(batcher, monkeypatch, count, 1e9, rows, seconds)
        for number, result in enumerate(await asyncio.gather(*others)):
            assert_doubled(result, *[number] * rows)
        assert sum(runs) == 1 + 2 + count * rows
        assert batcher._pauses == {}

    scenario(body)


@pytest.mark.parametrize("waiting", [0, MAX_ROWS])
def test_where_nobody_waits_or_a_whole_batch_there_is_no_pause(monkeypatch, waiting):
    async def body(batcher, runs, pool):
        others = await landing(batcher, monkeypatch, waiting, pause=1e9)
        await asyncio.gather(*others)
        await batcher.run(job(0), never)
        assert sum(runs) == 1 + 2 + waiting + 1

    scenario(body)


def test_who_gives_up_in_the_pause_is_not_computed(monkeypatch):
    async def body(batcher, runs, pool):
        others = await landing(batcher, monkeypatch, waiting=3, pause=1e9)
        others[1].cancel()
        await asyncio.gather(*others, *(batcher.run(job(number), never) for number in (3, 4)), return_exceptions=True)
        assert runs == [1, 2, 4]
        assert pool.pending == 0

    scenario(body)


@pytest.mark.parametrize("max_concurrent", [1, 2])
def test_as_many_batches_run_at_once_as_find_a_cpu(monkeypatch, max_concurrent):
    async def body(batcher, runs, pool):
        release, begun = threading.Event(), []

        def slow(rows):
            begun.append(len(rows))
            release.wait()
            return rows

        await learnt_as_long(batcher, monkeypatch)
        waiting = []
        try:
            for number in range(4):
                waiting.append(asyncio.create_task(batcher.run(job(number, run=slow), never)))
                for _ in range(5):
                    await asyncio.sleep(0)  # turns of the loop, in which it would be started
                assert sum(batcher._under_way.values()) == min(len(waiting), max_concurrent)
                await until(lambda: len(begun) == min(len(waiting), max_concurrent))
        finally:
            release.set()
        await asyncio.gather(*waiting)
        assert begun == [1] * max_concurrent + [4 - max_concurrent]

    scenario(body, concurrency=4, max_concurrent=max_concurrent)


def test_a_batch_has_so_many_rows_at_most_but_a_larger_job_runs_whole(monkeypatch):
    costs_stay(monkeypatch)

    async def body(batcher, runs, pool):
        await known(batcher)
        costs(batcher, 1e-6)  # as it stays: all of these are short, whatever this machine is busy with
        sizes = [20, 20, 5, 3 * MAX_ROWS, 1]
        results = await asyncio.gather(*(batcher.run(job(*range(size)), never) for size in sizes))
        for size, result in zip(sizes, results, strict=True):
            assert_doubled(result, *range(size))
        assert runs == [1, 20, 25, 3 * MAX_ROWS, 1]

    scenario(body)


def test_jobs_of_different_keys_never_mix():
    async def body(batcher, runs, pool):
        await known(batcher)
        await known(batcher, "negate")
        other = [batcher.run(job(i, key="negate", run=lambda rows: -rows), never) for i in range(3)]
        results = await asyncio.gather(*other, *(batcher.run(job(i), never) for i in range(3)))
        assert [float(result[0, 0]) for result in results[:3]] == [0, -1, -2]
        for i, result in enumerate(results[3:]):
            assert_doubled(result, i)

    scenario(body)


def test_rows_of_different_kinds_never_mix():
    """8-bit levels would come out as floats beside pixels, and mean something else."""

    async def body(batcher, runs, pool):
        kinds = []

        def told(rows):
            kinds.append(rows.dtype)
            return doubled(rows)

        await known(batcher)
        levels = Job("double", np.array([[7]], np.uint8), told)
        await asyncio.gather(*(batcher.run(each, never) for each in (job(1, run=told), levels, job(2, run=told))))
        assert sorted(map(str, kinds)) == ["float32", "uint8"]
        assert runs == [1, 2, 1]

    scenario(body)


def test_one_bad_job_of_a_batch_fails_alone_and_in_its_own_words():
    def picky(rows):
        if (rows < 0).any():
            raise InvalidInput(f"row {int(np.argmax(rows[:, 0] < 0))}")
        return doubled(rows)

    async def body(batcher, runs, pool):
        await known(batcher)
        jobs = [job(1, 2, run=picky), job(3, -4, run=picky), job(5, run=picky)]
        results = await asyncio.gather(*(batcher.run(each, never) for each in jobs), return_exceptions=True)
        assert_doubled(results[0], 1, 2)
        assert_doubled(results[2], 5)
        assert str(results[1]) == "row 1"

    scenario(body)


def test_a_client_that_left_is_not_computed_for_and_holds_up_nobody(monkeypatch):
    async def body(batcher, runs, pool):
        release, begun, left = threading.Event(), threading.Event(), asyncio.Event()

        def slow(rows):
            begun.set()
            release.wait()
            return doubled(rows)

        await learnt_as_long(batcher, monkeypatch)
        first = asyncio.create_task(batcher.run(job(0, run=slow), never))
        await until(begun.is_set)
        gone = asyncio.create_task(batcher.run(job(1, 1, 1, run=slow), left.wait))
        waiting = [asyncio.create_task(batcher.run(job(i, run=slow), never)) for i in (2, 3)]
        await asyncio.sleep(0)
        left.set()
        with pytest.raises(ClientDisconnected):
            await gone
        release.set()
        for i, result in zip((0, 2, 3), await asyncio.gather(first, *waiting), strict=True):
            assert_doubled(result, i)
        assert runs == [1, 1, 2]
        await until(lambda: pool.pending == 0)

    scenario(body)


def test_a_full_queue_refuses_and_a_deadline_ends_the_wait():
    async def body(batcher, runs, pool):
        release = threading.Event()
        slow = job(1, run=lambda rows: release.wait() and rows)
        waiting = [asyncio.create_task(batcher.run(slow, never)) for _ in range(3)]
        await until(lambda: pool.pending == 3)
        try:
            with pytest.raises(Overloaded):  # one count for both ways
                await pool.run(lambda: None, never)
            with pytest.raises(Overloaded):
                await batcher.run(slow, never)
            for each in waiting:
                with pytest.raises(DeadlineExceeded):
                    await each
            with pytest.raises(Overloaded):  # the slots stay taken until the work has ended
                await batcher.run(slow, never)
        finally:
            release.set()
        await until(lambda: pool.pending == 0)
        assert_doubled(await batcher.run(job(1, key="after"), never), 1)

    scenario(body, concurrency=1, queue=2, timeout=0.2)


def test_finish_computes_one_job_after_the_other():
    def work():
        first = yield job(1, 2)
        second = yield job(*first.loc[:, 0])
        return second.loc[:, 0].tolist()

    assert finish(work()) == [4, 8]


def test_what_lies_along_the_rows_is_cut_and_all_else_goes_to_every_part():
    result = {"a": (np.arange(4), None), "k": 3, "none": (), "of": Encoding(*np.arange(12).reshape(3, 4))}
    first, second, nothing = split_result(result, [slice(0, 1), slice(1, 4), slice(4, 4)])
    for part, rows in ((first, [0]), (second, [1, 2, 3]), (nothing, [])):
        np.testing.assert_array_equal(part["a"][0], rows)
        assert (part["a"][1], part["k"], part["none"]) == (None, 3, ())
        assert isinstance(part["of"], Encoding)
        np.testing.assert_array_equal(part["of"].scale, np.array(rows) + 4)


def test_a_slow_rows_neighbours_wait_no_longer_than_a_batch_may_take(monkeypatch):
    async def body(batcher, runs, pool):
        await learnt_as_long(batcher, monkeypatch)
        costs(batcher, batching.BATCH_SECONDS / 3.5)
        costs_stay(monkeypatch)
        await asyncio.gather(*(batcher.run(job(i), never) for i in range(7)))
        assert runs == [1, 3, 3, 1]
        runs.clear()
        await asyncio.gather(*(batcher.run(job(i, key="unheard of"), never) for i in range(3)))
        assert runs[0] == 1

    scenario(body)


def test_nobody_is_left_waiting_where_counting_fails_or_results_are_no_rows():
    def refuse(rows):
        raise RuntimeError("no metrics today")

    async def body(batcher, runs, pool):
        odd = Job("odd", np.zeros((1, 1)), lambda rows: np.float64(3))
        assert await batcher.run(odd, never) == 3
        results = await asyncio.gather(*(batcher.run(odd, never) for _ in range(3)))
        assert results == [3, 3, 3]
        await known(batcher)
        batcher._observe = refuse
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        for _ in range(2):
            assert_doubled(await batcher.run(job(4), never), 4)

    scenario(body)


def test_a_closed_pool_refuses_and_keeps_no_slot():
    async def body(batcher, runs, pool):
        pool.close()
        with pytest.raises(Overloaded, match="stopping"):
            await batcher.run(job(1), never)
        assert pool.pending == 0

    scenario(body)
