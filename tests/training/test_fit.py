"""The loop: it learns, it resumes exactly, it counts what it skips, it runs on several processes."""

import csv
import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training.solved import dataset_of
from training.config import LikelihoodConfig, ModelConfig, load_config
from training.data import load_dataset
from training.data.batches import epoch_batches, steps_per_epoch
from training.errors import CheckpointError, TrainingDiverged
from training.fitting.checkpoint import FILE, load_checkpoint, save_checkpoint
from training.fitting.devices import make_fabric
from training.fitting.fit import ModelTraining, fit
from training.fitting.metrics import validate
from training.fitting.schedule import learning_rate
from training.fitting.skipping import MAX_SKIPPED_IN_A_ROW
from training.fitting.trainer import State, Trainer, stored_state
from training.fitting.trainer import start as first_values
from training.models.registry import build_model

pytestmark = pytest.mark.integration  # most of them train

ROOT = Path(__file__).parents[2]
SMALL = ["model.latent_dim=4", "model.network.hidden=[32]", "run.threads=1", "optimiser.epochs=4"]
RUN = """
import sys
from pathlib import Path
from training.config import load_config
from training.data import load_dataset
from training.fitting.fit import fit
config = load_config("digits", sys.argv[2:])
print("started", flush=True)
fit(config, load_dataset(config.data), Path(sys.argv[1]))
print("finished", flush=True)
"""


