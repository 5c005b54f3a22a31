"""What is queued over iterations of the event loop is written together, and never lost."""

import asyncio

import pytest

from service import deferred
from service.deferred import DeferredWriter, flush_all
from service.logs import configure_logs
from tests.service.http import serving

NEVER = 1e6


@pytest.fixture
def pause(monkeypatch):
    return lambda seconds: monkeypatch.setattr(deferred, "PAUSE_SECONDS", seconds)


def test_items_of_an_iteration_are_written_together_in_their_order(pause):
    written = []
    pause(0.0)

    async def body():
        writer = DeferredWriter(written.append)
        for item in (1, 2, 3):
            writer.add(item)
        assert written == []
        await asyncio.sleep(0)
        writer.add(4)
        await asyncio.sleep(0)

    asyncio.run(body())
    assert written == [[1, 2, 3], [4]]


def test_so_are_those_of_several_turns_until_the_pause_is_over(pause):
    written = []
    pause(0.5)

    async def body():
        over = asyncio.Event()
        writer = DeferredWriter(lambda items: (written.append(items), len(written) == 2 and over.set()))
        writer.add(1)
        await asyncio.sleep(0)
        assert written == [[1]]  # the first turn waits for nothing
        writer.add(2)
        await asyncio.sleep(0)
        writer.add(3)
        await asyncio.wait_for(over.wait(), 60)

    asyncio.run(body())
    assert written == [[1], [2, 3]]


@pytest.mark.parametrize("flush", [lambda _: flush_all(), lambda writer: writer.flush()])
def test_nobody_need_wait_for_the_pause(pause, flush):
    written = []
    pause(NEVER)

    async def body():
        writer = DeferredWriter(written.append)
        for item in (1, 2, 3):
            writer.add(item)
            await asyncio.sleep(0)
        assert written == [[1]]
        flush(writer)
        flush(writer)

    asyncio.run(body())
    assert written == [[1], [2, 3]]


def test_at_once_where_no_loop_runs(pause):
    written = []
    pause(NEVER)
    writer = DeferredWriter(written.append)
    writer.add(1)
    writer.add(2)
    assert written == [[1], [2]]


def test_a_loop_that_ends_before_its_turn_holds_nothing_back():
    written = []
    writer = DeferredWriter(written.append)
    for item in (1, 2):
        loop = asyncio.new_event_loop()
        loop.call_soon(writer.add, item)
        loop.call_soon(loop.stop)
        loop.run_forever()  # what was called for the next turn is never run
        loop.close()
    assert written == []
    asyncio.run(turn(writer))
    assert written == [[1, 2, 3]]


async def turn(writer):
    writer.add(3)
    await asyncio.sleep(0)


def test_a_server_that_has_stopped_has_logged_all_its_requests(ppca_root, pause, capsys):
    configure_logs("info", "json")
    pause(NEVER)
    with serving(ppca_root) as client:
        for _ in range(5):
            assert client.get("/readyz").status_code == 200
        soon = capsys.readouterr().err.count('"route":"/readyz"')
    assert soon <= 1  # the others wait
    assert soon + capsys.readouterr().err.count('"route":"/readyz"') == 5
