"""Noise over parts of images, and the network that finds it: what it learns, how it resumes, how it is served."""

import math
import signal

import numpy as np
import pytest
import torch

from service.bundle.manifest import REFERENCE
from tests.training.finished import finished_run
from tests.training.shared import CORRUPTED
from tests.training.test_fit import Killed
from training.config import load_config
from training.data import load_dataset
from training.data.batches import to_unit
from training.errors import CheckpointError, ConfigError
from training.export.staging import export
from training.fitting.corruption import (
    FILE,
    CorruptionTraining,
    check_corruption,
    cross_entropy,
    load_corruption,
    painted_batch,
)
from training.fitting.devices import make_fabric
from training.fitting.loop import describe_progress
from training.fitting.painting import MAX_SHARE, UNPAINTED, VISIBLE, _coverage, _paint, painted
from training.nn.unet import UNet

SMALL = ["corruption.width=8", "corruption.epochs=1", "corruption.batch_size=32", "run.threads=1"]


def images(n=400, shape=(1, 12, 10), seed=0):
    return torch.from_numpy(np.random.RandomState(seed).rand(n, *shape).astype(np.float32))


def new_training(folder, *overrides):
    config = load_config("digits", [*SMALL, *overrides])
    return CorruptionTraining(config, load_dataset(config.data), folder, make_fabric(config))


def trained(folder, *overrides):
    found = new_training(folder, *overrides)
    found.run(lambda steps: None)
    return found


@pytest.mark.parametrize("shape", [(1, 12, 10), (3, 7, 9), (1, 1, 1), (1, 64, 5)])
def test_the_mask_is_exactly_where_the_noise_shows(shape):
    torch.manual_seed(0)
    x = images(200, shape)
    found = painted(x)
    assert found.x.shape == x.shape
    assert found.mask.shape == (200, *shape[1:])
    assert found.x.min() >= 0
    assert found.x.max() <= 1
    assert found.x.isfinite().all()
    assert torch.equal(found.mask, ((found.x - x).abs() > VISIBLE).any(1).float())
    assert found.mask.sum() > 0


def test_fifteen_images_in_a_hundred_stay_as_they_are_and_paint_covers_at_least_four_tenths():
    """A field's place at its threshold has half of an image's opacity, which is uniform from 0.4 to 1."""
    torch.manual_seed(0)
    opacity = torch.cat([_coverage(part) for part in images(4000, (1, 16, 16)).split(20)]).amax((1, 2, 3))
    unpainted = float((opacity == 0).float().mean())
    assert abs(unpainted - 0.15) < 4 * (0.15 * 0.85 / 4000) ** 0.5
    painted_over = opacity[opacity > 0]
    assert 0.2 <= float(painted_over.min()) < 0.35
    assert 0.99 < float(painted_over.max()) <= 1


def test_every_kind_of_paint_is_as_likely_as_the_others():
    """Told apart on images of one level each: grain alone varies, and the own and the next level are known."""
    torch.manual_seed(0)
    x = torch.linspace(0.2, 0.8, 3000).view(-1, 1, 1, 1).expand(-1, 1, 9, 9)
    paint = _paint(x)
    grain = paint.std((1, 2, 3)) > 0
    own, others = (torch.isclose(paint, source, atol=1e-7).all((1, 2, 3)) for source in (x, x.roll(1, 0)))
    shares = torch.stack([grain, own, others, ~(grain | own | others)]).float().mean(1)
    expected = torch.tensor([1, 1, 1, 2]) / 5  # the last of the images lighter or darker, and of any level
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / 3000) ** 0.5).all(), shares


def test_some_images_stay_as_they_are_and_no_image_is_mostly_noise():
    torch.manual_seed(0)
    x = images(2000, (1, 28, 28))
    found = torch.cat([painted(part).mask for part in x.split(20)])
    share = found.mean((1, 2))
    assert (
        UNPAINTED - 0.03 < float((share == 0).float().mean()) < UNPAINTED + 0.15
    )  # and noise that happens not to show
    assert 0.01 < float(share.mean()) < 0.15
    assert float((share > MAX_SHARE + 0.15).float().mean()) < 0.01  # soft edges reach beyond the threshold


def test_the_noise_lies_in_specks_and_in_areas():
    """Neighbours are painted alike, more or less so as the field's scale was drawn."""
    torch.manual_seed(0)
    alike = []
    for part in images(800, (1, 28, 28)).split(20):
        mask = painted(part).mask
        pairs = mask[:, :, 1:] * mask[:, :, :-1]
        alike.append(float(pairs.sum() / mask[:, :, 1:].sum().clamp(min=1)))
    assert min(alike) < 0.4
    assert max(alike) > 0.7


