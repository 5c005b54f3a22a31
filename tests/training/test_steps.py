"""Few rows are trained on in smaller batches, unless somebody chose the batch."""

import io

import pytest
from rich.console import Console

from training.config import load_config
from training.fitting.steps import LEAST, STEPS, adapted
from training.pipeline import fit_stage
from training.runs import Launch, Run


@pytest.mark.parametrize(("rows", "batch"), [(60_000, 64), (64 * STEPS, 64), (640, 32), (100, LEAST), (3, LEAST)])
def test_an_epoch_has_so_many_steps_as_far_as_a_batch_has_enough_rows(rows, batch):
    assert adapted(load_config("digits", []), rows).optimiser.batch_size == batch


def stage(folder, *overrides):
    console = Console(file=io.StringIO())
    config = load_config("digits", overrides, {"data": {"source": "digits", "limit": 700}})
    run, _ = fit_stage(config, folder, Launch(preset="digits", overrides=list(overrides)), False, console)
    return run, console.file.getvalue()


SMALL = ("model.latent_dim=2", "model.network.hidden=[8]", "optimiser.epochs=1")


def test_a_presets_batch_is_brought_down_and_said_and_the_run_goes_on(tmp_path):
    run, said = stage(tmp_path / "run", *SMALL)
    size = len(run.dataset.splits["train"]) // STEPS
    assert LEAST < size < 64
    assert run.config.optimiser.batch_size == size
    assert f"optimiser.batch_size: {size} instead of the preset's 64" in said
    assert Run.open(tmp_path / "run").config.optimiser.batch_size == size
    _, again = stage(tmp_path / "run", *SMALL)
    assert "done before" in again


def test_a_chosen_batch_stays(tmp_path):
    run, said = stage(tmp_path / "run", *SMALL, "optimiser.batch_size=64")
    assert run.config.optimiser.batch_size == 64
    assert "instead of" not in said
