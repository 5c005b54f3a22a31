"""The line that says where a stage stands: numbers, times, and how often it is written."""

import io
from datetime import datetime

import numpy as np
import pytest
from rich.console import Console

from tests.training.shared import copied
from training.config import DataConfig
from training.console import calibrate_stage, evaluate_stage, export_stage, report_stage
from training.data import load_dataset
from training.progress import FIRST_LINE, NEXT_LINE, ConsoleTrack, Pace, in_clock, untracked
from training.runs import Run


class Clock:
    """Seconds that pass with each look at it."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def tracked(step, total, console=None, **options):
    console = console or Console(file=io.StringIO(), width=30)
    with ConsoleTrack(console, Clock(step))("calibrate", total, **options) as advance:
        for _ in range(total - options.get("done", 0)):
            advance(1)
    return console.file.getvalue().splitlines()


def test_the_line_says_what_is_done_what_is_left_and_when_it_ends():
    pace = Pace(50_000, "images", 0, started=100.0)
    assert pace.line(100.0, datetime(2026, 1, 2, 14, 2)) == "0 of 50,000 images"
    pace.done = 12_000
    text = pace.line(100.0 + 12_000 / 38_000 * 42, datetime(2026, 1, 2, 14, 2, 30))
    assert text == "12,000 of 50,000 images, 0:42 left, ends 14:03"
    assert pace.line(100 + 12_000, datetime(2026, 1, 2, 14, 0)).endswith("10:33:20 left, ends 2026-01-03 00:33")


def test_what_was_done_before_does_not_count_as_speed():
    pace = Pace(100, "steps", 80, started=0.0)
    pace.done = 90
    assert pace.seconds_left(5.0) == 5.0


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (42, "0:42"), (3599, "59:59"), (3600, "1:00:00")])
def test_times_read_as_on_a_clock(seconds, text):
    assert in_clock(seconds) == text


def test_a_stage_of_five_seconds_or_less_writes_nothing():
    assert tracked(0.04, 100) == []


def test_a_longer_one_writes_a_line_now_and_then_and_none_at_its_end():
    lines = tracked(1.0, 60)
    assert [line.partition(" of ")[0] for line in lines] == [
        f"calibrate: {int(FIRST_LINE + i * NEXT_LINE)}" for i in range(4)
    ]
    assert all(" of 60 images, " in line and " left, ends " in line for line in lines), "however narrow it is"
    assert lines[0].startswith("calibrate: 5 of 60 images, 0:55 left, ends ")


def test_a_terminal_has_a_bar_that_is_gone_afterwards():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    tracked(1.0, 30, console, noun="files", done=10)
    shown = console.file.getvalue()
    assert "30 of 30 files" in shown
    assert shown.endswith("\x1b[2K")


def test_nothing_is_shown_by_default(capfd):
    with untracked("x", 3) as advance:
        advance(1)
    assert capfd.readouterr() == ("", "")


class Seen:
    """A track that notes the stages and what was done of each."""

    def __init__(self):
        self.stages = []

    def __call__(self, name, total, noun="images", done=0):
        self.stages.append([name, noun, total, done])
        return self

    def __enter__(self):
        def advance(more):
            self.stages[-1][3] += more

        return advance

    def __exit__(self, *error):
        return None


@pytest.mark.parametrize("options", [{}, {"tile": 4, "crops": 2}])
def test_reading_a_folder_counts_its_files_unusable_ones_too(options, tmp_path):
    from PIL import Image

    random = np.random.RandomState(0)
    for i in range(40):
        Image.fromarray(random.randint(0, 256, (6, 6)).astype(np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    seen = Seen()
    config = DataConfig(source=str(tmp_path), validation=0.1, calibration=0.1, **options)
    dataset = load_dataset(config, seen)
    assert seen.stages == [[f"read {dataset.name}", "images", 41, 41]]


@pytest.mark.integration
def test_each_stage_counts_to_its_end(calibrated_run, tmp_path, monkeypatch):
    seen = Seen()
    monkeypatch.setattr("training.console.ConsoleTrack", lambda console: seen)
    run, console = Run.open(copied(calibrated_run, tmp_path).folder, seen), Console(file=io.StringIO())
    for stage in (evaluate_stage, export_stage, calibrate_stage, report_stage):
        stage(run, console)
    assert [name for name, *_ in seen.stages] == ["read tiny", "evaluate, k = 8", "export", "calibrate", "report"]
    assert all(done == total > 0 for _, _, total, done in seen.stages)
