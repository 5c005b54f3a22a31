"""Running a graph so that a row's answer does not depend on the rows beside it, bitwise.

ONNX Runtime does not promise that by itself. Measured with 1.31 on x86: the kernels of some operators (TWO_PATHS below;
float64 Exp and Tanh) take a vectorised path and a scalar one, and the two differ in the last bit for up to 60% of
values. Scalar are the last elements of a tensor, beyond a multiple of the vector, and those where threads share out
the work. A Gemm may have a kernel of its own for a single row, and a sum starts differently on an odd address.

So a graph runs at a few batch sizes only. Where it holds an operator of two paths these are multiples of 4 rows, a
vector's length, on one thread: there is then no scalar path. And every size is first tried on random rows: it is used
when every row at every place comes out bitwise as it does alone. A graph that does not pass is served a row at a time,
slower and still right.
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
DEVICE_SIZES = (*SIZES, 64, 128)  # a device has more to do at once; how far this pays was never measured
# Trials a size: each puts other rows at every place. Large rows bring more places to one, cost more, and take fewer.
MAX_TRIALS, MIN_TRIALS, TRIAL_ELEMENTS = 24, 6, 2**16
RUN = 2  # rows that take about as long as what every run takes besides; small networks more, large ones less
HOP = 0.0005  # seconds that another thread costs: it wakes, and the weights are read into its caches, too
NEWEST = 0.3  # weight of the newest measurement of a row's cost
MAX_THREADS = 16
AT_ONCE = 2  # batches of the largest size whose rows all threads of a run hold together: memory that stays
MAX_ELEMENTS = 2**21  # of one input or output at one run: bounds memory, and time at start, for large images

KEPT_SAME, KEPT_BYTES = 16, 2**20  # arrays of ``same`` that a runner keeps spread over rows, and bytes of one

Arrays = dict[str, np.ndarray]
NOTHING: Mapping[str, np.ndarray] = {}


class Batch(NamedTuple):
    """Rows ``start`` to ``end``, run as ``size`` rows."""

    start: int
    end: int
    size: int


class BatchInvariantRunner:
    """Runs a session on any number of rows, all inputs and outputs having the rows as their first axis.

    Arguments: ``session``; ``trial_rows`` gives that many typical rows, all different, for the trials (called on first
    use); ``sizes`` the batch sizes to try, (1,) for one row at a time without a trial, by default those of ``memory``;
    ``vectors`` whether the graph has operators of two paths, and so wants batches of whole vectors; ``threads`` those
    that many rows are divided over where the session has one thread itself, None for the caller's alone; ``memory``
    the device that inputs and outputs are bound to (service.inference.device_binding), None for plain runs.
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
        self._seconds = 0.0  # a row takes of one CPU; what each run takes besides are RUN rows
        self._sizes: tuple[int, ...] | None = (1,) if self._candidates == (1,) else None
        self._same: OrderedDict[tuple[str, int, int], tuple[np.ndarray, Value]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes in use, ascending; they are found by trial on first use."""
        if self._sizes is not None:
            return self._sizes
        with self._lock:
            if self._sizes is None:
                self._sizes = self._find_sizes()
        return self._sizes

    def run(
        self, feeds: Arrays, same: Mapping[str, np.ndarray] = NOTHING, outputs: Sequence[str] | None = None
    ) -> Arrays:
        """Outputs for ``feeds`` (float32, equal first axes of length at least 1) and what is the ``same`` for all rows.

        An array of ``same`` has no axis of rows; it may be kept, and must not be written to afterwards. ``outputs``:
        those that are wanted, all by default.
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
        """Outputs of each batch. The first batch ever comes before all others: it tells what rows cost."""
        first = batch_sizes(self.sizes, count)[0]
        if self._seconds or first >= count:
            return self._run_batches(count, feeds, same, names)
        head, rest = ({name: value[at] for name, value in feeds.items()} for at in (slice(first), slice(first, None)))
        return self._run_batches(first, head, same, names) + self._run_batches(count - first, rest, same, names)

    def _run_batches(
        self, count: int, feeds: Arrays, same: Mapping[str, np.ndarray], names: Sequence[str]
    ) -> list[list[np.ndarray]]:
        """As ``_run_many``, by this thread and those that help."""
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
        """How many threads so many rows are best divided over."""
        if self._seconds * (count - 1) <= HOP:
            return 1
        most = min(count, self._threads.count, MAX_THREADS)
        return min(range(1, most + 1), key=lambda threads: self._expected(count, threads))

    def _expected(self, count: int, threads: int) -> float:
        """Seconds that so many rows take so many threads."""
        return self._seconds * _cost(batches_of(self.sizes, count, threads)) / threads + HOP * (threads - 1)

    def _learn(self, seconds: float) -> None:
        self._seconds += (NEWEST if self._seconds else 1.0) * (seconds - self._seconds)

    def _run_at(
        self,
        size: int,
        feeds: Arrays,
        same: Mapping[str, np.ndarray] = NOTHING,
        names: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """Outputs for at most ``size`` rows, which the session sees as exactly so many."""
        count = len(next(iter(feeds.values())))
        whole: dict[str, Value] = {name: _padded(value, size) for name, value in feeds.items()}
        for name, value in same.items():
            whole[name] = self._spread(name, value, size)
        outputs: list[np.ndarray] = self._run_session(names or self._outputs, whole)
        return outputs if count == size else [output[:count] for output in outputs]

    def _spread(self, name: str, value: np.ndarray, size: int) -> Value:
        """``value`` in each of so many rows; small ones are kept there where graphs read, by the array they are of."""
        key = (name, size, id(value))
        kept = self._same.get(key)
        if kept is not None and kept[0] is value:
            return kept[1]
        rows = _padded(value[None], size)
        if rows.nbytes > KEPT_BYTES:
            return rows
        placed = self._keep(rows)
        with self._lock:
            self._same[key] = value, placed
            while len(self._same) > KEPT_SAME:
                self._same.popitem(last=False)
        return placed

    def _find_sizes(self) -> tuple[int, ...]:
        """The candidates that agree with the smallest size that lets the largest candidate agree."""
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
        """Sizes that a single row may be padded to, to try in this order.

        A tensor of one number goes other ways yet (Pow), hence the second reason for whole vectors.
        """
        whole = self._vectors or any(value[0].size == 1 for value in rows.values())
        return (VECTOR,) if whole else (1, 2, VECTOR)

    def _alone(self, size: int, rows: Arrays) -> list[np.ndarray]:
        """Every row run by itself, at the head of a batch of ``size`` padded with copies of it."""
        total = len(next(iter(rows.values())))
        runs = [self._run_at(size, {name: value[i : i + 1] for name, value in rows.items()}) for i in range(total)]
        return [np.concatenate([run[output] for run in runs]) for output in range(len(self._outputs))]

    def _agrees(self, size: int, rows: Arrays, alone: list[np.ndarray]) -> bool:
        """Whether rows in batches of ``size``, differently shuffled in each trial, come out as they do alone."""
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
    """Batch sizes to try where a graph computes in that memory, None for the host's."""
    return SIZES if memory is None else DEVICE_SIZES


def random_rows(shapes: dict[str, tuple[int, ...]], uniform: frozenset[str] = frozenset()) -> Callable[[int], Arrays]:
    """Trial rows of random float32 numbers: in [0, 1) for the inputs named in ``uniform``, else standard normal."""

    def rows(count: int) -> Arrays:
        random = np.random.RandomState(0)
        draws = {name: random.random_sample if name in uniform else random.standard_normal for name in shapes}
        return {name: draw((count, *shapes[name])).astype(np.float32) for name, draw in draws.items()}

    return rows


def batch_sizes(sizes: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Which of the ``sizes``, ascending, so many rows run in, the last one filled up: what costs least.

    A run is taken to cost as much as its rows, those that fill it up too, and RUN more.
    """
    whole = (rows - 1) // sizes[-1]
    last = _sizes_of_few(sizes, rows - whole * sizes[-1])
    return (sizes[-1],) * whole + last if whole else last


@lru_cache(maxsize=4096)
def batches_of(sizes: tuple[int, ...], rows: int, threads: int) -> tuple[Batch, ...]:
    """So many rows in equal shares for so many threads, each in batches of the ``sizes``, small ones for many threads.

    So all of them together hold no more rows than two batches of the largest size, or one each of the smallest.
    """
    most = max(sizes[0], AT_ONCE * sizes[-1] // threads)
    small = tuple(size for size in sizes if size <= most)
    found = []
    for start, end in pairwise([rows * share // threads for share in range(threads + 1)]):
        for size in batch_sizes(small, end - start):
            found.append(Batch(start, min(start + size, end), size))
            start += size
    return tuple(found)


def _cost(batches: Iterable[Batch]) -> int:
    """In rows."""
    return sum(batch.size + RUN for batch in batches)


@lru_cache(maxsize=1024)
def _sizes_of_few(sizes: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """As ``batch_sizes``, of no more rows than the largest size."""
    filled = (next(size for size in sizes if size >= rows),)
    fitting = [size for size in sizes if size < rows]
    if not fitting:
        return filled
    split = (fitting[-1], *_sizes_of_few(sizes, rows - fitting[-1]))
    return min(filled, split, key=lambda plan: sum(plan) + RUN * len(plan))


def _padded(value: np.ndarray, size: int) -> np.ndarray:
    """``value`` in an aligned array, padded with its last row; itself where nothing is to be done."""
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
    """Numbers in the largest row among several arrays of rows."""
    return max(value[0].size for value in values)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """One after the other, aligned: the next graph's batches then need not be copied."""
    if len(parts) == 1:
        return parts[0]
    joined = aligned_empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    return np.concatenate(parts, out=joined)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()
