"""The worker pool: bounded, and work whose client has left never runs."""

import asyncio
import threading

import pytest

from service.errors import ClientDisconnected, DeadlineExceeded, Overloaded
from service.inference.thread_pool import WorkerPool


async def never():
    await asyncio.Event().wait()


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, timeout=30))


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


def test_queued_work_of_a_client_that_left_never_runs_and_frees_its_slot():
    async def scenario():
        pool = WorkerPool(concurrency=1, queue=1, timeout=30)
        release, ran = threading.Event(), []
        busy = asyncio.create_task(pool.run(release.wait, never))
        await until(lambda: pool.pending == 1)
        left = asyncio.Event()
        queued = asyncio.create_task(pool.run(lambda: ran.append("queued"), left.wait))
        await until(lambda: pool.pending == 2)
        with pytest.raises(Overloaded):
            await pool.run(lambda: None, never)
        left.set()
        with pytest.raises(ClientDisconnected):
            await queued
        await until(lambda: pool.pending == 1)
        release.set()
        assert await busy is True
        assert await pool.run(lambda: "next", never) == "next"
        assert ran == []
        await until(lambda: pool.pending == 0)
        pool.close()

    run(scenario())


def test_a_deadline_leaves_the_slot_taken_until_the_work_has_ended():
    async def scenario():
        pool = WorkerPool(concurrency=1, queue=0, timeout=0.01)
        release = threading.Event()
        with pytest.raises(DeadlineExceeded):
            await pool.run(release.wait, never)
        with pytest.raises(Overloaded):
            await pool.run(lambda: None, never)
        release.set()
        await until(lambda: pool.pending == 0)
        pool.close()

    run(scenario())


def test_an_error_of_the_work_is_the_callers():
    async def scenario():
        pool = WorkerPool(concurrency=1, queue=0, timeout=30)
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 / 0, never)
        await until(lambda: pool.pending == 0)
        pool.close()

    run(scenario())
