"""The limit that a service made of bare HTTP and raw ONNX Runtime would have, and what share of it was reached.

Both sides want the same cores, so that their times a request add up: L = 1 / (1 / HTTP + n / ORT) requests/s for n
images a request. There are two of them, and a result holds both:

- ``of_best``: ORT at its best batch and layout of processes and threads. What many connections could be given.
- ``of_one``: ORT with one request's images at a time and one caller, in its best layout. What one connection could be
  given, since one that waits for its answer leaves nothing to be batched.

HTTP is at the number of connections of the requests that are compared with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.crew import Block


def limit(http: float, raw: float, batch: int) -> float:
    """Requests/s, of ``http`` requests/s and ``raw`` images/s, where ``batch`` images make a request."""
    return 1 / (1 / http + batch / raw)


@dataclass(frozen=True)
class Yardstick:
    """What stands beside one block of the service: bare HTTP in requests/s, raw ONNX Runtime at its best and alone."""

    http: float
    best: Block
    one: Block
    batch: int
    connections: int

    @property
    def of_best(self) -> float:
        """The limit of many connections, requests/s."""
        return limit(self.http, self.best.images_per_second, self.batch)

    @property
    def of_one(self) -> float:
        """The limit of one connection, requests/s."""
        return limit(self.http, self.one.images_per_second, self.batch)

    @property
    def limit(self) -> float:
        """The one that these connections have, requests/s."""
        return self.of_one if self.connections == 1 else self.of_best

    @property
    def raw_cpu(self) -> float:
        """CPU seconds that raw ONNX Runtime takes for the images of one request."""
        block = self.one if self.connections == 1 else self.best
        return block.cpu_per_image * self.batch
