"""The benchmark of the training loop: its arithmetic, and one run with tiny counts."""

import numpy as np
import pytest

from bench.training_loop import BareLoop, Clock, WholeLoop, in_turn, measure, random_images, ratios, variants
from training.config import load_config
from training.fitting import trainer


@pytest.fixture
def tiny():
    small = ["model.network.hidden=[8]", "model.latent_dim=2", "model.prior.hidden=8", "model.prior.steps=1"]
    return load_config("mnist", [*small, "optimiser.batch_size=4", "run.threads=1", "run.checkpoint_seconds=1e9"])


def test_a_loop_that_takes_twice_the_time_has_half_the_speed():
    assert ratios([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert ratios([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]) == {"median": 0.5, "low": 0.375, "high": 0.75}


def test_each_round_runs_every_loop_once_and_the_next_one_backwards():
    ran = []
    costs = in_turn({name: lambda name=name: ran.append(name) for name in "abc"}, 3)
    assert "".join(ran) == "abccbaabc"
    assert {name: len(found) for name, found in costs.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_clock_gives_time_to_the_innermost_part_and_leaves_nothing_behind():
    now = 0

    class Owner:
        def outer(self):
            nonlocal now
            now += 3
            self.inner()
            now += 2

        def inner(self):
            nonlocal now
            now += 5

    owner, inner = Owner(), Owner.inner
    clock = Clock(lambda: now)
    with clock.watch(owner, "outer", "outer"), clock.watch(Owner, "inner", "inner"), clock.part("rest"):
        now += 7
        owner.outer()
        owner.outer()
    assert clock.spent == {"outer": 10, "inner": 10, "rest": 7}
    assert vars(owner) == {}
    assert Owner.inner is inner


def test_the_whole_loop_takes_each_image_of_its_epoch_once(tiny, tmp_path, monkeypatch):
    data, seen = random_images(3, 4, 20), []
    whole = WholeLoop(tiny, data, tmp_path)
    step = whole.trainer.training_step
    monkeypatch.setattr(whole.trainer, "training_step", lambda pixels: seen.append(pixels) or step(pixels))
    whole.epoch()
    assert whole.trainer.state.step == len(BareLoop(tiny, data).batches) == 3
    expected = data.pixels(data.splits["train"])
    np.testing.assert_array_equal(np.unique(np.concatenate(seen), axis=0), np.unique(expected, axis=0))


def test_skipped_updates_are_no_result(tiny, tmp_path):
    whole = WholeLoop(tiny, random_images(2, 4, 20), tmp_path)
    whole.trainer.state.skipped = 1
    with pytest.raises(RuntimeError, match="1 updates"):
        whole.epoch()


def test_every_part_is_watched_in_the_loop_that_has_it(tiny):
    before = {name: getattr(trainer, name) for name in ("to_unit", "derived_seed", "objective", "learning_rate")}
    result = measure(tiny, rounds=2, steps=20, clocked=1)
    for kind in ("wall", "cpu"):
        assert 0 < result[f"loop / bare, {kind}"]["median"] < 10
    parts = result["parts, CPU microseconds a step"]
    assert all(part["loop"] > 0 for part in parts.values()), parts
    ours = ("data indexing", "order of the epoch", "seeding", "learning rate and β", "Fabric", "skip accounting")
    ours = {*ours, "averaging", "sums of metrics", "journal", "pause"}
    assert {name for name, part in parts.items() if not part["bare"]} == ours
    assert before == {name: getattr(trainer, name) for name in before}


def test_variants_are_compared_with_float32(tiny, monkeypatch):
    monkeypatch.setattr("bench.training_loop.compile_model", lambda model, config: None)
    found = variants(
        load_config("mnist", ["model.network.kind=conv", "model.network.channels=[2]"], tiny.model_dump()), 1, 1
    )
    assert found["float32"]["cpu"]["median"] == 1
    assert {name.split(", ")[-1] for name in found} == {"float32", "bf16-mixed", "compiled", "channels_last"}
