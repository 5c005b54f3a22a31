"""Linear models keep fewer axes than the data have: a preset's number adapts, a chosen one is refused."""

import io

import numpy as np
import pytest
from rich.console import Console

from tests.training.solved import dataset_of
from training.config import Config, load_config
from training.errors import ConfigError, DataError
from training.fitting.dimensions import adapted, check_dimension, most_axes, varying
from training.pipeline import fit_stage
from training.runs import Launch, Run


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
    assert adapted(config_of(64), dataset).model.latent_dim == 3
    assert adapted(config_of(2), dataset) == config_of(2)


def stage(preset, folder, *overrides):
    console = Console(file=io.StringIO())
    launch = Launch(preset=preset, overrides=list(overrides))
    config = load_config(preset, overrides, {"data": {"source": "digits"}})
    run, _ = fit_stage(config, folder, launch, False, console)
    return run, console.file.getvalue()


@pytest.mark.parametrize("preset", ["pca", "ppca", "fa"])
def test_the_linear_presets_work_on_other_data_and_go_on(preset, tmp_path):
    run, said = stage(preset, tmp_path / "run", "model.factor.iterations=20")
    assert run.config.model.latent_dim == run.model.latent_dim == 30
    assert "model.latent_dim: 30 instead of the preset's 64" in said
    assert Run.open(tmp_path / "run").model.latent_dim == 30
    again, _ = stage(preset, tmp_path / "run", "model.factor.iterations=20")
    assert again.weights_digest == run.weights_digest


def test_a_chosen_dimension_is_kept_or_refused(tmp_path):
    run, _ = stage("pca", tmp_path / "run", "model.latent_dim=50")
    assert run.model.latent_dim == 50
    with pytest.raises(ConfigError, match="expects 1 to 60"):
        stage("pca", tmp_path / "other", "model.latent_dim=64")
    assert not (tmp_path / "other").exists()