def config_with(*overrides):
    return load_config("digits", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def digits():
    return load_dataset(config_with().data)


def weights(folder):
    return {**load_checkpoint(folder)["model"], **{f"best.{k}": v for k, v in load_checkpoint(folder)["best"].items()}}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def start(folder, *overrides, launcher=(sys.executable,)):
    script = folder.parent / "run.py"
    script.write_text(RUN)
    return subprocess.Popen(
        [*launcher, str(script), str(folder), *SMALL, *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert "finished" in out


def test_learning_improves_the_bound_on_unseen_images(digits, tmp_path):
    fitted = fit(config_with("optimiser.epochs=10", "run.validate_every=1"), digits, tmp_path)
    assert fitted.history[-1]["bound"] > fitted.history[0]["bound"] + 20
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [float(row["epoch"]) for row in rows] == [row["epoch"] for row in fitted.history]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("objective", ["elbo", pytest.param("dreg", marks=pytest.mark.slow)])
def test_a_run_killed_with_sigkill_ends_with_the_same_weights(digits, tmp_path, objective):
    """The run that is killed is a process of its own; that it goes on in this one, after another run, is no matter."""
    options = ["run.checkpoint_seconds=0", f"objective.kind={objective}", "objective.samples=2", "run.validate_every=1"]
    fit(config_with(*options), digits, tmp_path / "whole")
    process = start(tmp_path / "killed", *options)
    checkpoint = tmp_path / "killed" / FILE
    assert process.stdout.readline() == "started\n"
    while process.poll() is None:
        if checkpoint.is_file() and load_checkpoint(tmp_path / "killed")["state"]["step"] >= 30:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert load_checkpoint(tmp_path / "killed")["state"]["step"] < load_checkpoint(tmp_path / "whole")["state"]["step"]
    fit(config_with(*options), digits, tmp_path / "killed")
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


class Killed(BaseException):
    """Stands for a kill at a chosen moment."""


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_run_killed_while_it_validates_loses_no_validation(digits, tmp_path, monkeypatch, epochs):
    config = config_with(f"optimiser.epochs={epochs}", "run.checkpoint_seconds=0", "run.validate_every=1")
    whole = fit(config, digits, tmp_path / "whole")
    done = []

    def die_in_the_last(*arguments):
        done.append(arguments)
        if len(done) == epochs:
            raise Killed
        return validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("training.fitting.fit.validate", die_in_the_last)
        with pytest.raises(Killed):
            fit(config, digits, tmp_path / "killed")
    resumed = fit(config, digits, tmp_path / "killed")
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert [row["bound"] for row in resumed.history] == [row["bound"] for row in whole.history]
    sampled = [[row["train_elbo_sampled"] for row in fitted.history] for fitted in (whole, resumed)]
    assert sampled[0] == sampled[1]


def test_a_resumed_run_says_where_it_goes_on(digits, tmp_path, monkeypatch, capsys):
    config, steps = config_with("run.checkpoint_seconds=0"), 0
    training_step = Trainer.training_step

    def die_in_the_second_epoch(trainer, pixels):
        nonlocal steps
        steps += 1
        if steps > trainer.steps_per_epoch + 2:
            raise Killed
        return training_step(trainer, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", die_in_the_second_epoch)
        with pytest.raises(Killed):
            fit(config, digits, tmp_path)
    assert "goes on" not in capsys.readouterr().err
    fit(config, digits, tmp_path)
    assert "fit: goes on from epoch 2 of 4, step 3 of 22\n" in capsys.readouterr().err
    fit(config, digits, tmp_path)
    assert f"fit: done before, {tmp_path / FILE}\n" in capsys.readouterr().err


def test_changed_data_do_not_resume(digits, tmp_path):
    fit(config_with("optimiser.epochs=1"), digits, tmp_path)
    other = dataclasses.replace(digits, fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match=r"data of .* have changed"):
        fit(config_with("optimiser.epochs=1"), other, tmp_path)


def test_the_images_preset_trains_on_large_colour_pictures(tmp_path):
    """The limits of the gradient's norm are stated for 784 pixels: these have 49,152."""
    grid = np.linspace(0, 1, 128)
    smooth = np.stack([np.outer(grid, grid), np.outer(1 - grid, grid), np.outer(grid, 1 - grid)])
    shifts = np.random.RandomState(0).randint(0, 128, 40)
    images = np.stack([np.roll(smooth, shift, 2) for shift in shifts])
    np.save(tmp_path / "smooth.npy", (255 * images).astype(np.uint8))
    config = load_config("images", ["optimiser.batch_size=8"], {"data": {"source": str(tmp_path / "smooth.npy")}})
    dataset = load_dataset(config.data)
    trainer = Trainer(config, dataset, make_fabric(config))
    for _ in range(2):
        trainer.training_step(dataset.pixels(dataset.splits["train"][:8]))
    assert trainer.state.skipped == 0


def test_the_same_configuration_gives_the_same_weights_and_another_seed_does_not(digits, tmp_path):
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        fit(config_with(f"seed={seed}"), digits, tmp_path / name)
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    first, other = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_another_configuration_does_not_resume_and_names_the_key(digits, tmp_path):
    fit(config_with(), digits, tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.latent_dim: 4 -> 5"):
        fit(config_with("model.latent_dim=5"), digits, tmp_path)


def test_a_damaged_checkpoint_is_one_clear_error(digits, tmp_path):
    fit(config_with(), digits, tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        fit(config_with(), digits, tmp_path)


def test_updates_with_a_wild_gradient_are_skipped_and_counted(digits):
    config = config_with("optimiser.skip_above=1e-6")
    trainer = Trainer(config, digits, make_fabric(config))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    batch = digits.pixels(digits.splits["train"][:64])
    trainer.training_step(batch)
    assert trainer.state.skipped == 1
    assert_same_weights(before, dict(trainer.model.state_dict()))
    for _ in range(MAX_SKIPPED_IN_A_ROW - 2):
        trainer.training_step(batch)
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        trainer.training_step(batch)


def test_early_stopping_ends_a_run_that_no_longer_improves(digits, tmp_path):
    config = config_with(
        "optimiser.epochs=200", "optimiser.patience=2", "optimiser.learning_rate=1e-30", "run.validate_every=1"
    )
    fitted = fit(config, digits, tmp_path)
    assert len(fitted.history) < 50


def test_the_best_validation_weights_are_kept(digits, tmp_path):
    fitted = fit(config_with("run.validate_every=1"), digits, tmp_path)
    bounds_seen = [row["bound"] for row in fitted.history]
    assert fitted.state.best_bound == max(bounds_seen)
    assert fitted.history[fitted.state.best_epoch - 1]["bound"] == max(bounds_seen)


def test_static_binarisation_shows_the_same_image_every_epoch(digits, tmp_path):
    config = config_with("model.likelihood.family=bernoulli", "model.likelihood.binarisation=static")
    training = ModelTraining(config, digits, tmp_path, make_fabric(config))
    indices = digits.splits["train"][:8]
    first, second = (next(iter(training.source.batches([indices]))) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert set(np.unique(first)) == {0, 255}


@pytest.mark.parametrize("world_size", [1, 3])
def test_an_epoch_shows_every_rank_other_images(world_size):
    indices = np.arange(100, 200)
    shares = [
        epoch_batches(indices, 8, seed=0, epoch=2, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    seen = np.concatenate([batch for share in shares for batch in share])
    assert len(np.unique(seen)) == len(seen) == steps_per_epoch(100, 8, world_size) * 8 * world_size
    assert set(seen) <= set(indices)
    again = epoch_batches(indices, 8, seed=0, epoch=3)
    assert not np.array_equal(again[0], epoch_batches(indices, 8, seed=0, epoch=2)[0])


def test_a_model_starts_from_the_mean_and_the_deviation_of_its_training_rows():
    """Far from 0, and not those of the first rows alone, which lie lower than the others."""
    rows = 1e4 + np.random.RandomState(0).normal(size=(2000, 3)) * [1, 5, 20] + (np.arange(2000) >= 600)[:, None] * 10
    dataset = dataset_of(rows)
    config = ModelConfig(latent_dim=2, likelihood=LikelihoodConfig(family="gaussian", values="reals"))
    model = build_model(dataset.preprocessing, config)
    first_values(model, dataset)
    train = rows[dataset.splits["train"]].astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(model.likelihood.shift[:, 0].flatten(), train.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.likelihood.unit[:, 0].flatten(), train.std(0), rtol=1e-3)


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 100, peak=1.0, warmup_steps=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, abs=0.01)
    assert max(rates) < 1
    assert rates[-1] < 0.01
    assert learning_rate(99, 100, peak=1.0, warmup_steps=0, schedule="constant") == 1


@pytest.mark.slow
def test_torchrun_with_two_processes_trains_one_model(tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    finish(start(tmp_path / "two", "run.devices=2", "optimiser.epochs=2", launcher=launcher))
    content = load_checkpoint(tmp_path / "two")
    assert content["state"]["finished"]
    assert content["state"]["step"] == 2 * steps_per_epoch(len(load_dataset(config_with().data).splits["train"]), 64, 2)


def test_a_collapsed_posterior_is_told_of_once_and_not_before_the_third_epoch(tmp_path, digits, capsys):
    """Where the rate costs a thousandfold, the posterior falls onto the prior."""
    overrides = ["objective.beta=1000.0", "optimiser.epochs=6", "objective.warmup_epochs=0", "optimiser.warmup_steps=0"]
    fit(config_with(*overrides, "optimiser.learning_rate=0.01", "run.validate_every=1"), digits, tmp_path)
    before, said, after = " ".join(capsys.readouterr().err.split()).partition("posterior collapse")
    assert said
    assert re.findall(r"epoch (\d)", before)[-1] == "3"
    assert "posterior collapse" not in after
    assert "objective.free_bits" in after


def test_a_posterior_that_carries_something_is_not_warned_of(tmp_path, digits, capsys):
    fit(config_with("optimiser.epochs=4"), digits, tmp_path)
    assert "collapse" not in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_lacks_what_was_added_since(tmp_path):
    config = config_with("optimiser.ema_every=1")
    save_checkpoint(tmp_path, config, {"best": {}})
    content = torch.load(tmp_path / FILE, weights_only=True)
    del content["identity"]["optimiser"]["ema_every"], content["identity"]["model"]["prior"]
    torch.save(content, tmp_path / FILE)
    assert load_checkpoint(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"optimiser\.ema_every: 1 -> 8"):
        load_checkpoint(tmp_path, config_with())


def test_the_history_of_an_earlier_version_says_that_its_training_elbo_is_sampled(tmp_path):
    row = {"epoch": 1, "step": 20, "train_elbo": -3.0, "train_rate": 1.0, "train_distortion": 2.0, "bound": -4.0}
    save_checkpoint(tmp_path, config_with(), {"best": {}, "history": [row]})
    (found,) = load_checkpoint(tmp_path)["history"]
    assert found == {
        "epoch": 1,
        "step": 20,
        "train_elbo_sampled": -3.0,
        "train_rate_sampled": 1.0,
        "train_distortion_sampled": 2.0,
        "bound": -4.0,
    }


def test_an_earlier_versions_finished_run_is_not_trained_on():
    stored = {name: value for name, value in dataclasses.asdict(State(finished=True)).items() if name != "stopped"}
    assert stored_state(stored).stopped


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_likelihood_sees_inputs_in_full_precision(digits, precision):
    """A dither is there to spread each grey level; in bfloat16 it would have two places to go."""
    config = config_with(f"run.precision={precision}", "model.likelihood.family=gaussian")
    trainer = Trainer(config, digits, make_fabric(config))
    seen = []
    likelihood = trainer.bare.likelihood
    original = likelihood.target
    likelihood.target = lambda x, dither: seen.append(original(x, dither)) or seen[-1]
    trainer.training_step(digits.pixels(digits.splits["train"][:64]))
    assert seen[0].dtype == torch.float32
    assert len(seen[0].unique()) > 0.95 * seen[0].numel()
