"""A loop that can be left between any two steps and gone on with: epochs, batches, steps, checkpoints, interrupts.

What it advances, the training of a model or of the corruption network, makes the steps and knows its own state. Order
and randomness of a step are functions of its number, so that a training that was killed at any moment and begun again
ends, on the CPU, with bitwise the weights of one that was not.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, Self

import numpy as np


class Interrupt:
    """Within the ``with`` block SIGINT only makes ``check`` raise KeyboardInterrupt; a second one raises it at once.

    An exception at any moment could leave half an optimiser step in the weights, and a lock of the TensorBoard writer
    held for ever. Outside the main thread, which alone gets signals, this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._active:
            self._previous = signal.signal(signal.SIGINT, self._on_sigint)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raise KeyboardInterrupt if SIGINT has come."""
        if self.requested:
            raise KeyboardInterrupt

    def _on_sigint(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@dataclass
class Progress:
    """Where a training stands: ``stopped`` makes no further step, ``finished`` has nothing left to do."""

    step: int = 0
    seconds: float = 0.0
    stopped: bool = False
    finished: bool = False


class Training(Protocol):
    """What the loop advances."""

    path: Path
    """The checkpoint."""
    steps_per_epoch: int
    total_steps: int

    @property
    def state(self) -> Progress:
        """Where it stands."""

    def batches(self, epoch: int, first: int) -> Iterable[np.ndarray]:
        """Pixels [B,C,H,W] of the batches of ``epoch``, both counted from 0, from the ``first`` on."""

    def step(self, pixels: np.ndarray) -> None:
        """Make one step, and count it in ``state``."""

    def end_epoch(self, epoch: int, rows_per_second: float) -> None:
        """Do what follows on ``epoch``, counted from 1, such as a validation; may set ``state.stopped``."""

    def finish(self) -> None:
        """Do what is left once the weights stand."""

    def save(self) -> None:
        """Write the checkpoint."""


def describe_progress(training: Training) -> str:
    """Where a resumed training stands, in words."""
    state = training.state
    if state.finished:
        return f"done before, {training.path}"
    if state.stopped or state.step == training.total_steps:
        return "goes on after its last epoch"
    epoch, done = divmod(state.step, training.steps_per_epoch)
    within = f", step {done + 1} of {training.steps_per_epoch}" if done else ""
    return f"goes on from epoch {epoch + 1} of {training.total_steps // training.steps_per_epoch}{within}"


class Loop:
    """The steps of ``training`` that are left, with a checkpoint every so many seconds and where SIGINT stops it.

    ``after_step`` is called after each with the rows a second of this epoch so far.
    """

    def __init__(
        self, training: Training, checkpoint_seconds: float, interrupt: Interrupt, after_step: Callable[[float], None]
    ) -> None:
        self.training, self.interrupt, self.after_step = training, interrupt, after_step
        self.checkpoint_seconds = checkpoint_seconds
        self._saved = time.perf_counter()

    def run(self) -> None:
        """Epochs until the last, or until the training stops, and its end. Raises KeyboardInterrupt."""
        training, state = self.training, self.training.state
        while state.step < training.total_steps and not state.stopped:
            rows_per_second = self.train_epoch()
            training.end_epoch(state.step // training.steps_per_epoch, rows_per_second)
            self.pause()
        if not state.finished:
            training.finish()
            state.finished = True
            training.save()

    def train_epoch(self) -> float:
        """The rest of the epoch in which the state stands; the rows a second that it took."""
        training, state = self.training, self.training.state
        before, started, rows = state.seconds, time.perf_counter(), 0
        for pixels in training.batches(*divmod(state.step, training.steps_per_epoch)):
            training.step(pixels)
            rows += len(pixels)
            elapsed = time.perf_counter() - started
            state.seconds = before + elapsed
            self.after_step(rows / elapsed)
            if state.step % training.steps_per_epoch:  # after the last step comes the validation, then the pause
                self.pause()
        return rows / max(1e-9, time.perf_counter() - started)

    def pause(self) -> None:
        """A safe point between steps: write the checkpoint if it is due, stop if SIGINT has come."""
        if self.interrupt.requested or time.perf_counter() - self._saved > self.checkpoint_seconds:
            self._saved = time.perf_counter()
            self.training.save()
        self.interrupt.check()
