"""The stages in a row: what a repeated fit computes again, and what it need not."""

import io
import json

import pytest
import torch
from rich.console import Console

from service.bundle import open_bundle
from tests.training.finished import finished_run
from training.checkpoint import load_checkpoint, save_checkpoint
from training.pipeline import all_stages, evaluate_stage
from training.runs import METRICS, Run


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


def test_a_repeated_fit_publishes_what_was_evaluated_before(run, console, tmp_path):
    evaluate_stage(run, console)
    mark(run)
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
