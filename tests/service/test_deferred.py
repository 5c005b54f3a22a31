"""What is gathered over turns of the event loop is handed on together, and never lost."""

import asyncio

import pytest

from service import deferred as gathered
from service.deferred import Gathered, flush_all
from service.logs import configure_logs
from tests.service.http import serving

NEVER = 1e6


@pytest.fixture
def pause(monkeypatch):
    return lambda seconds: monkeypatch.setattr(gathered, "PAUSE_SECONDS", seconds)


def test_items_of_a_turn_are_handed_on_together_in_their_order(pause):
    told = []
    pause(0.0)

    async def body():
        gathered = Gathered(told.append)
        for item in (1, 2, 3):
            gathered.add(item)
        assert told == []
        await asyncio.sleep(0)
        gathered.add(4)
        await asyncio.sleep(0)

    asyncio.run(body())
    assert told == [[1, 2, 3], [4]]


def test_so_are_those_of_several_turns_until_the_pause_is_over(pause):
    told = []
    pause(0.5)

    async def body():
        over = asyncio.Event()
        gathered = Gathered(lambda items: (told.append(items), len(told) == 2 and over.set()))
        gathered.add(1)
        await asyncio.sleep(0)
        assert told == [[1]]  # the first turn waits for nothing
        gathered.add(2)
        await asyncio.sleep(0)
        gathered.add(3)
        await asyncio.wait_for(over.wait(), 60)

    asyncio.run(body())
    assert told == [[1], [2, 3]]


@pytest.mark.parametrize("hand_on", [lambda _: flush_all(), lambda gathered: gathered.flush()])
def test_nobody_need_wait_for_the_pause(pause, hand_on):
    told = []
    pause(NEVER)

    async def body():
        gathered = Gathered(told.append)
        for item in (1, 2, 3):
            gathered.add(item)
            await asyncio.sleep(0)
        assert told == [[1]]
        hand_on(gathered)
        hand_on(gathered)

    asyncio.run(body())
    assert told == [[1], [2, 3]]


def test_at_once_where_no_loop_runs(pause):
    told = []
    pause(NEVER)
    gathered = Gathered(told.append)
    gathered.add(1)
    gathered.add(2)
    assert told == [[1], [2]]


def test_a_loop_that_ends_before_its_turn_holds_nothing_back():
    told = []
    gathered = Gathered(told.append)
    for item in (1, 2):
        loop = asyncio.new_event_loop()
        loop.call_soon(gathered.add, item)
        loop.call_soon(loop.stop)
        loop.run_forever()  # what was called for the next turn is never run
        loop.close()
    assert told == []
    asyncio.run(turn(gathered))
    assert told == [[1, 2, 3]]


async def turn(gathered):
    gathered.add(3)
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
