"""Running a graph so that a row's answer does not depend on the rows beside it, bitwise.

ONNX Runtime does not promise that by itself. Measured with 1.31 on x86: its Eigen kernels (Softplus, Log, float64 Exp
and Log, ReduceSum) take a vectorised path and a scalar one, chosen by an element's place in the whole tensor, and the
two differ in the last bit for 15 to 50% of values; the tensor is also cut at other places for another batch size. A
Gemm may have a kernel of its own for a single row.

So a graph runs at a few batch sizes only, and each size is first tried on random rows: a size is used when every row at
every place comes out bitwise as it does alone. A bundle whose rows are multiples of 16 numbers long passes at
all sizes; one that does not pass is served a row at a time, slower and still right.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

SIZES = (1, 8, 32)
SMALLEST = (1, 2, 4)
TRIALS = (
    24  # a place with two paths stays unseen with probability below 0.85**24 = 2%, and a graph has many such places
)
MAX_ELEMENTS = 2**23  # of one input at one run: bounds memory for large images

Arrays = dict[str, np.ndarray]


class RowRunner:
    """Runs a session on any number of rows, all inputs and outputs having the rows as their first axis.

    Arguments: ``session``; ``row_shapes`` input name -> (shape of one row, dtype); ``uniform`` names of the inputs that
    hold numbers of [0, 1) (the others hold standard normal ones); ``sizes`` the batch sizes to try, (1,) for one row
    at a time without a trial.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        row_shapes: dict[str, tuple[int, ...]],
        uniform: frozenset[str] = frozenset(),
        sizes: Sequence[int] = SIZES,
    ) -> None:
        self._session = session
        self._row_shapes = row_shapes
        self._uniform = uniform
        self._outputs = [output.name for output in session.get_outputs()]
        largest_row = max(int(np.prod(shape)) for shape in row_shapes.values())
        self._candidates = [size for size in sizes if size == 1 or size * largest_row <= MAX_ELEMENTS]
        self._sizes: tuple[int, ...] | None = None
        self._lock = threading.Lock()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes in use, ascending; they are found by trial on first use."""
        with self._lock:
            if self._sizes is None:
                self._sizes = self._find_sizes() if len(self._candidates) > 1 else (1,)
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
        rows = self._random_rows(max(self._candidates))
        best: tuple[int, ...] = (1,)
        for smallest in SMALLEST:
            alone = self._alone(smallest, rows)
            if smallest > 1 and not self._agrees(smallest, rows, alone):
                continue
            larger = [size for size in self._candidates if size > smallest and self._agrees(size, rows, alone)]
            if max(larger, default=1) > max(best):
                best = (smallest, *larger)
            if max(best) == max(self._candidates):
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

    def _random_rows(self, count: int) -> Arrays:
        random = np.random.RandomState(0)
        rows = {}
        for name, shape in self._row_shapes.items():
            draw = random.random_sample if name in self._uniform else random.standard_normal
            rows[name] = draw((count, *shape)).astype(np.float32)
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
