"""The stages in a row: what a repeated fit computes again, and what it need not."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from service.bundle.files import open_bundle
from service.settings import Settings
from tests.training.finished import finished_run
from tests.training.shared import copied
from training.config import load_config
from training.console import all_stages, evaluate_stage, fit_stage
from training.fitting.checkpoint import load_checkpoint, save_checkpoint
from training.pipeline import DEFAULT_RATE
from training.runs import METRICS, Launch, Run


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path, (1, 3, 4), {"latent_dim": 2, "network": {"kind": "mlp", "hidden": [8]}})


@pytest.fixture
def console():
    return Console(file=io.StringIO())


def mark(run):
    """Change a figure of metrics.json, so that it shows whether another evaluation has overwritten it."""
    path = run.folder / METRICS
    content = json.loads(path.read_text())
    content["metrics"]["active_units"] = 77
    path.write_text(json.dumps(content))


def test_a_repeated_fit_publishes_what_was_evaluated_before(exported_run, console, tmp_path, monkeypatch):
    run = copied(exported_run, tmp_path)
    evaluate_stage(run, console)
    mark(run)
    monkeypatch.setattr("training.pipeline.export", lambda run, advance: run.staged)
    published = all_stages(Run.open(run.folder), tmp_path / "exported", console)
    assert open_bundle(published).manifest.provenance.metrics["test"]["active_units"] == 77
    assert "evaluate: done before" in console.file.getvalue()
    assert all(console.file.getvalue().splitlines()), "bars leave nothing in a file"


@pytest.mark.parametrize("asked", [{"k": 3}, {"images": 5}, {"precision": "bf16-mixed"}])
def test_an_evaluation_otherwise_than_configured_is_not_taken_for_it(run, console, asked):
    evaluate_stage(run, console, **asked)
    assert not run.is_evaluated
    evaluate_stage(run, console)
    assert run.is_evaluated


def test_an_evaluation_of_other_weights_is_done_again(run, console):
    assert not run.is_evaluated
    evaluate_stage(run, console)
    content = load_checkpoint(run.folder)
    content["best"] = {name: torch.zeros_like(value) for name, value in content["best"].items()}
    save_checkpoint(run.folder, run.config, content)
    assert run.is_evaluated
    assert not Run.open(run.folder).is_evaluated


def described(folder, console, **data):
    """What fit says of a folder's images, line by line."""
    config = load_config("ppca", [], {"data": {"source": str(folder), **data}, "model": {"latent_dim": 2}})
    fit_stage(config, folder.parent / "run", Launch(), True, console)
    return console.file.getvalue().splitlines()


@pytest.fixture
def photos(tmp_path):
    """60 pictures: 40 of 12×16 pixels, 20 of 12×24."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.RandomState(0)
    for i in range(60):
        pixels = random.randint(0, 256, (12, 24 if i % 3 == 2 else 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def test_fit_says_what_is_cut_off_and_how_to_keep_it(photos, console):
    (line,) = [line for line in described(photos, console, size=8) if "data.fit" in line]
    assert "8×8" in line
    assert "25% of an image's pixels in the median, 50% at most" in line
    assert "--set data.fit=contain" in line


@pytest.mark.parametrize("data", [{"size": 8, "fit": "contain"}, {"size": 8, "fit": "stretch"}, {"tile": 8}])
def test_where_nothing_is_cut_off_nothing_is_said(photos, console, data):
    assert not [line for line in described(photos, console, **data) if "data.fit" in line]


def test_fit_says_which_splits_are_too_small_and_what_to_raise(photos, console):
    lines = described(photos, console, size=8)
    assert [line.partition(":")[0] for line in lines if "too few" in line] == ["calibration", "validation"]
    assert any(
        "calibration: 3 images are too few" in line and "needs 19: raise data.calibration" in line for line in lines
    )
    assert any("validation: 3 images are too few" in line and "raise data.validation" in line for line in lines)


def test_splits_that_are_large_enough_are_not_spoken_of(photos, console):
    """19 calibrate, 20 fit the scores."""
    lines = described(photos, console, size=8, calibration=19 / 60, validation=20 / 60)
    assert not [line for line in lines if "too few" in line]


def test_crops_are_called_crops_and_counted_beside_their_images(photos, console):
    lines = described(photos, console, tile=8, crops=20, calibration=0.2)
    assert [line for line in lines if re.match(r"[0-9,]+ crops 1×8×8 of 60 images: train ", line)]
    assert [line for line in lines if line.startswith("calibration: 12 images are too few")]
    assert not [line for line in lines if line.startswith("validation")], "3 images hold crops enough"


def test_the_default_rate_is_the_service_s():
    assert Settings.model_fields["false_positive_rate"].default == DEFAULT_RATE
