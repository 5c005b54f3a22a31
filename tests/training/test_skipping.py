"""Which updates are left out, by the gradient's norm alone and in a run: outliers, but never what has become usual."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from tests.training.test_fit import SMALL, Killed, assert_same_weights, weights
from training.config import load_config
from training.data import load_dataset
from training.errors import CheckpointError, TrainingDiverged
from training.fitting.checkpoint import FILE, load_checkpoint, save_checkpoint
from training.fitting.devices import make_fabric
from training.fitting.fit import ModelTraining, fit
from training.fitting.skipping import MAX_SKIPPED_IN_A_ROW, OUTLIER, RECENT, is_sane, remember
from training.fitting.trainer import Trainer


def config_with(*overrides):
    return load_config("digits", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def digits():
    return load_dataset(config_with().data)


def judged(norms, limit=None):
    recent, sane = [], []
    for norm in norms:
        sane.append(is_sane(norm, recent, limit))
        remember(norm, recent)
    return sane


def test_norms_that_grow_by_orders_of_magnitude_are_sane():
    """Those of photographs on white ground do: the constant part is soon known to a grey level."""
    assert all(judged(100 * 1.05 ** np.arange(400)))
    noisy = np.exp(np.random.RandomState(0).normal(0, 0.7, 2000))
    assert all(judged(noisy))


def test_an_outlier_is_skipped_and_moves_the_measure_little():
    sane = judged([100.0] * 50 + [100.0 * OUTLIER * 1.01] + [100.0] * 50)
    assert [i for i, good in enumerate(sane) if not good] == [50]


@pytest.mark.parametrize(("norm", "taken"), [(2999.0, True), (3000.0, True), (3001.0, False)])
def test_thirty_times_the_median_is_taken_and_more_is_skipped(digits, norm, taken):
    """Of norms 50, 100 and 200 the median is 100; the weights move if, and only if, the step is taken."""
    config = config_with()
    trainer = Trainer(config, digits, make_fabric(config))
    trainer.training_step(digits.pixels(digits.splits["train"][:64]))  # leaves gradients behind
    trainer.state.recent_norms = [50.0, 100.0, 200.0] * 8
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.update(norm)
    moved = [name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(moved) == taken
    assert trainer.state.skipped == (not taken)
    assert trainer.state.recent_norms[-1] == norm


def test_a_norm_that_stays_at_a_new_level_is_soon_usual():
    sane = judged([1.0] * 200 + [1e6] * 200)
    assert sane.count(False) == RECENT // 2 < MAX_SKIPPED_IN_A_ROW
    assert all(sane[200 + RECENT // 2 :])


def test_the_first_norms_are_taken_as_they_come_unless_they_are_not_finite():
    assert judged([1.0, 1e9, 1.0, math.inf, math.nan]) == [True, True, True, False, False]
    assert judged([1.0] * 19 + [1e9])[-1] is True
    assert judged([1.0] * 20 + [1e9])[-1] is False


def test_the_newest_64_norms_are_remembered():
    recent = []
    for norm in range(100):
        remember(float(norm), recent)
    assert recent == [float(norm) for norm in range(36, 100)]


def test_what_is_not_finite_is_never_usual():
    assert judged([1.0] * 30 + [math.nan] * 300 + [1.0]) == [True] * 30 + [False] * 300 + [True]


def test_a_configured_limit_holds_from_the_first_step():
    assert judged([1.0, 2.1, 2.1, 1.9], limit=2.0) == [True, False, False, True]


def skipping_at(monkeypatch, outliers, die_at=None):
    """Multiply the gradient of the steps in ``outliers`` by 1e6; die at the beginning of step ``die_at``."""
    update = Trainer.update

    def scaled(trainer, norm):
        if trainer.state.step == die_at:
            raise Killed
        return update(trainer, norm * 1e6 if trainer.state.step in outliers else norm)

    monkeypatch.setattr(Trainer, "update", scaled)


@pytest.mark.integration
def test_a_run_killed_after_a_skipped_update_ends_with_the_same_weights(digits, tmp_path, monkeypatch):
    """Seen from a warm-up begun anew, the second outlier, soon after the resume, would be none."""
    config, outliers = config_with("run.checkpoint_seconds=0", "run.validate_every=1"), (24, 40, 64)
    with monkeypatch.context() as patch:
        skipping_at(patch, outliers)
        fit(config, digits, tmp_path / "whole")
    with monkeypatch.context() as patch:
        skipping_at(patch, outliers, die_at=37)
        with pytest.raises(Killed):
            fit(config, digits, tmp_path / "killed")
    with monkeypatch.context() as patch:
        skipping_at(patch, outliers)
        fit(config, digits, tmp_path / "killed")
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    states = [load_checkpoint(tmp_path / name)["state"] | {"seconds": 0} for name in ("whole", "killed")]
    assert states[0] == states[1]
    assert states[0]["skipped"] == 3


@pytest.mark.integration
def test_photographs_on_white_ground_train_on(tmp_path):
    """White ground under a discretised logistic: the norm passes 2000 for 784 pixels within 200 steps, and is sane."""
    random, grid = np.random.RandomState(0), np.linspace(-1, 1, 28)
    height, width, shade = random.uniform(0.2, 0.9, (3, 160, 1, 1))
    inside = (np.abs(grid[:, None]) < height) & (np.abs(grid) < width)
    np.save(tmp_path / "white.npy", np.where(inside, 200 * shade * (1 + grid) / 2, 255).astype(np.uint8))
    overrides = ["model.network.kind=mlp", "model.network.hidden=[64]", "optimiser.learning_rate=5e-3", "run.threads=1"]
    overrides += ["optimiser.epochs=100", "optimiser.warmup_steps=10", "objective.warmup_epochs=0"]
    config = load_config("images", overrides, {"data": {"source": str(tmp_path / "white.npy")}})
    fitted = fit(config, load_dataset(config.data), tmp_path / "run")
    norms = fitted.state.recent_norms
    assert max(norms) > 2000
    assert fitted.state.skipped <= 3


def test_gradients_that_are_not_finite_end_the_run_with_a_remedy(digits):
    config = config_with()
    trainer = Trainer(config, digits, make_fabric(config))
    for _ in range(99):
        trainer.update(math.nan)
    with pytest.raises(TrainingDiverged, match=r"nan; lower optimiser\.learning_rate$"):
        trainer.update(math.nan)


def test_a_checkpoint_from_when_the_limit_was_a_default_goes_on(digits, tmp_path):
    config = config_with("optimiser.skip_above=2000.0")
    training = ModelTraining(config, digits, tmp_path, make_fabric(config))
    training.save()
    content = torch.load(tmp_path / FILE, weights_only=True)
    del content["state"]["recent_norms"]
    torch.save(content, tmp_path / FILE)
    now = ModelTraining(config_with(), digits, tmp_path, make_fabric(config))
    assert now.resumed
    assert asdict(now.state) == asdict(training.state)
    assert load_checkpoint(tmp_path, config)  # as its own config.json has it
    save_checkpoint(tmp_path, config_with("optimiser.skip_above=7.0"), {"best": {}})
    with pytest.raises(CheckpointError, match=r"skip_above: 7\.0 -> None"):
        load_checkpoint(tmp_path, config_with())