def test_painting_is_a_function_of_the_generator():
    x = images(30)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(painted_batch(x))
    assert torch.equal(found[0].x, found[1].x)
    assert torch.equal(found[0].mask, found[1].mask)
    assert not torch.equal(found[0].x, found[2].x)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 11), (1, 2, 3), (1, 1, 1)])
def test_the_network_answers_every_size_and_rows_apart(shape):
    torch.manual_seed(0)
    network = UNet(shape, 8).eval()
    x = images(3, shape)
    with torch.no_grad():
        together = network(x)
        assert together.shape == (3, *shape[1:])
        torch.testing.assert_close(together[1:2], network(x[1:2]), rtol=1e-5, atol=1e-5)


def test_odd_images_are_continued_at_their_ends_and_places_stay_where_they_are():
    torch.manual_seed(0)
    odd, whole = (UNet(shape, 8).eval() for shape in ((1, 9, 11), (1, 16, 16)))
    whole.load_state_dict(odd.state_dict())
    x = images(2, (1, 9, 11))
    continued = torch.nn.functional.pad(x, (0, 5, 0, 7), mode="replicate")
    with torch.no_grad():
        torch.testing.assert_close(odd(x), whole(continued)[:, :9, :11])


def test_the_cross_entropy_is_least_at_the_log_odds():
    """Of places of which a tenth are painted: log odds log(1/9), entropy of that share."""
    mask = torch.zeros(1, 10, 10)
    mask[0, 0] = 1
    at = torch.full_like(mask, float(np.log(1 / 9)), requires_grad=True)
    loss = cross_entropy(at, mask)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-(0.1 * np.log(0.1) + 0.9 * np.log(0.9)), rel=1e-6)
    assert float(at.grad.sum().abs()) < 1e-6


@pytest.mark.integration
def test_it_learns_where_the_noise_is(tmp_path):
    """Of slopes of grey, which noise leaves anywhere."""
    down, across = np.random.RandomState(0).rand(2, 800, 1, 1)
    row, column = np.indices((16, 16)) / 15
    np.save(tmp_path / "slopes.npy", (255 * (down * row + across * column) / 2).astype(np.uint8))
    config = load_config(None, [*SMALL, "corruption.epochs=25"], {"data": {"source": str(tmp_path / "slopes.npy")}})
    found = CorruptionTraining(config, load_dataset(config.data), tmp_path, make_fabric(config))
    found.run(lambda steps: None)
    torch.manual_seed(1)
    noisy = painted_batch(to_unit(found.dataset.pixels(found.dataset.splits["test"])))
    with torch.no_grad():
        log_odds = found.average.averaged.eval()(noisy.x)
    there, elsewhere = log_odds[noisy.mask > 0].numpy(), log_odds[noisy.mask == 0].numpy()
    assert (there[:, None] > np.random.RandomState(0).choice(elsewhere, 2000)).mean() > 0.9
    share = float(noisy.mask.mean())
    entropy = -(share * np.log(share) + (1 - share) * np.log(1 - share))  # which the share alone has
    assert found.state.cross_entropy < entropy


def send_sigint():
    signal.raise_signal(signal.SIGINT)


def die():
    raise Killed


@pytest.mark.integration
@pytest.mark.parametrize(
    ("end", "raised", "kept"),
    [(send_sigint, KeyboardInterrupt, 7), (die, Killed, 4)],
    ids=["stopped by SIGINT", "killed steps after its checkpoint"],
)
def test_a_training_that_was_left_ends_with_the_same_weights(tmp_path, end, raised, kept):
    whole = trained(tmp_path / "whole")
    left = new_training(tmp_path / "left", "run.checkpoint_seconds=1e9")

    def progress(steps):
        if left.state.step == 4:
            left.save()
        if left.state.step == 7:
            end()

    with pytest.raises(raised):
        left.run(progress)
    assert load_corruption(tmp_path / "left", left.config, left.dataset)["step"] == kept < whole.total_steps
    again = trained(tmp_path / "left")
    assert again.resumed
    assert again.state.finished
    assert again.state.cross_entropy == whole.state.cross_entropy
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, again.average.state_dict()[name]), name


