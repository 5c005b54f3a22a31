"""Defaults that depend on the data: a preset's number adapts, what the user set stays, a run keeps what it had."""

import io

import numpy as np
import pytest
from rich.console import Console

from tests.training.solved import dataset_of
from training.compare import resolve
from training.config import Config, chosen_keys, load_config
from training.console import fit_stage
from training.errors import CheckpointError, ConfigError, DataError
from training.fitting.data_defaults import LEAST, STEPS, adapted, check_dimension, most_axes, varying
from training.runs import Launch, Run

BATCH, DIMENSION = "optimiser.batch_size", "model.latent_dim"


def rows(count, numbers, constant=0):
    values = np.random.RandomState(0).standard_normal((count, numbers))
    values[:, :constant] = 3.0
    return dataset_of(values, held_out=0.1)


def config_of(latent_dim, family="pca"):
    return Config.model_validate({"model": {"family": family, "latent_dim": latent_dim}})


def test_constant_numbers_and_few_rows_are_no_axes():
    assert varying(rows(100, 10, constant=3)) == 7
    assert most_axes(rows(100, 10, constant=3)) == 7
    assert most_axes(rows(10, 50)) == 9 - 1
    with pytest.raises(DataError, match="varies along 1 axes"):
        most_axes(rows(100, 10, constant=9))


def test_a_number_that_varies_in_a_later_batch_varies():
    values = np.zeros((2500, 3))
    values[1800, 1] = values[100, 2] = 1
    assert varying(dataset_of(values, held_out=0.1)) == 2


@pytest.mark.parametrize("family", ["pca", "ppca", "fa"])
def test_as_many_dimensions_as_axes_are_refused_with_the_largest_that_leaves_something(family):
    dataset = rows(100, 10, constant=3)
    check_dimension(config_of(6, family), dataset)
    with pytest.raises(ConfigError, match=r"latent_dim: .* expects 1 to 6 .* got 7"):
        check_dimension(config_of(7, family), dataset)
    check_dimension(config_of(40, "ica"), dataset)


def test_a_dimension_that_nobody_chose_is_at_most_half_of_the_axes():
    dataset = rows(100, 10, constant=3)
    assert adapted(config_of(64), dataset, ()).model.latent_dim == 3
    assert adapted(config_of(64), dataset, {DIMENSION}) == config_of(64)
    assert adapted(config_of(2), dataset, ()) == config_of(2)
    assert adapted(config_of(64, "ica"), dataset, ()) == config_of(64, "ica")


@pytest.mark.parametrize(("train", "batch"), [(64 * STEPS, 64), (640, 32), (100, LEAST), (3, LEAST)])
def test_an_epoch_has_so_many_steps_as_far_as_a_batch_has_enough_rows(train, batch):
    dataset = dataset_of(np.zeros((train + 1, 2)), held_out=1 / (train + 1))
    assert len(dataset.splits["train"]) == train
    assert adapted(load_config("digits"), dataset, ()).optimiser.batch_size == batch
    assert adapted(load_config("digits"), dataset, {BATCH}).optimiser.batch_size == 64


def own_file(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("optimiser.batch_size=128", {BATCH}),
        (" optimiser . batch_size = 128", {BATCH}),
        ("optimiser={batch_size=128}", {BATCH}),
        ("optimiser={batch_size=128, epochs=3}", {BATCH, "optimiser.epochs"}),
        ("model={latent_dim=9, network={hidden=[3]}}", {DIMENSION, "model.network.hidden"}),
        ("model={network.hidden=[3]}", {"model.network.hidden"}),
        ("optimiser={}", set()),
    ],
)
def test_an_override_in_any_form_sets_its_keys(override, keys):
    assert chosen_keys("digits", [override]) == keys


def test_a_file_of_the_users_own_sets_its_keys_and_a_shipped_preset_none(tmp_path):
    path = own_file(tmp_path, "seed = 1\n[model]\nlatent_dim = 3\nnetwork.hidden = [4]\n")
    assert chosen_keys(path, ["optimiser.epochs=1"]) == {
        "seed",
        DIMENSION,
        "model.network.hidden",
        "optimiser.epochs",
    }
    assert chosen_keys("digits", []) == chosen_keys(None, []) == set()


