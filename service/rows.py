"""Running a graph so that a row's answer does not depend on the rows beside it, bitwise.

ONNX Runtime does not promise that by itself. Measured with 1.31 on x86: its Eigen kernels (Softplus, Log, float64 Exp
and Log, ReduceSum) take a vectorised path and a scalar one, chosen by an element's place in the whole tensor, and the
two differ in the last bit for 15 to 50% of values; the tensor is also cut at other places for another batch size. A
Gemm may have a kernel of its own for a single row.

So a graph runs at a few batch sizes only, and each size is first tried on random rows: a size is used when every row at
every place comes out bitwise as it does alone. Networks of Gemm, Conv and the usual nonlinearities pass at all sizes; a
graph that does not pass is served a row at a time, slower and still right.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime as ort

SIZES = (1, 8, 32)
SMALLEST = (1, 2, 4)
TRIALS = (
    24  # a place with two paths stays unseen with probability below 0.85**24 = 2%, and a graph has many such places
)
MAX_ELEMENTS = 2**21  # of one input or output at one run: bounds memory, and time at start, for large images

Arrays = dict[str, np.ndarray]


class RowRunner:
    """Runs a session on any number of rows, all inputs and outputs having the rows as their first axis.

    Arguments: ``session``; ``trial_rows`` gives that many typical rows, all different, for the trials (called on first
    use); ``sizes`` the batch sizes to try, (1,) for one row at a time without a trial.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        trial_rows: Callable[[int], Arrays],
        sizes: Sequence[int] = SIZES,
    ) -> None:
        self._session = session
        self._trial_rows = trial_rows
        self._outputs = [output.name for output in session.get_outputs()]
        self._candidates = tuple(sizes)
        self._sizes: tuple[int, ...] | None = (1,) if self._candidates == (1,) else None
        self._lock = threading.Lock()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes in use, ascending; they are found by trial on first use."""
        with self._lock:
            if self._sizes is None:
                self._sizes = self._find_sizes()
        return self._sizes

    def run(self, feeds: Arrays) -> Arrays:
        """Outputs for ``feeds`` (float32, equal first axes of length at least 1)."""
        total = len(next(iter(feeds.values())))
        parts: list[list[np.ndarray]] = []
        start = 0
        while start < total:
            size = _next_size(self.sizes, total - start)
            stop = min(start + size, total)
            outputs = self._run_at(size, {name: value[start:stop] for name, value in feeds.items()})
            parts.append([output[: stop - start] for output in outputs])
            start = stop
        return {name: _join([part[i] for part in parts]) for i, name in enumerate(self._outputs)}

    def _run_at(self, size: int, feeds: Arrays) -> list[np.ndarray]:
        return self._session.run(self._outputs, {name: _padded(value, size) for name, value in feeds.items()})

    def _find_sizes(self) -> tuple[int, ...]:
        """The candidates that agree with the smallest size that lets the largest candidate agree."""
        rows = self._trial_rows(max(self._candidates))
        best: tuple[int, ...] = (1,)
        for smallest in SMALLEST:
            alone = self._alone(smallest, rows)
            elements = max(value[0].size for value in (*rows.values(), *alone))
            candidates = [size for size in self._candidates if size > smallest and size * elements <= MAX_ELEMENTS]
            if smallest > 1 and not self._agrees(smallest, rows, alone):
                continue
            larger = [size for size in candidates if self._agrees(size, rows, alone)]
            if max(larger, default=1) > max(best):
                best = (smallest, *larger)
            if max(best) >= max(candidates, default=1):
                break
        return best

    def _alone(self, size: int, rows: Arrays) -> list[np.ndarray]:
        """Every row run by itself, at the head of a batch of ``size`` padded with copies of it."""
        total = len(next(iter(rows.values())))
        runs = [self._run_at(size, {name: value[i : i + 1] for name, value in rows.items()}) for i in range(total)]
        return [np.concatenate([run[output][:1] for run in runs]) for output in range(len(self._outputs))]

    def _agrees(self, size: int, rows: Arrays, alone: list[np.ndarray]) -> bool:
        """Whether rows in batches of ``size``, differently shuffled in each trial, come out as they do alone."""
        random = np.random.RandomState(size)
        for _ in range(TRIALS):
            order = random.permutation(len(next(iter(rows.values()))))[:size]
            outputs = self._run_at(size, {name: value[order] for name, value in rows.items()})
            if not all(_same_bits(output, single[order]) for output, single in zip(outputs, alone, strict=True)):
                return False
        return True


def random_rows(shapes: dict[str, tuple[int, ...]], uniform: frozenset[str] = frozenset()) -> Callable[[int], Arrays]:
    """Trial rows of random float32 numbers: in [0, 1) for the inputs named in ``uniform``, else standard normal."""

    def rows(count: int) -> Arrays:
        random = np.random.RandomState(0)
        draws = {name: random.random_sample if name in uniform else random.standard_normal for name in shapes}
        return {name: draw((count, *shapes[name])).astype(np.float32) for name, draw in draws.items()}

    return rows


def _next_size(sizes: tuple[int, ...], rows: int) -> int:
    """The largest size that fits, or the one above it when more than half of that would be filled."""
    for size in sizes:
        if size >= rows and (2 * rows > size or size == sizes[0]):
            return size
    return max(size for size in sizes if size <= rows)


def _padded(value: np.ndarray, size: int) -> np.ndarray:
    """A copy at an address divisible by 64, where vectorised kernels always start alike, padded with its last row."""
    length = size * int(np.prod(value.shape[1:])) * value.itemsize
    raw = np.empty(length + 64, np.uint8)
    start = -raw.ctypes.data % 64
    result = raw[start : start + length].view(value.dtype).reshape(size, *value.shape[1:])
    result[: len(value)] = value
    result[len(value) :] = value[-1]
    return result


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()