def test_the_learning_rate_warms_up_and_falls_as_half_a_cosine(tmp_path):
    """To all of it over 100 steps, times (1 + cos πt)/2 at the share t of all steps that are done."""
    found = new_training(tmp_path, "corruption.epochs=50", "corruption.learning_rate=0.004")
    rates = {}
    for step in (0, 49, 99, 100, found.total_steps // 2, found.total_steps * 3 // 4, found.total_steps - 1):
        found.state.step = step
        found.step(images(8, (1, 8, 8)).numpy())
        (rates[step],) = {group["lr"] for group in found.optimiser.param_groups}
    for step, rate in rates.items():
        warm, done = min(1, (step + 1) / 100), step / found.total_steps
        assert rate == pytest.approx(0.004 * warm * (1 + math.cos(math.pi * done)) / 2, rel=1e-12), step
    assert found.total_steps == 50 * 44, "an epoch of 1437 images ends with 44 whole batches of 32"
    assert rates[found.total_steps // 2] == pytest.approx(0.002)
    assert rates[found.total_steps - 1] < 1e-8


@pytest.mark.parametrize(("most", "decays"), [(0.999, (1 / 6, 3 / 13)), (0.2, (1 / 6, 0.2))])
def test_the_moving_average_keeps_more_of_itself_from_step_to_step(tmp_path, most, decays):
    """The weights after the first step, then (t/(10 + t)), but at most ``ema_decay``, of what it was."""
    found = new_training(tmp_path, f"corruption.ema_decay={most}")
    x, weights, averages = images(8, (1, 8, 8)).numpy(), [], []
    for _ in range(3):
        found.step(x)
        for vectors, network in ((weights, found.network), (averages, found.average.averaged)):
            vectors.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    torch.testing.assert_close(averages[0], weights[0], rtol=0, atol=0)
    for before, after, now, decay in zip(averages, averages[1:], weights[1:], decays, strict=False):
        torch.testing.assert_close(after, decay * before + (1 - decay) * now, rtol=1e-5, atol=1e-8)


def test_a_gradient_is_no_longer_than_one(tmp_path):
    found = new_training(tmp_path)
    with torch.no_grad():
        found.network.head.weight.mul_(1000)
    found.step(images(8, (1, 8, 8)).numpy())
    norms = [parameter.grad.norm() for parameter in found.network.parameters()]
    assert float(torch.stack(norms).norm()) == pytest.approx(1, rel=1e-4)


def test_a_finished_training_is_not_repeated(tmp_path):
    first = trained(tmp_path / "run")
    before = (tmp_path / "run" / FILE).read_bytes()
    again = trained(tmp_path / "run")
    assert (tmp_path / "run" / FILE).read_bytes() == before
    assert again.state == first.state
    assert "done before" in describe_progress(again)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("corruption.width=16", "corruption.width: 8 -> 16"),
        ("seed=3", "seed: 0 -> 3"),
        ("data.split_seed=5", "data: "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    trained(tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"another configuration \({named}.*remove it, or use another --run-dir"):
        new_training(tmp_path / "run", change)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    found = trained(tmp_path / "run")
    (tmp_path / "run" / FILE).write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_corruption(tmp_path / "run", found.config, found.dataset)


def test_the_graph_gives_what_the_network_gives(fitted_family):
    run, model = fitted_family(CORRUPTED)
    bundle = model.bundle
    reference = bundle.arrays(REFERENCE)
    with torch.no_grad():
        wanted = run.corruption(torch.from_numpy(reference["x"])).numpy()
    np.testing.assert_allclose(reference["corruption.log_odds"], wanted, rtol=1e-5, atol=1e-5)
    served = model.run_graph("corruption", {"x": reference["x"]})
    np.testing.assert_allclose(served["log_odds"], wanted, rtol=1e-4, atol=1e-4)
    facts = bundle.manifest.provenance.training["corruption"]
    assert facts["epochs"] == 1
    assert facts["weights_sha256"] == run.corruption_facts["weights_sha256"]


def test_an_unfinished_network_is_not_exported(tmp_path, monkeypatch):
    # The model's own graphs take seconds.
    monkeypatch.setattr("training.export.staging.export_graphs", lambda model, progress: {})
    run = finished_run(tmp_path, (12, 12), {"latent_dim": 3}, corruption={"width": 8, "epochs": 1})
    with pytest.raises(CheckpointError, match="vaetrain fit"):
        export(run)


def test_it_is_about_images(tmp_path):
    run = finished_run(tmp_path, (5,), {"latent_dim": 2, "likelihood": {"family": "gaussian"}}, dtype=np.float32)
    config = run.config.model_copy(update={"corruption": load_config("digits", SMALL).corruption})
    with pytest.raises(ConfigError, match="painted over images"):
        check_corruption(config, run.dataset)
