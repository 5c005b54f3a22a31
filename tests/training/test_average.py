"""The moving average of the weights: whole whatever was skipped, and up to date where it is judged."""

import math

import pytest
import torch

from tests.training.test_fit import SMALL
from training.config import load_config
from training.data import load_dataset
from training.fitting.averaging import average_decay
from training.fitting.devices import make_fabric
from training.fitting.fit import fit
from training.fitting.trainer import Trainer


def config_with(*overrides):
    return load_config("digits", [*SMALL, "optimiser.warmup_steps=0", *overrides])


@pytest.fixture(scope="module")
def digits():
    return load_dataset(config_with().data)


def flat(model):
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])


def trained(digits, bad_steps, steps, *overrides):
    """A trainer after so many steps, those in ``bad_steps`` (from 1) with gradients that are not finite."""
    config = config_with(*overrides)
    trainer = Trainer(config, digits, make_fabric(config))
    update, weights = trainer.update, []
    trainer.update = lambda norm: update(math.nan if trainer.state.step in bad_steps else norm)
    for _ in range(steps):
        trainer.training_step(digits.pixels(digits.splits["train"][:64]))
        weights.append(flat(trainer.model))
    return trainer, weights


@pytest.mark.parametrize("skipped", [(), (8,), (4, 5), (1, 8, 12, 16)])
def test_a_skipped_update_drops_no_average(digits, skipped):
    """Four updates in one, the weights after each fourth of them: by the recursion written out."""
    trainer, weights = trained(digits, skipped, 20, "optimiser.ema_every=4", "optimiser.ema_decay=0.9")
    moved = [after for step, after in enumerate(weights, 1) if step not in skipped]
    expected = moved[3]
    for last in range(7, len(moved), 4):
        decay = min(0.9, (1 + last) / (10 + last)) ** 4
        expected = decay * expected + (1 - decay) * moved[last]
    torch.testing.assert_close(flat(trainer.averaged), expected, atol=1e-6, rtol=1e-5)
    assert trainer.average.pending == len(moved) % 4


def test_an_average_before_its_time_weighs_what_has_come_since(digits):
    trainer, weights = trained(digits, (), 11, "optimiser.ema_every=4", "optimiser.ema_decay=0.9")
    before = flat(trainer.averaged)
    trainer.average.catch_up(trainer.state.updates)
    decay = min(0.9, 11 / 20) ** 3
    torch.testing.assert_close(flat(trainer.averaged), decay * before + (1 - decay) * weights[-1], atol=1e-6, rtol=1e-5)
    now = flat(trainer.averaged)
    trainer.average.catch_up(trainer.state.updates)
    assert torch.equal(flat(trainer.averaged), now)


def test_every_validation_of_a_short_epoch_sees_other_weights(digits, tmp_path):
    """Three steps an epoch, eight updates in one average: two of three validations told the same, and cost patience."""
    overrides = ("optimiser.batch_size=480", "run.validate_every=1", "optimiser.epochs=9", "optimiser.ema_every=8")
    config = config_with(*overrides)
    trainer = Trainer(config, digits, make_fabric(config))
    assert trainer.steps_per_epoch < config.optimiser.ema_every
    bounds = [row["bound"] for row in fit(config, digits, tmp_path).history]
    assert len(set(bounds)) == len(bounds) == 9


def test_a_decay_of_several_updates_is_theirs_together():
    assert average_decay(0.999, 9, 100_000, 8) == pytest.approx(0.999**8)
    assert average_decay(0.999, 9, 1) == pytest.approx(0.1)
    assert average_decay(0.999, 9, 9) == 0.5
