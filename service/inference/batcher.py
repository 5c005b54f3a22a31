"""The batcher: jobs that wait at the same time are computed in one batch, and none waits while nothing runs.

The first job of a key is started as soon as the event loop has read what has arrived with it; jobs that arrive while
it runs make up the next batch. Where such wait when a batch lands, they wait a little longer, by a small share of what
that batch took: its callers have their answers, and many ask again at once. Without that two halves of the callers
take turns for ever, in batches of half the size.

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
from service.inference.jobs import Job, parts_of
from service.inference.thread_pool import WaitForDisconnect, WorkerPool

MAX_ROWS = 32  # in a batch of several jobs: the largest run of service.inference.batch_invariance
MIN_SHORT_ROWS = 4  # rows that must be short together: what runs on the event loop keeps all others waiting
INLINE_SECONDS = 0.003  # that a batch may take on the event loop, where every other connection waits for it
PAUSE = 1 / 8  # share of a batch's time for which the next one waits for its callers, who may ask again
BATCH_SECONDS = 0.1  # that a batch may take on the pool: nobody waits much longer for others' rows than for its own
KNOWN_COSTS = 512
# Weights of the newest measurement of a cost: a batch that took longer may have waited for the interpreter.
NEWEST_IF_FASTER, NEWEST_IF_SLOWER = 0.3, 0.05


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
    """What jobs must share to be computed together: the key, the dtype of their rows, and whether they are short."""

    key: Hashable
    dtype: str
    short: bool


class Pause(NamedTuple):
    """A wait until ``enough`` rows are in a queue, or until the timer ``end``."""

    enough: float
    end: asyncio.TimerHandle


class Computed(NamedTuple):
    """The outcome of a batch: each ticket's result, or the exception that is its result, its rows and its seconds."""

    results: list[Any]
    rows: int
    seconds: float


FAILED = 0, 0.0  # rows and seconds of a batch that tells nothing of the cost of rows


