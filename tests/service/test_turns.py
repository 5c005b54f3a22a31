"""What is gathered in a turn of the event loop is handed on once, and never lost."""

import asyncio

from service.turns import Gathered


def test_items_of_a_turn_are_handed_on_together_in_their_order():
    told = []

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


def test_at_once_where_no_loop_runs():
    told = []
    Gathered(told.append).add(1)
    assert told == [[1]]


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
