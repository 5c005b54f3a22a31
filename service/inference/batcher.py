"""Requests that wait at the same time are computed in one run, and none waits where nothing is under way.

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
from typing import Any, NamedTuple, Protocol

import numpy as np

from service.errors import Overloaded, VaeserveError, forget_frames
from service.inference.jobs import Job, parts_of
from service.inference.thread_pool import Gone, WorkerPool

MOST_ROWS = 32  # in a batch of several jobs: the largest run of service.inference.batch_invariance
ENOUGH = 4  # rows so many of which must be short: what runs on the event loop keeps all others waiting
INLINE_SECONDS = 0.003  # what a batch may take on the event loop, where every other connection waits for it
PAUSE = 1 / 8  # of what a batch took: so long those who wait wait for its callers, who may ask again
BATCH_SECONDS = 0.1  # what a batch may take on the pool: nobody waits for others' rows much longer than for its own
KNOWN_COSTS = 512
NEWEST = 0.3  # weight of the newest measurement of a cost


class Ticket(Protocol):
    """One caller's job, and where its result goes."""

    job: Job

    @property
    def abandoned(self) -> bool:
        """Nobody waits for the result any more."""

    def settle(self, result: Any) -> None:
        """Take the result, or the exception that is the result. Must not raise."""

    def drop(self) -> None:
        """There will be none: it was abandoned before it was computed. Must not raise."""


@dataclass
class AwaitedTicket:
    """A ticket whose result is awaited."""

    job: Job
    result: asyncio.Future[Any]

    @property
    def abandoned(self) -> bool:
        """The result has been cancelled."""
        return self.result.done()

    def settle(self, result: Any) -> None:
        """Wake who waits, unless nobody does."""
        if self.result.done():
            return
        if isinstance(result, Exception):
            self.result.set_exception(result)
        else:
            self.result.set_result(result)

    def drop(self) -> None:
        """Nobody is there to be told."""


class Queue(NamedTuple):
    """Jobs that may be computed together: of one key and one dtype of rows, all of them short or none."""

    key: Hashable
    dtype: str
    short: bool


class Pause(NamedTuple):
    """Rows of a queue that are waited for, until the ``end``."""

    enough: float
    end: asyncio.TimerHandle


class Computed(NamedTuple):
    """Each ticket's result, or the exception that is its result; the rows of the run and what it took.

    ``seconds`` by the batcher's clock, ``lasted`` by the wall's.
    """

    results: list[Any]
    rows: int
    seconds: float
    lasted: float


