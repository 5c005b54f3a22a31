"""An open loop: requests leave when they would have come, whether or not earlier ones are answered.

Arrivals are a Poisson process. A latency counts from the moment at which the request was meant to leave, so that the
wait for a server that is behind is in it, also while no connection is free ("coordinated omission", Tene 2013: a closed
loop asks less of a slow server and does not see its worst).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import uvloop

from bench.load import PATIENCE, Connection, LoadError, Target
from bench.timer import Timer

REFUSED = (429, 503)
LEAD = 0.02  # seconds before the first request


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Moments in [0, seconds) of a Poisson process of ``rate`` events/s, float64, rising; never none."""
    random = np.random.RandomState(seed)
    gaps = random.exponential(1 / rate, size=max(8, int(2 * rate * seconds + 50)))
    moments = np.cumsum(gaps)
    return moments[: max(1, int(np.searchsorted(moments, seconds)))]


@dataclass
class OpenLoad:
    """One block: ``latencies`` (s) of the answered requests, how many were ``refused``, ``late`` (s) is how far behind
    its schedule the client itself sent, at the 99th percentile; ``cpu`` (s) is the client's."""

    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    seconds: float = 0.0
    late: float = 0.0
    cpu: float = 0.0


def drive_open(target: Target, connections: int, moments: Sequence[float]) -> OpenLoad:
    """Send the request at each of ``moments`` (s from the start), over at most so many connections.

    Raises LoadError for another status than 200, 429 or 503 and for a lost connection, TimeoutError.
    """
    return uvloop.run(_drive(target, connections, moments))


async def _drive(target: Target, connections: int, moments: Sequence[float]) -> OpenLoad:
    loop, schedule = asyncio.get_running_loop(), _Schedule(target.request, moments)
    made = [
        (await loop.create_connection(lambda: _Idle(schedule), target.host, target.port))[1] for _ in range(connections)
    ]
    cpu = time.process_time()
    try:
        async with asyncio.timeout(moments[-1] + PATIENCE):
            await schedule.run(made)
    finally:
        schedule.close()
        for connection in made:
            connection.close()
    schedule.load.cpu = time.process_time() - cpu
    return schedule.load


class _Schedule:
    """When each request is due, which connections are idle, and what waits for one."""

    def __init__(self, request: bytes, moments: Sequence[float]) -> None:
        self.load = OpenLoad()
        self._request, self._moments = request, moments
        self._next = 0
        self._idle: list[_Idle] = []
        self._waiting: deque[float] = deque()
        self._open = len(moments)
        self._behind: list[float] = []
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._timer = Timer(self._due)

    async def run(self, connections: list[_Idle]) -> None:
        """Until all are answered. Raises LoadError."""
        self._idle = list(connections)
        self._start = time.perf_counter() + LEAD
        self._timer.at(self._start + self._moments[0])
        await self._finished
        self.load.seconds = time.perf_counter() - self._start
        self.load.late = float(np.percentile(self._behind, 99))

    def _due(self) -> None:
        """Send everything whose moment has come."""
        now = time.perf_counter()
        while self._next < len(self._moments) and (moment := self._start + self._moments[self._next]) <= now:
            self._next += 1
            self._behind.append(now - moment)
            if self._idle:
                self._idle.pop().begin(self._request, moment)
            else:
                self._waiting.append(moment)
        if self._next < len(self._moments):
            self._timer.at(self._start + self._moments[self._next])

    def answered(self, connection: _Idle, status: int, moment: float) -> None:
        """Note the latency, and let the connection take what waits."""
        if status == 200:
            self.load.latencies.append(time.perf_counter() - moment)
        elif status in REFUSED:
            self.load.refused += 1
        else:
            self.failed(f"an answer had status {status}")
        self._open -= 1
        if self._waiting:
            connection.begin(self._request, self._waiting.popleft())
        else:
            self._idle.append(connection)
        if not self._open and not self._finished.done():
            self._finished.set_result(None)

    def failed(self, reason: str) -> None:
        """The block is of no use."""
        if not self._finished.done():
            self._finished.set_exception(LoadError(reason))

    def close(self) -> None:
        """Send no more."""
        self._finished.cancel()
        self._timer.close()


class _Idle(Connection):
    """Sends what the schedule gives it."""

    def __init__(self, schedule: _Schedule) -> None:
        super().__init__()
        self._schedule = schedule
        self._moment = 0.0

    def begin(self, request: bytes, moment: float) -> None:
        """Send the request that was due at ``moment`` (on time.perf_counter)."""
        self._moment = moment
        self.send(request)

    def answered(self, status: int) -> None:
        self._schedule.answered(self, status, self._moment)

    def failed(self, reason: str) -> None:
        self._schedule.failed(reason)
