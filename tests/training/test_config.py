"""Configuration: defaults, presets, overrides, and errors that name the nearest key."""

from typing import get_args

import pytest
from typer.testing import CliRunner

from service.bundle.input_rules import Preprocessing
from service.bundle.manifest import ScoreDefinition
from service.scores.fitting import DESCRIPTIONS
from training.cli import app
from training.config import Config, ScoreName, known_keys, load_config, parse_override, presets
from training.errors import ConfigError
from training.fitting.objectives import check_objective
from training.models.registry import FAMILIES, build_model


def test_layers_are_defaults_then_preset_then_flags_then_overrides(tmp_path):
    preset = tmp_path / "mine.toml"
    preset.write_text("seed = 3\n[model]\nlatent_dim = 5\n[optimiser]\nepochs = 7\n")
    config = load_config(str(preset), ["optimiser.epochs=9"], {"seed": 4})
    assert (config.model.latent_dim, config.seed, config.optimiser.epochs) == (5, 4, 9)
    assert config.optimiser.batch_size == Config().optimiser.batch_size


@pytest.mark.parametrize("name", presets())
def test_every_shipped_preset_is_valid(name):
    assert load_config(name)


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key 'model\.latent_dims'; did you mean 'model\.latent_dim'"):
        load_config(overrides=["model.latent_dims=4"])


def test_unknown_preset_lists_what_there_is():
    with pytest.raises(ConfigError, match=r"unknown preset 'mnits': expected one of .*; did you mean 'mnist'"):
        load_config("mnits")


@pytest.mark.parametrize(
    ("text", "keys", "value"),
    [
        ("model.latent_dim=4", ["model", "latent_dim"], 4),
        ("model.network.hidden=[8, 9]", ["model", "network", "hidden"], [8, 9]),
        ("model.network.kind=conv", ["model", "network", "kind"], "conv"),
        ("objective.beta=0.5", ["objective", "beta"], 0.5),
    ],
)
def test_overrides_are_toml_values_or_bare_words(text, keys, value):
    assert parse_override(text) == (keys, value)


@pytest.mark.parametrize("text", ["model.latent_dim", "=3", "a..b=1"])
def test_a_malformed_override_says_what_was_expected(text):
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_override(text)


def test_a_value_out_of_range_names_the_key():
    with pytest.raises(ConfigError, match=r"model\.latent_dim: .*greater than or equal to 1"):
        load_config(overrides=["model.latent_dim=0"])


@pytest.mark.parametrize("name", ["My Widgets", "../x", "-x", "a/b", "x" * 65, "x\n"])
def test_a_name_that_no_bundle_may_have_is_refused_before_the_training(name):
    with pytest.raises(ConfigError, match=r"name: .*lower-case letters.*\(got "):
        load_config(base={"name": name})


@pytest.mark.parametrize("name", ["", "x", "my-widgets", "set.v2"])
def test_a_bundles_name_or_none_is_taken(name):
    assert load_config(base={"name": name}).name == name


def test_seeds_of_the_score_are_those_of_the_manifest():
    largest = 2**32 - 1
    seed = load_config(overrides=[f"score.seed={largest}"]).score.seed
    assert ScoreDefinition(estimator="elbo", k=1, seed=seed).seed == largest
    with pytest.raises(ConfigError, match=r"score\.seed: .*less than"):
        load_config(overrides=[f"score.seed={largest + 1}"])


def test_half_precision_without_loss_scaling_is_no_choice():
    with pytest.raises(ConfigError, match=r"run\.precision: .*'32-true' or 'bf16-mixed'"):
        load_config(overrides=["run.precision=16-mixed"])


def test_a_damaged_preset_is_one_clear_error(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[model\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(path))


def test_known_keys_are_dotted():
    assert {"seed", "model.latent_dim", "model.network.kind", "data.source"} <= set(known_keys(Config))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["elbo", "iwae", "dreg"])
def test_weighted_samples_are_for_models_that_have_them(family, kind):
    config = load_config(None, [f"objective.kind={kind}", f"model.family={family}"])
    if kind == "elbo" or family == "vae" or (family, kind) == ("ladder", "iwae"):
        check_objective(config)
        return
    reason = "'dreg' is for one stochastic layer" if family == "ladder" else "has none to weigh: take 'elbo'"
    with pytest.raises(ConfigError, match=rf"^objective\.kind '{kind}' .*") as refused:
        check_objective(config)
    assert reason in str(refused.value)


@pytest.mark.parametrize("words", [["fit", "--run-dir", "run", "--fit-only"], ["compare", "digits"]])
def test_an_objective_that_a_family_has_not_is_refused_before_the_data_are_read(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--data", "nowhere", "--set", "model.family=flow", "--set", "objective.kind=iwae"]
    done = CliRunner().invoke(app, [words[0], *words[1:], *options], catch_exceptions=False)
    assert done.exit_code == 2
    assert done.stderr.strip().endswith("family 'flow' has none to weigh: take 'elbo'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "likelihood"), [("vae", "squared_error"), ("vae", "delta"), ("autoencoder", "bernoulli")]
)
def test_a_family_refuses_what_is_not_its_likelihood(family, likelihood):
    config = load_config(None, [f"model.family={family}", f"model.likelihood.family={likelihood}"])
    with pytest.raises(ConfigError, match=r"model\.likelihood\.family"):
        build_model(Preprocessing(mode="L", height=8, width=8), config.model)


def test_every_fitted_score_may_be_the_default():
    assert set(DESCRIPTIONS) == set(get_args(ScoreName))