class Batcher:
    """Runs jobs for the requests of one event loop; only that loop may call it.

    ``lanes``: batches of a key that run at once on the pool, as many as find a CPU; more would only be smaller ones.
    ``observe`` is told the rows of every batch. ``clock``, read on the thread that computes it, tells what one takes.
    That may be CPU time of this thread and of those that help it, which leaves out the waiting for the interpreter.
    """

    def __init__(
        self,
        pool: WorkerPool,
        lanes: int = 1,
        observe: Callable[[int], None] = lambda rows: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._pool, self._lanes, self._observe, self._clock = pool, min(lanes, pool.concurrency), observe, clock
        self._waiting: dict[Queue, deque[Ticket]] = {}
        self._under_way: Counter[Queue] = Counter()
        self._pauses: dict[Queue, Pause] = {}
        self._seconds: OrderedDict[Hashable, float] = OrderedDict()  # a row, by key

    async def run(self, job: Job, gone: Gone) -> Any:
        """The job's result. ``gone()`` returns when the client has left.

        Raises:
            Overloaded, DeadlineExceeded, ClientGone: as WorkerPool.run does; and what the job itself raises.
        """
        self._pool.enter()
        ticket = AwaitedTicket(job, asyncio.get_running_loop().create_future())
        queue = Queue(job.key, job.rows.dtype.str, self.is_short(job.key, len(job.rows)))
        self._enqueue(queue, ticket)
        return await (ticket.result if queue.short else self._pool.wait(ticket.result, gone))

    def is_short(self, key: Hashable, rows: int) -> bool:
        """Whether so many rows of that key are known to be computed on the event loop."""
        return self._seconds_of(key) * max(rows, ENOUGH) <= INLINE_SECONDS

    def take(self, ticket: Ticket) -> bool:
        """Have a job computed; its ticket is settled, or dropped. Whether that will be in a moment.

        Raises:
            Overloaded: there is no slot.
        """
        self._pool.enter()
        job = ticket.job
        queue = Queue(job.key, job.rows.dtype.str, self.is_short(job.key, len(job.rows)))
        self._enqueue(queue, ticket)
        return queue.short

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
        if self._waiting.get(queue) and self._under_way[queue] < self._lanes:
            asyncio.get_running_loop().call_soon(self._start, queue)

    def _start(self, queue: Queue) -> None:
        if self._under_way[queue] >= self._lanes:
            return
        tickets = self._next(queue)
        if not tickets:
            return
        if queue.short:
            self._settle(tickets, _computed(tickets, self._clock))
            self._go_on(queue)
            return
        try:
            future = asyncio.wrap_future(self._pool.start(lambda: _computed(tickets, self._clock)))
        except Overloaded as error:
            self._settle(tickets, Computed([error] * len(tickets), 0, 0.0, 0.0))
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
                self._pool.leave()
                ticket.drop()
                continue
            chosen.append(ticket)
            rows += len(ticket.job.rows)
        if not waiting:
            self._waiting.pop(queue, None)
        return chosen

    def _most_rows(self, queue: Queue) -> float:
        """In a batch of several jobs."""
        allowed = INLINE_SECONDS if queue.short else BATCH_SECONDS
        return min(MOST_ROWS, allowed / max(self._seconds_of(queue.key), 1e-9))

    def _landed(self, queue: Queue, tickets: list[Ticket], done: asyncio.Future[Computed]) -> None:
        self._under_way[queue] -= 1
        if not self._under_way[queue]:
            del self._under_way[queue]
        stopping = Computed([Overloaded("the service is stopping")] * len(tickets), 0, 0.0, 0.0)
        computed = stopping if done.cancelled() else done.result()
        self._settle(tickets, computed)
        waiting, most = _rows(self._waiting.get(queue, ())), self._most_rows(queue)
        if 0 < waiting < most:
            took = min(computed.seconds, computed.lasted)  # several threads have more seconds than pass
            self._pause(queue, min(waiting + computed.rows, most), took * PAUSE)
        else:
            self._go_on(queue)

    def _pause(self, queue: Queue, enough: float, seconds: float) -> None:
        """Go on when so many rows wait, or after that time."""
        if queue not in self._pauses:
            end = asyncio.get_running_loop().call_later(seconds, self._go_on, queue)
            self._pauses[queue] = Pause(enough, end)

    def _settle(self, tickets: list[Ticket], computed: Computed) -> None:
        """Hand each ticket its result, or raise it where it is awaited, and give back the slots."""
        self._pool.leave(len(tickets))
        key = tickets[0].job.key
        for ticket, result in zip(tickets, computed.results, strict=True):
            ticket.settle(result)
        if computed.rows:
            self._learn(key, computed.seconds / computed.rows)
            self._observe(computed.rows)

    def _seconds_of(self, key: Hashable) -> float:
        """What a row is known to take; for ever, as long as nothing is known."""
        return self._seconds.get(key, math.inf)

    def _learn(self, key: Hashable, seconds: float) -> None:
        known = self._seconds.get(key)
        self._seconds[key] = seconds if known is None else known + NEWEST * (seconds - known)
        self._seconds.move_to_end(key)
        while len(self._seconds) > KNOWN_COSTS:
            self._seconds.popitem(last=False)


def _rows(tickets: Iterable[Ticket]) -> int:
    return sum(len(ticket.job.rows) for ticket in tickets)


def _computed(tickets: list[Ticket], clock: Callable[[], float]) -> Computed:
    """On whatever thread this is."""
    first, rows = tickets[0].job, [ticket.job.rows for ticket in tickets]
    started, began = clock(), time.perf_counter()
    try:
        whole = first.run(rows[0] if len(rows) == 1 else np.concatenate(rows))
        seconds, lasted = clock() - started, time.perf_counter() - began
        if len(rows) == 1:
            return Computed([whole], len(rows[0]), seconds, lasted)
        ends = list(accumulate(map(len, rows)))
        parts = parts_of(whole, list(map(slice, [0, *ends], ends)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is for the callers
        if isinstance(error, VaeserveError):
            forget_frames(error)
        # Of several one may be at fault, and its text may name a row: each alone.
        alone = [error] if len(tickets) == 1 else [_computed([each], clock).results[0] for each in tickets]
        return Computed(alone, 0, 0.0, 0.0)
    return Computed(parts, ends[-1], seconds, lasted)
