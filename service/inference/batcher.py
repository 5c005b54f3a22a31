"""The batcher: jobs that wait at the same time are computed in one batch, and none waits for others to come.

The first job of a key is started as soon as the event loop has read what has arrived with it; jobs that arrive while
it runs make up the next batch. Where jobs wait when a batch ends, they wait a little longer, by a small share of the
batch's time: its callers have their answers now, and many ask again at once. Without that pause two halves of the
callers would take turns for ever, in batches of half the size.

A batch that is known to be short runs on the event loop itself, since a hop to a thread and back costs more; any other
runs on the pool. A row's result is bitwise that of the row alone (service.inference.batch_invariance), so that no
caller can tell whose rows were beside its own.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from service.errors import Overloaded, VaeserveError, forget_frames
from service.inference.jobs import Job, split_result
from service.inference.thread_pool import WaitForDisconnect, WorkerPool

MAX_ROWS = 32  # in a batch of several jobs: the largest run of service.inference.batch_invariance
MIN_SHORT_ROWS = 4  # rows that must be short together: what runs on the event loop keeps all others waiting
INLINE_SECONDS = 0.003  # that a batch may take on the event loop, where every other connection waits for it
PAUSE = 1 / 8  # share of a batch's time for which the next one waits for its callers, who may ask again
BATCH_SECONDS = 0.1  # that a batch may take on the pool: nobody waits much longer for others' rows than for its own
MAX_COSTS = 512  # keys whose seconds per row are remembered
FEW_ROWS = 8  # of which each takes longer than one of many
NEWEST = 0.3  # weight of the newest measurement


@dataclass(slots=True, eq=False)
class Ticket:
    """A job that waits for its batch, and the future of its result."""

    job: Job
    result: asyncio.Future[Any]

    @property
    def abandoned(self) -> bool:
        """True if nobody waits for the result any more: the future was cancelled."""
        return self.result.done()

    def settle(self, result: Any) -> None:
        """Set the result, or raise the exception that is the result where it is awaited, unless nobody waits."""
        if self.result.done():
            return
        if isinstance(result, Exception):
            self.result.set_exception(result)
        else:
            self.result.set_result(result)


class Queue(NamedTuple):
    """What jobs must have in common to be computed together; ``short`` jobs are computed on the event loop."""

    key: Hashable
    dtype: str
    short: bool


class Pause(NamedTuple):
    """A wait until a queue holds ``enough_rows`` rows, or until ``timer`` ends it."""

    enough_rows: float
    timer: asyncio.TimerHandle


class Computed(NamedTuple):
    """The outcome of a batch of ``rows`` rows; a result is that of one ticket, or the exception that it is to raise."""

    results: list[Any]
    rows: int
    seconds: float


FAILED = 0, 0.0  # rows and seconds of a batch that failed: it tells nothing of the cost of rows


class Batcher:
    """Runs jobs for the requests of one event loop, which alone may call it.

    At most ``max_concurrent_batches`` of a key run at once on the pool: as many as there are CPUs for, since more would
    only be smaller. ``observe`` is called with the number of rows of every batch.
    """

    def __init__(
        self, pool: WorkerPool, max_concurrent_batches: int = 1, observe: Callable[[int], None] = lambda rows: None
    ) -> None:
        self._pool, self._observe = pool, observe
        self._max_concurrent = min(max_concurrent_batches, pool.concurrency)
        self._waiting: dict[Queue, deque[Ticket]] = {}
        self._under_way: Counter[Queue] = Counter()
        self._pauses: dict[Queue, Pause] = {}
        self._row_seconds: OrderedDict[Hashable, float] = OrderedDict()  # by key, and whether of few rows

    async def run(self, job: Job, disconnected: WaitForDisconnect) -> Any:
        """Compute a job, with others of its key, and return its result.

        ``disconnected()`` returns when the client has closed its connection. A job that is computed on the event loop
        has no deadline: it is done before one could be noticed.

        Raises:
            Overloaded, DeadlineExceeded, ClientDisconnected: as WorkerPool.run does; and what the job itself raises.
        """
        self._pool.acquire()
        ticket = Ticket(job, asyncio.get_running_loop().create_future())
        queue = Queue(job.key, job.rows.dtype.str, self.is_short(job.key, len(job.rows)))
        self._enqueue(queue, ticket)
        return await (ticket.result if queue.short else self._pool.wait(ticket.result, disconnected))

    def is_short(self, key: Hashable, rows: int) -> bool:
        """True if a batch of ``rows`` rows of that key is known to be short enough for the event loop."""
        return self._seconds_per_row(key, rows) * max(rows, MIN_SHORT_ROWS) <= INLINE_SECONDS

    def _enqueue(self, queue: Queue, ticket: Ticket) -> None:
        """Add a ticket to its queue; start a batch if it is the first one there, or ends a pause."""
        waiting = self._waiting.setdefault(queue, deque())
        waiting.append(ticket)
        pause = self._pauses.get(queue)
        if len(waiting) == 1 or (pause is not None and _count_rows(waiting) >= pause.enough_rows):
            self._schedule(queue)

    def _schedule(self, queue: Queue) -> None:
        """Have the next batch started once the event loop has read what else has arrived."""
        pause = self._pauses.pop(queue, None)
        if pause is not None:
            pause.timer.cancel()
        if self._waiting.get(queue) and self._under_way[queue] < self._max_concurrent:
            _call_behind_tasks(self._start, queue)  # requests that are read by now enqueue their jobs first

    def _start(self, queue: Queue) -> None:
        """Compute the next batch of a queue: here if it is short, else on the pool."""
        if self._under_way[queue] >= self._max_concurrent:
            return
        tickets = self._take(queue)
        if not tickets:
            return
        if queue.short:
            self._settle(tickets, _compute(tickets))
            self._schedule(queue)
            return
        try:
            future = asyncio.wrap_future(self._pool.start(lambda: _compute(tickets)))
        except Overloaded as error:
            self._settle(tickets, Computed([error] * len(tickets), *FAILED))
            self._schedule(queue)
            return
        self._under_way[queue] += 1
        future.add_done_callback(lambda done: self._end_batch(queue, tickets, done))
        self._schedule(queue)

    def _take(self, queue: Queue) -> list[Ticket]:
        """Take the tickets of the next batch out of a queue, and drop those that are abandoned."""
        max_rows = self._max_rows(queue)
        chosen: list[Ticket] = []
        waiting, rows = self._waiting.get(queue, deque()), 0
        while waiting and (not chosen or rows + len(waiting[0].job.rows) <= max_rows):
            ticket = waiting.popleft()
            if ticket.abandoned:
                self._pool.release()
                continue
            chosen.append(ticket)
            rows += len(ticket.job.rows)
        if not waiting:
            self._waiting.pop(queue, None)
        return chosen

    def _max_rows(self, queue: Queue) -> float:
        """Return how many rows a batch of several jobs may have; one job alone may have more."""
        allowed = INLINE_SECONDS if queue.short else BATCH_SECONDS
        return min(MAX_ROWS, allowed / max(self._seconds_per_row(queue.key, MAX_ROWS), 1e-9))

    def _end_batch(self, queue: Queue, tickets: list[Ticket], done: asyncio.Future[Computed]) -> None:
        """Settle the tickets of a batch that the pool has computed, then go on with what waits."""
        self._under_way[queue] -= 1
        if not self._under_way[queue]:
            del self._under_way[queue]
        stopping = Computed([Overloaded("the service is stopping")] * len(tickets), *FAILED)
        computed = stopping if done.cancelled() else done.result()
        self._settle(tickets, computed)
        waiting_rows, max_rows = _count_rows(self._waiting.get(queue, ())), self._max_rows(queue)
        if 0 < waiting_rows < max_rows:
            enough_rows = min(waiting_rows + computed.rows, max_rows)
            _call_behind_tasks(self._pause, queue, enough_rows, computed.seconds * PAUSE)  # when these have answers
        else:
            self._schedule(queue)

    def _pause(self, queue: Queue, enough_rows: float, seconds: float) -> None:
        """Have the next batch started when ``enough_rows`` rows wait, or after ``seconds``."""
        if _count_rows(self._waiting.get(queue, ())) >= enough_rows:
            self._schedule(queue)
        elif queue not in self._pauses:
            timer = asyncio.get_running_loop().call_later(seconds, self._schedule, queue)
            self._pauses[queue] = Pause(enough_rows, timer)

    def _settle(self, tickets: list[Ticket], computed: Computed) -> None:
        """Give each ticket its result and each slot back to the pool; learn from the batch what rows cost."""
        self._pool.release(len(tickets))
        key = tickets[0].job.key
        for ticket, result in zip(tickets, computed.results, strict=True):
            ticket.settle(result)
        if computed.rows:
            self._learn(key, computed.rows, computed.seconds)
            self._observe(computed.rows)

    def _seconds_per_row(self, key: Hashable, rows: int) -> float:
        """Return the measured seconds of a row among some ``rows`` rows; inf before the first measurement.

        Few rows cost more each than many do. Known by one number alone, jobs would go to and fro between the event
        loop, which takes few, and the pool, which takes many.
        """
        is_few = rows <= FEW_ROWS
        seconds = self._row_seconds.get((key, is_few))
        return self._row_seconds.get((key, not is_few), math.inf) if seconds is None else seconds

    def _learn(self, key: Hashable, rows: int, seconds: float) -> None:
        """Average the seconds per row of a batch of ``rows`` rows with those measured before."""
        cost_key = key, rows <= FEW_ROWS
        before = self._row_seconds.get(cost_key, seconds / rows)
        self._row_seconds[cost_key] = before + NEWEST * (seconds / rows - before)
        self._row_seconds.move_to_end(cost_key)
        while len(self._row_seconds) > MAX_COSTS:
            self._row_seconds.popitem(last=False)


def _call_behind_tasks(function: Callable[..., None], *arguments: Any) -> None:
    """Call the function when all tasks that are ready by now, or wait for a result that is set, have taken a step."""
    loop = asyncio.get_running_loop()
    loop.call_soon(loop.call_soon, function, *arguments)


def _count_rows(tickets: Iterable[Ticket]) -> int:
    return sum(len(ticket.job.rows) for ticket in tickets)


def _compute(tickets: list[Ticket]) -> Computed:
    """Compute the batch of the tickets on the calling thread."""
    job, rows = tickets[0].job, [ticket.job.rows for ticket in tickets]
    started = time.perf_counter()
    try:
        result = job.run(rows[0] if len(rows) == 1 else np.concatenate(rows))
        seconds = time.perf_counter() - started
        ends = list(accumulate(map(len, rows)))
        parts = [result] if len(rows) == 1 else split_result(result, list(map(slice, [0, *ends], ends)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is for the callers
        if isinstance(error, VaeserveError):
            forget_frames(error)
        # One of several jobs may be at fault, and the error's text may name a row: so each is computed alone.
        alone = [error] if len(tickets) == 1 else [_compute([ticket]).results[0] for ticket in tickets]
        return Computed(alone, *FAILED)
    return Computed(parts, ends[-1], seconds)
