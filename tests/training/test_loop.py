"""The loop alone, on a training that only counts: what it calls when, and what is kept of a training that was left."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from training.fitting.loop import Interrupt, Loop, Progress, describe_progress

STEPS = 3  # an epoch


class Counting:
    """A training of two epochs that writes down what is asked of it; what it saves is its state alone."""

    path = Path("counted.pt")
    steps_per_epoch, total_steps = STEPS, 2 * STEPS

    def __init__(self, state=None, patience=2):
        self.state, self.patience, self.said, self.saved = state or Progress(), patience, [], None

    def batches(self, epoch, first):
        return (np.full((4, 1, 1, 1), 10 * epoch + i) for i in range(first, STEPS))

    def step(self, pixels):
        self.state.step += 1
        self.said.append(int(pixels.flat[0]))

    def end_epoch(self, epoch, rows_per_second):
        assert rows_per_second > 0
        self.state.stopped = epoch == self.patience
        self.said.append(f"epoch {epoch}")

    def finish(self):
        self.said.append("finish")

    def save(self):
        self.saved = replace(self.state)
        self.said.append("save")


def run(training, seconds=1e9, after_step=lambda rate: None):
    Loop(training, seconds, Interrupt(), after_step).run()


WHOLE = [0, 1, 2, "epoch 1", 10, 11, 12, "epoch 2", "finish", "save"]


def test_steps_epochs_and_the_end_come_in_this_order():
    training, rates = Counting(), []
    run(training, after_step=rates.append)
    assert training.said == WHOLE
    assert training.saved.finished
    assert len(rates) == 6
    assert min(rates) > 0


def test_a_checkpoint_holds_the_validation_of_the_epoch_that_ended_before_it():
    training = Counting()
    run(training, seconds=-1.0)
    assert training.said[:9] == [0, "save", 1, "save", 2, "epoch 1", "save", 10, "save"]


@pytest.mark.parametrize("steps", range(1, 7))
def test_a_training_that_was_left_goes_on_with_the_next_step(steps):
    left = Counting()
    loop = Loop(left, 1e9, Interrupt(), lambda rate: None)

    def interrupt_at(rate):
        loop.interrupt.requested = left.state.step == steps

    loop.after_step = interrupt_at
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert left.said.pop() == "save"
    assert left.saved.step == steps
    again = Counting(left.saved)
    run(again)
    assert left.said + again.said == WHOLE


def test_a_training_that_stops_is_finished_and_makes_no_further_step():
    training = Counting(patience=1)
    run(training)
    assert training.said == [0, 1, 2, "epoch 1", "finish", "save"]
    again = Counting(training.saved)
    run(again)
    assert again.said == []


def test_seconds_go_on_from_the_checkpoint_and_do_not_count_what_follows_an_epoch():
    training = Counting(Progress(step=2, seconds=1000.0))
    run(training)
    assert 1000 < training.state.seconds < 1010


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (Progress(step=1), "goes on from epoch 1 of 2, step 2 of 3"),
        (Progress(step=3), "goes on from epoch 2 of 2"),
        (Progress(step=3, stopped=True), "goes on after its last epoch"),
        (Progress(step=6), "goes on after its last epoch"),
        (Progress(step=6, finished=True), "done before, counted.pt"),
    ],
)
def test_where_a_resumed_training_stands_is_said_in_words(state, text):
    assert describe_progress(Counting(state)) == text