def test_a_comparison_knows_what_a_file_sets(tmp_path):
    _, launch = resolve(own_file(tmp_path, "[optimiser]\nbatch_size = 128\n"), ["model.latent_dim=2"], "digits", None)
    assert launch.chosen_keys == {BATCH, DIMENSION}


def stage(preset, folder, *overrides, limit=None):
    console = Console(file=io.StringIO())
    config = load_config(preset, overrides, {"data": {"source": "digits", "limit": limit}})
    run, _ = fit_stage(config, folder, Launch(preset=preset, overrides=list(overrides)), False, console)
    return run, console.file.getvalue()


@pytest.mark.parametrize("preset", ["pca", "ppca", "fa"])
def test_the_linear_presets_work_on_other_data_and_go_on(preset, tmp_path):
    run, said = stage(preset, tmp_path / "run", "model.factor.iterations=20")
    assert run.config.model.latent_dim == run.model.latent_dim == 30
    assert "model.latent_dim: 30 instead of the preset's 64" in said
    assert Run.open(tmp_path / "run").model.latent_dim == 30
    again, _ = stage(preset, tmp_path / "run", "model.factor.iterations=20")
    assert again.weights_digest == run.weights_digest


OWN_PCA = "[model]\nfamily = 'pca'\nlikelihood.family = 'squared_error'\n"


def test_a_chosen_dimension_is_kept_or_refused(tmp_path):
    run, _ = stage("pca", tmp_path / "run", "model.latent_dim=50")
    assert run.model.latent_dim == 50
    run, said = stage(own_file(tmp_path, OWN_PCA + "latent_dim = 50\n"), tmp_path / "file")
    assert run.model.latent_dim == 50
    assert "instead of" not in said
    for override in ("model.latent_dim=64", "model={latent_dim=64}"):
        with pytest.raises(ConfigError, match="expects 1 to 60"):
            stage("pca", tmp_path / "other", override)
        assert not (tmp_path / "other").exists()


def test_what_a_file_of_the_users_own_leaves_open_adapts(tmp_path):
    run, _ = stage(own_file(tmp_path, OWN_PCA), tmp_path / "run", limit=60)
    assert run.config.model.latent_dim == most_axes(run.dataset) // 2 < Config().model.latent_dim


SMALL = ("model.latent_dim=2", "model.network.hidden=[8]", "optimiser.epochs=1")


def test_a_presets_batch_is_brought_down_and_said_and_the_run_goes_on(tmp_path):
    run, said = stage("digits", tmp_path / "run", *SMALL, limit=700)
    size = len(run.dataset.splits["train"]) // STEPS
    assert LEAST < size < 64
    assert run.config.optimiser.batch_size == size
    assert f"optimiser.batch_size: {size} instead of the preset's 64" in said
    assert Run.open(tmp_path / "run").config.optimiser.batch_size == size
    _, again = stage("digits", tmp_path / "run", *SMALL, limit=700)
    assert "done before" in again


OWN_VAE = "[model]\nlatent_dim = 2\nnetwork.hidden = [8]\n[optimiser]\nepochs = 1\n"


@pytest.mark.parametrize("override", ["optimiser.batch_size=128", "optimiser={batch_size=128}", None])
def test_a_chosen_batch_stays_and_the_run_goes_on(override, tmp_path):
    """By a key alone, by a table, by a file: on 700 digits the default would be a batch of 28."""
    text = OWN_VAE if override else OWN_VAE + "batch_size = 128\n"
    words = (own_file(tmp_path, text), tmp_path / "run", *([override] if override else []))
    run, said = stage(*words, limit=700)
    assert run.config.optimiser.batch_size == 128
    assert "instead of" not in said
    assert "done before" in stage(*words, limit=700)[1]


def test_a_run_keeps_the_batch_that_it_has_until_the_user_sets_another(tmp_path):
    """Whatever the rule of a later version is, a run goes on with the number of its checkpoint."""
    run, _ = stage("digits", tmp_path / "run", *SMALL, "optimiser.batch_size=40", limit=700)
    again, said = stage("digits", tmp_path / "run", *SMALL, limit=700)
    assert again.config.optimiser.batch_size == 40
    assert again.weights_digest == run.weights_digest
    assert "done before" in said
    with pytest.raises(CheckpointError, match=r"optimiser\.batch_size: 40 -> 64"):
        stage("digits", tmp_path / "run", *SMALL, "optimiser.batch_size=64", limit=700)
