"""What a run says while it runs: honest about the time that is left, whole lines, a bar that ends."""

import contextlib
import io

import pytest
from rich.console import Console

import training.fitting.journal
from training.fitting.journal import Journal

ROW = {
    "train_elbo_sampled": -64521.87,
    "bound": -64262.998,
    "rate": 0.11,
    "distortion": 64262.89,
    "images_per_second": 3.0,
}


class Clock:
    """Stands for the time module; it goes on when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    stub = Clock()
    monkeypatch.setattr(training.fitting.journal, "time", stub)
    return stub


def screen(terminal, width=80):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def bar(console):
    """The bar as it was left."""
    return [line for line in console.file.getvalue().splitlines() if "fit" in line][-1]


def rows(epoch, step):
    return [{"epoch": epoch, "step": step, "skipped": 0, **ROW}]


def test_the_time_left_is_that_of_all_steps_at_the_speed_so_far(tmp_path, clock):
    journal = Journal(tmp_path, 1000, 100, True, screen(False))
    with journal:
        clock.now += 30.0  # of a resumed run: 100 steps were done before, and cost it nothing
        journal.step(110, -1.0, 1.0, 0.0, 5.0)
        assert journal.seconds_left() == 890 * 3.0
        clock.now += 170.0  # a validation counts
        journal.step(120, -1.0, 1.0, 0.0, 5.0)
        assert journal.seconds_left() == 880 * 10.0


def test_a_slow_run_foretells_its_time_once_and_early(tmp_path, clock):
    console = screen(False)
    with Journal(tmp_path, 300, 0, True, console) as journal:
        clock.now += 6.0
        journal.step(1, -1.0, 1.0, 0.0, 5.0)
        assert console.file.getvalue() == ""
        clock.now += 6.0
        journal.step(2, -1.0, 1.0, 0.0, 5.0)
        journal.step(3, -1.0, 1.0, 0.0, 5.0)
    assert console.file.getvalue() == "fit: at most 0:29:48 left for 298 steps\n"


def test_the_first_epoch_foretells_too_but_seconds_are_not_worth_a_line(tmp_path, clock):
    for seconds, told in ((3.0, True), (0.03, False)):
        console = screen(False)
        with Journal(tmp_path, 300, 0, True, console) as journal:
            clock.now += seconds
            journal.epoch(rows(1, 3))
        assert ("at most 0:04:57 left for 297 steps" in console.file.getvalue()) is told


def test_a_step_is_shown_after_a_while_though_there_were_few(tmp_path, clock):
    journal = Journal(tmp_path, 300, 0, True, screen(False))
    assert not journal.is_due(1)
    assert journal.is_due(20)
    clock.now += 5.0
    assert journal.is_due(2)


def test_lines_are_whole_and_there_is_no_bar_where_nobody_looks(tmp_path, clock):
    console = screen(False)
    with Journal(tmp_path, 3, 0, True, console) as journal:
        journal.epoch(rows(1, 3))
        journal.say("model [bold]")
        journal.warn("a text that is longer than the eighty columns which a pipe or a file of logs is taken to have")
    lines = console.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["epoch", "model", "warning:"]
    assert "train elbo -64521.87 (sampled)" in lines[0]
    assert lines[0].endswith("3 examples/s")
    assert lines[1] == "model [bold]"


@pytest.mark.parametrize(("total", "done", "ended"), [(1, 0, "1/1"), (300, 60, "60/60")])
def test_the_bar_ends_with_the_run(tmp_path, clock, total, done, ended):
    """A closed form has no steps to count, and a run out of patience does not make its last ones."""
    console = screen(True, 200)
    with Journal(tmp_path, total, 0, True, console) as journal:
        if done:
            clock.now += 30.0
            journal.step(done, -1.0, 1.0, 0.0, 5.0)
    assert ended in bar(console)
    assert "left" not in bar(console)


def test_an_interrupted_bar_stays_where_it_was(tmp_path, clock):
    console = screen(True, 200)
    journal = Journal(tmp_path, 300, 0, True, console)
    with contextlib.suppress(KeyboardInterrupt), journal:
        journal.step(60, -1.0, 1.0, 0.0, 5.0)
        raise KeyboardInterrupt
    assert "60/300" in bar(console)