class Batcher:
    """Runs jobs for the requests of one event loop; only that loop may call it.

    At most ``max_concurrent_batches`` of a key run at once on the pool: as many as find a CPU, since more would only be
    smaller. ``observe`` is called with the rows of every batch.
    """

    def __init__(
        self, pool: WorkerPool, max_concurrent_batches: int = 1, observe: Callable[[int], None] = lambda rows: None
    ) -> None:
        self._pool, self._observe = pool, observe
        self._max_concurrent = min(max_concurrent_batches, pool.concurrency)
        self._waiting: dict[Queue, deque[Ticket]] = {}
        self._under_way: Counter[Queue] = Counter()
        self._pauses: dict[Queue, Pause] = {}
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()  # a row, by key

    async def run(self, job: Job, disconnected: WaitForDisconnect) -> Any:
        """The job's result. ``disconnected()`` returns when the client has closed its connection.

        A job that will be computed on the event loop has no deadline: it is done before one could be noticed.

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
        return self._seconds_of(key) * max(rows, MIN_SHORT_ROWS) <= INLINE_SECONDS

    def _enqueue(self, queue: Queue, ticket: Ticket) -> None:
        waiting = self._waiting.setdefault(queue, deque())
        waiting.append(ticket)
        pause = self._pauses.get(queue)
        if len(waiting) == 1 or (pause is not None and _rows(waiting) >= pause.enough):
            self._go_on(queue)

    def _go_on(self, queue: Queue) -> None:
        """Start the next batch once the event loop has read what else has arrived."""
        pause = self._pauses.pop(queue, None)
        if pause is not None:
            pause.end.cancel()
        if self._waiting.get(queue) and self._under_way[queue] < self._max_concurrent:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._start, queue)  # requests that are read by now enqueue their jobs first

    def _start(self, queue: Queue) -> None:
        if self._under_way[queue] >= self._max_concurrent:
            return
        tickets = self._next(queue)
        if not tickets:
            return
        if queue.short:
            self._settle(tickets, _compute(tickets))
            self._go_on(queue)
            return
        try:
            future = asyncio.wrap_future(self._pool.start(lambda: _compute(tickets)))
        except Overloaded as error:
            self._settle(tickets, Computed([error] * len(tickets), *FAILED))
            return
        self._under_way[queue] += 1
        future.add_done_callback(lambda done: self._landed(queue, tickets, done))
        self._go_on(queue)

    def _next(self, queue: Queue) -> list[Ticket]:
        """Waiting tickets for one batch, those left out whose callers have gone."""
        most = self._most_rows(queue)
        chosen: list[Ticket] = []
        waiting, rows = self._waiting.get(queue, deque()), 0
        while waiting and (not chosen or rows + len(waiting[0].job.rows) <= most):
            ticket = waiting.popleft()
            if ticket.abandoned:
                self._pool.release()
                continue
            chosen.append(ticket)
            rows += len(ticket.job.rows)
        if not waiting:
            self._waiting.pop(queue, None)
        return chosen

    def _most_rows(self, queue: Queue) -> float:
        """In a batch of several jobs."""
        allowed = INLINE_SECONDS if queue.short else BATCH_SECONDS
        return min(MAX_ROWS, allowed / max(self._seconds_of(queue.key), 1e-9))

    def _landed(self, queue: Queue, tickets: list[Ticket], done: asyncio.Future[Computed]) -> None:
        self._under_way[queue] -= 1
        if not self._under_way[queue]:
            del self._under_way[queue]
        stopping = Computed([Overloaded("the service is stopping")] * len(tickets), *FAILED)
        computed = stopping if done.cancelled() else done.result()
        self._settle(tickets, computed)
        waiting, most = _rows(self._waiting.get(queue, ())), self._most_rows(queue)
        if 0 < waiting < most:
            self._pause(queue, min(waiting + computed.rows, most), computed.seconds * PAUSE)
        else:
            self._go_on(queue)

    def _pause(self, queue: Queue, enough: float, seconds: float) -> None:
        """Go on when so many rows wait, or after that time."""
        if queue not in self._pauses:
            end = asyncio.get_running_loop().call_later(seconds, self._go_on, queue)
            self._pauses[queue] = Pause(enough, end)

    def _settle(self, tickets: list[Ticket], computed: Computed) -> None:
        """Hand each ticket its result, or raise it where it is awaited, and give back the slots."""
        self._pool.release(len(tickets))
        key = tickets[0].job.key
        for ticket, result in zip(tickets, computed.results, strict=True):
            ticket.settle(result)
        if computed.rows:
            self._learn(key, computed.seconds / computed.rows)
            self._observe(computed.rows)

    def _seconds_of(self, key: Hashable) -> float:
        """Measured seconds per row; inf before the first measurement."""
        return self._seconds.get(key, math.inf)

    def _learn(self, key: Hashable, seconds: float) -> None:
        known = self._seconds.get(key, seconds)
        weight = NEWEST_IF_FASTER if seconds < known else NEWEST_IF_SLOWER
        self._seconds[key] = known + weight * (seconds - known)
        self._seconds.move_to_end(key)
        while len(self._seconds) > KNOWN_COSTS:
            self._seconds.popitem(last=False)


def _rows(tickets: Iterable[Ticket]) -> int:
    return sum(len(ticket.job.rows) for ticket in tickets)


def _compute(tickets: list[Ticket]) -> Computed:
    """Compute the batch of the tickets on the calling thread."""
    job, rows = tickets[0].job, [ticket.job.rows for ticket in tickets]
    started = time.perf_counter()
    try:
        result = job.run(rows[0] if len(rows) == 1 else np.concatenate(rows))
        seconds = time.perf_counter() - started
        ends = list(accumulate(map(len, rows)))
        parts = [result] if len(rows) == 1 else parts_of(result, list(map(slice, [0, *ends], ends)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is for the callers
        if isinstance(error, VaeserveError):
            forget_frames(error)
        # Of several one may be at fault, and its text may name a row: each alone.
        alone = [error] if len(tickets) == 1 else [_compute([ticket]).results[0] for ticket in tickets]
        return Computed(alone, *FAILED)
    return Computed(parts, ends[-1], seconds)
