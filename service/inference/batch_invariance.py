"""Running a graph so that a row's answer does not depend on the rows beside it, bitwise.

ONNX Runtime does not promise that by itself. Measured with 1.31 on x86: the kernels of some operators (TWO_PATHS below;
float64 Exp and Tanh) have a vectorised path and a scalar one, and the two differ in the last bit for up to 60% of
values. The scalar path takes the last elements of a tensor, beyond a multiple of the vector's length, and those where
threads divide the work. A Gemm may have a kernel of its own for a single row, and a sum is taken in another order from
an odd address on (service.inference.row_sums: such graphs are served a row at a time).

So a graph runs at a few batch sizes only. Where it holds an operator of two paths these are multiples of 4 rows, a
vector's length, on one thread: the scalar path is then never taken. And every size is first tried on random rows: it is
used if every row at every position comes out bitwise as it does alone. A graph that passes at no size is served a row
at a time, slower and still right.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from service.aligned import aligned_empty, is_aligned
from service.inference.device_binding import BoundSession, Value
from service.inference.row_threads import RowThreads

TWO_PATHS = frozenset(
    {"Acos", "Asin", "Atan", "Celu", "Cos", "Elu", "Log", "Mish", "ReduceLogSum", "ReduceLogSumExp", "Selu", "Sin"}
    | {"Softplus"}
)
VECTOR = 4  # float32 numbers that ONNX Runtime's general kernels take at once (SSE, NEON); 2 of float64
SIZES = (1, 2, 4, 8, 16, 32)
DEVICE_SIZES = (*SIZES, 64, 128)  # a device computes more at once; how far this pays was never measured
# Trials of a size: each puts other rows at every position. Large rows have more numbers in one trial, and need fewer.
MAX_TRIALS, MIN_TRIALS, TRIAL_ELEMENTS = 24, 6, 2**16
RUN_ROWS = 2  # rows that cost as much as the overhead of a run; more for small networks, fewer for large ones
THREAD_SECONDS = 0.0005  # that another thread costs: it wakes, and the weights are read into its caches, too
NEWEST = 0.3  # weight of the newest measurement of a row's cost
MAX_THREADS = 16
MAX_BATCHES = 2  # of the largest size, in rows that all threads of a run hold together: memory that stays taken
MAX_ELEMENTS = 2**21  # of one input or output at one run: bounds memory, and time at start, for large images

MAX_KEPT, MAX_KEPT_BYTES = 16, 2**20  # arrays of ``same`` that a runner keeps repeated for all rows; bytes of one

Arrays = dict[str, np.ndarray]
NOTHING: Mapping[str, np.ndarray] = {}


class Batch(NamedTuple):
    """The rows from ``start`` up to ``end``, which are padded to ``size`` rows for a run."""

    start: int
    end: int
    size: int


class BatchInvariantRunner:
    """Runs a session on any number of rows, which are the first axis of all inputs and outputs.

    Args:
        trial_rows: returns so many typical rows, all different, for the trials; it is called on first use.
        sizes: batch sizes to try, by default those for ``memory``; (1,) is one row at a time, without a trial.
        vectors: whether the graph has operators of two paths, and so needs batches of whole vectors.
        threads: those that many rows are divided over if the session itself has one thread; None: the caller's alone.
        memory: the device that inputs and outputs are bound to (service.inference.device_binding); None: plain runs.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        trial_rows: Callable[[int], Arrays],
        sizes: Sequence[int] | None = None,
        vectors: bool = False,
        threads: RowThreads | None = None,
        memory: str | None = None,
    ) -> None:
        bound = None if memory is None else BoundSession(session, memory)
        self._run_session = session.run if bound is None else bound.run
        self._keep: Callable[[np.ndarray], Value] = _itself if bound is None else bound.keep
        self._trial_rows = trial_rows
        self._outputs = [output.name for output in session.get_outputs()]
        self._candidates = sizes_in(memory) if sizes is None else tuple(sizes)
        self._vectors = vectors
        divides = memory is None and session.get_session_options().intra_op_num_threads == 1
        self._threads = threads if threads is not None and divides else RowThreads(1)
        self._seconds_per_row = 0.0  # of one CPU, in which a run counts RUN_ROWS rows more than it has
        self._sizes: tuple[int, ...] | None = (1,) if self._candidates == (1,) else None
        self._same: OrderedDict[tuple[str, int, int], tuple[np.ndarray, Value]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes in use, ascending; trials choose them on first use."""
        if self._sizes is not None:
            return self._sizes
        with self._lock:
            if self._sizes is None:
                self._sizes = self._find_sizes()
        return self._sizes

    def run(
        self, feeds: Arrays, same: Mapping[str, np.ndarray] = NOTHING, outputs: Sequence[str] | None = None
    ) -> Arrays:
        """Run the graph on the rows of ``feeds``, and return its outputs by name.

        Args:
            feeds: inputs by name, float32 with equal first axes of length at least 1.
            same: inputs that are the same for all rows, by name, without an axis of rows. They may be kept, and must
                not be written to afterwards.
            outputs: names of the outputs to return, all by default.
        """
        names = self._outputs if outputs is None else list(outputs)
        count = len(next(iter(feeds.values())))
        if count == 1:
            batches = [self._run_at(self.sizes[0], feeds, same, names)]
        else:
            batches = self._run_many(count, feeds, same, names)
        if len(batches) == 1:
            return dict(zip(names, batches[0], strict=True))
        return {name: _join([batch[i] for batch in batches]) for i, name in enumerate(names)}

    def _run_many(
        self, count: int, feeds: Arrays, same: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> list[list[np.ndarray]]:
        """Return the outputs of each batch. The first batch ever runs before all others: it measures what rows cost."""
        first = batch_sizes(self.sizes, count)[0]
        if self._seconds_per_row or first >= count:
            return self._run_batches(count, feeds, same, names)
        head, rest = ({name: value[at] for name, value in feeds.items()} for at in (slice(first), slice(first, None)))
        return self._run_batches(first, head, same, names) + self._run_batches(count - first, rest, same, names)

    def _run_batches(
        self, count: int, feeds: Arrays, same: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> list[list[np.ndarray]]:
        """Return the outputs of each batch, which are divided over as many threads as is expected to be fastest."""
        threads = self._threads_for(count)
        batches, began = batches_of(self.sizes, count, threads), time.perf_counter()
        if len(batches) == 1:
            outputs = [self._run_at(batches[0].size, feeds, same, names)]
        else:
            parts = [{name: value[start:end] for name, value in feeds.items()} for start, end, _ in batches]
            works = [
                partial(self._run_at, size, part, same, names) for part, (*_, size) in zip(parts, batches, strict=True)
            ]
            outputs = self._threads.run(works, threads)
        self._learn((time.perf_counter() - began) * threads / _cost(batches))
        return outputs

    def _threads_for(self, count: int) -> int:
        """Return how many threads ``count`` rows are best divided over."""
        if self._seconds_per_row * (count - 1) <= THREAD_SECONDS:
            return 1
        max_threads = min(count, self._threads.count, MAX_THREADS)
        return min(range(1, max_threads + 1), key=lambda threads: self._expected_seconds(count, threads))

    def _expected_seconds(self, count: int, threads: int) -> float:
        """Return how long ``count`` rows are expected to take on ``threads`` threads."""
        cost = _cost(batches_of(self.sizes, count, threads))
        return self._seconds_per_row * cost / threads + THREAD_SECONDS * (threads - 1)

    def _learn(self, seconds: float) -> None:
        """Average the newest measurement of the seconds per row with those before."""
        self._seconds_per_row += (NEWEST if self._seconds_per_row else 1.0) * (seconds - self._seconds_per_row)

    def _run_at(
        self,
        size: int,
        feeds: Arrays,
        same: Mapping[str, np.ndarray] = NOTHING,
        names: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """Return the outputs for at most ``size`` rows, which are padded to exactly ``size`` for the session."""
        count = len(next(iter(feeds.values())))
        padded: dict[str, Value] = {name: _padded(value, size) for name, value in feeds.items()}
        for name, value in same.items():
            padded[name] = self._repeated(name, value, size)
        outputs: list[np.ndarray] = self._run_session(names or self._outputs, padded)
        return outputs if count == size else [output[:count] for output in outputs]

    def _repeated(self, name: str, value: np.ndarray, size: int) -> Value:
        """Repeat ``value`` in ``size`` rows; small ones are kept, in the memory that graphs read, by their array."""
        key = (name, size, id(value))
        kept = self._same.get(key)
        if kept is not None and kept[0] is value:
            return kept[1]
        rows = _padded(value[None], size)
        if rows.nbytes > MAX_KEPT_BYTES:
            return rows
        repeated = self._keep(rows)
        with self._lock:
            self._same[key] = value, repeated
            while len(self._same) > MAX_KEPT:
                self._same.popitem(last=False)
        return repeated

    def _find_sizes(self) -> tuple[int, ...]:
        """Return the candidates that agree with the smallest size with which the largest candidate agrees."""
        rows = self._trial_rows(max(self._candidates))
        best: tuple[int, ...] = (1,)
        for smallest in self._smallest(rows):
            alone = self._alone(smallest, rows)
            elements = _elements((*rows.values(), *alone))
            candidates = [size for size in self._candidates if size > smallest and size * elements <= MAX_ELEMENTS]
            if smallest > 1 and not self._agrees(smallest, rows, alone):
                continue
            larger = [size for size in candidates if self._agrees(size, rows, alone)]
            if max(larger, default=1) > max(best):
                best = (smallest, *larger)
            if max(best) >= max(candidates, default=1):
                break
        return best

    def _smallest(self, rows: Arrays) -> tuple[int, ...]:
        """Return the sizes that a single row may be padded to, in the order in which they are tried.

        Whole vectors are needed for operators of two paths, and for rows of one number, for which Pow has a third path.
        """
        whole = self._vectors or any(value[0].size == 1 for value in rows.values())
        return (VECTOR,) if whole else (1, 2, VECTOR)

    def _alone(self, size: int, rows: Arrays) -> list[np.ndarray]:
        """Run every row by itself, padded with copies of it to ``size`` rows; return all rows of each output."""
        total = len(next(iter(rows.values())))
        runs = [self._run_at(size, {name: value[i : i + 1] for name, value in rows.items()}) for i in range(total)]
        return [np.concatenate([run[output] for run in runs]) for output in range(len(self._outputs))]

    def _agrees(self, size: int, rows: Arrays, alone: list[np.ndarray]) -> bool:
        """True if rows in batches of ``size``, shuffled differently in each trial, come out as they do ``alone``."""
        random = np.random.RandomState(size)
        trials = min(MAX_TRIALS, max(MIN_TRIALS, TRIAL_ELEMENTS // _elements((*rows.values(), *alone))))
        batch = {name: aligned_empty((size, *value.shape[1:]), value.dtype) for name, value in rows.items()}
        for _ in range(trials):
            order = random.permutation(len(next(iter(rows.values()))))[:size]
            for name, value in rows.items():
                np.take(value, order, axis=0, out=batch[name], mode="clip")  # which does not fill a buffer first
            outputs = self._run_at(size, batch)
            expected = [single.take(order, 0) for single in alone]
            if not all(map(_same_bits, outputs, expected)):
                return False
        return True


def sizes_in(memory: str | None) -> tuple[int, ...]:
    """Return the batch sizes to try for a graph that computes in that device's memory; None is the host's."""
    return SIZES if memory is None else DEVICE_SIZES


def random_rows(shapes: dict[str, tuple[int, ...]], uniform: frozenset[str] = frozenset()) -> Callable[[int], Arrays]:
    """Return a function that draws so many trial rows, float32: in [0, 1) for inputs in ``uniform``, else N(0, 1)."""

    def rows(count: int) -> Arrays:
        random = np.random.RandomState(0)
        draws = {name: random.random_sample if name in uniform else random.standard_normal for name in shapes}
        return {name: draw((count, *shapes[name])).astype(np.float32) for name, draw in draws.items()}

    return rows


def batch_sizes(sizes: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Return the cheapest batch sizes, of the ascending ``sizes``, for so many rows; the last batch may be padded.

    A run is taken to cost as much as its rows, those that pad it too, and RUN_ROWS more.
    """
    whole = (rows - 1) // sizes[-1]
    last = _sizes_of_few(sizes, rows - whole * sizes[-1])
    return (sizes[-1],) * whole + last if whole else last


@lru_cache(maxsize=4096)
def batches_of(sizes: tuple[int, ...], rows: int, threads: int) -> tuple[Batch, ...]:
    """Divide so many rows into equal shares for the threads, and each share into batches of the ``sizes``.

    Many threads have small batches, so that all together hold no more rows at once than MAX_BATCHES batches of the
    largest size, or one batch each of the smallest.
    """
    max_size = max(sizes[0], MAX_BATCHES * sizes[-1] // threads)
    small = tuple(size for size in sizes if size <= max_size)
    batches = []
    for start, end in pairwise([rows * share // threads for share in range(threads + 1)]):
        for size in batch_sizes(small, end - start):
            batches.append(Batch(start, min(start + size, end), size))
            start += size
    return tuple(batches)


def _cost(batches: Iterable[Batch]) -> int:
    """Return what the batches cost, in rows."""
    return sum(batch.size + RUN_ROWS for batch in batches)


@lru_cache(maxsize=1024)
def _sizes_of_few(sizes: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Return what ``batch_sizes`` returns, for no more rows than the largest size."""
    padded = (next(size for size in sizes if size >= rows),)
    fitting = [size for size in sizes if size < rows]
    if not fitting:
        return padded
    split = (fitting[-1], *_sizes_of_few(sizes, rows - fitting[-1]))
    return min(padded, split, key=lambda plan: sum(plan) + RUN_ROWS * len(plan))


def _padded(value: np.ndarray, size: int) -> np.ndarray:
    """Copy ``value`` into an aligned array of ``size`` rows, padded with its last row; itself if it is one already."""
    count = len(value)
    if count == size and is_aligned(value):
        return value
    result = aligned_empty((size, *value.shape[1:]), value.dtype)
    result[:count] = value
    if count < size:
        result[count:] = value[-1]
    return result


def _itself(value: np.ndarray) -> np.ndarray:
    return value


def _elements(values: Iterable[np.ndarray]) -> int:
    """Return how many numbers the largest row among several arrays of rows has."""
    return max(value[0].size for value in values)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Join arrays of rows into one that is aligned, so that the next graph's batches need not be copied."""
    if len(parts) == 1:
        return parts[0]
    joined = aligned_empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate(parts, out=joined)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()
