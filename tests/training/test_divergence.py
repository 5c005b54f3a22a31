"""A training that has diverged is refused at publishing; one that has learned little, or nothing, is not."""

import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import optimize
from typer.testing import CliRunner

from service.inference.verification import verify_bundle
from tests.training.shared import CASES, copied
from tests.training.solved import dataset_of, solved
from training.cli import app
from training.config import Config, LikelihoodConfig
from training.console import all_stages, publish_stage
from training.distributions import DiscretisedLogistic
from training.errors import ModelDiverged
from training.evaluation.best_constant import CONSTANTS, best_constant
from training.export.divergence import is_worse, refuse_diverged, standing
from training.export.staging import open_staged
from training.fitting.checkpoint import load_checkpoint, save_checkpoint
from training.fitting.trainer import State, initial_model
from training.models.likelihoods import LIKELIHOODS, build_likelihood
from training.reporting import figures
from training.reporting.report import draw
from training.runs import SCORES, Run

SHAPE = (1, 2, 2)


def grey(count=300):
    """Pixels of different spread at each of four places, float32 [N,1,2,2], on the 256 levels."""
    random = np.random.RandomState(0)
    x = random.beta([0.3, 2, 8, 1], [0.3, 5, 2, 1], (count, 4)).reshape(count, *SHAPE)
    return np.round(x * 255).astype(np.uint8)


def untrained(likelihood):
    """An untrained model of that likelihood, its data set, and the configuration."""
    kind = {"delta": "flow", "squared_error": "autoencoder"}.get(likelihood, "vae")
    config = Config.model_validate({
        "model": {"family": kind, "latent_dim": 2, "network": {"hidden": [4]}, "flow": {"levels": 1, "steps": 1},
                  "likelihood": {"family": likelihood}},
    })  # fmt: skip
    dataset = dataset_of(grey())
    return initial_model(config, dataset).eval(), dataset, config


CASES_OF_LIKELIHOODS = {
    "bernoulli": {},
    "bernoulli, threshold": {"binarisation": "threshold"},
    "cross_entropy": {},
    "squared_error": {},
    "continuous_bernoulli": {},
    "gaussian, fixed": {"scale": "fixed", "fixed_scale": 0.2},
    "gaussian, shared": {"scale": "shared"},
    "gaussian, diagonal": {"scale": "diagonal"},
    "gaussian, pixel": {"scale": "pixel"},
    "discretised_logistic": {},
}


@pytest.mark.parametrize("name", CASES_OF_LIKELIHOODS)
def test_no_other_constant_suits_the_training_rows_better(name):
    """Held against the optimum of its own log p by descent, from the constant on, by the parameters of each place."""
    family = name.partition(",")[0]
    config = LikelihoodConfig(family=family, **CASES_OF_LIKELIHOODS[name])
    likelihood = build_likelihood(config, SHAPE)
    x = torch.from_numpy(grey().astype(np.float32) / 255)
    dither = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) if likelihood.dither else None
    target = likelihood.target(x, dither)
    found = max(float(constant(target).mean()) for constant in CONSTANTS[family](likelihood, target, config))

    @torch.no_grad()
    def loss(raw):
        raw = torch.tensor(raw, dtype=torch.float32).view(1, likelihood.raw, *SHAPE)
        if config.scale in ("shared", "diagonal") and family == "gaussian":
            likelihood.set_scale(deviation)
        return -float(likelihood.total(likelihood.log_prob(target, likelihood(raw))).mean())

    spread = target.var(0, unbiased=False)
    deviation = (spread if config.scale == "diagonal" else spread.mean()).sqrt()
    start = np.zeros((likelihood.raw, *SHAPE))
    start[0] = target.mean(0).numpy()
    if likelihood.raw == 2:
        start[1] = np.log(spread.sqrt().numpy()) + 2
    best = -optimize.minimize(loss, start.flatten(), method="Powell", options={"maxiter": 60}).fun
    tolerance = 0.02 * 4 if family == "discretised_logistic" else 0.02  # of a grid; of half a row more
    assert found == pytest.approx(best, abs=tolerance)


def test_a_mixture_of_logistics_has_the_constant_of_one():
    target = torch.from_numpy(grey().astype(np.float32) / 255)
    one, mixture = (
        CONSTANTS[family](build_likelihood(config, SHAPE), target, config)[0](target)
        for family in ("discretised_logistic", "logistic_mixture")
        for config in [LikelihoodConfig(family=family)]
    )
    assert torch.equal(one, mixture)
    moments = DiscretisedLogistic(target.mean(0), target.std(0) * math.sqrt(3) / math.pi)
    assert one.mean() > moments.log_prob(target).sum((1, 2, 3)).mean()


def test_of_vectors_the_constant_is_a_density_in_their_own_units():
    """As of the data themselves under N(mean, deviation²), and the same for a Gaussian and for a bijection."""
    rows = np.random.RandomState(0).standard_normal((400, 3)) * [0.1, 10, 1000] + 5
    model, dataset = solved(rows, "ica", likelihood={"family": "delta"})
    train, held = rows[:320], rows[320:]
    deviation = train.std(0)
    expected = (-0.5 * ((held - train.mean(0)) / deviation) ** 2 - np.log(deviation * np.sqrt(2 * np.pi))).sum(1)
    held_out = dataset.splits["validation"]
    density = best_constant(model, dataset, held_out, LikelihoodConfig(family="delta"))
    np.testing.assert_allclose(density, expected, atol=0.02)
    model, dataset = solved(rows, "fa", latent_dim=1, likelihood={"family": "gaussian", "scale": "diagonal"})
    gaussian = best_constant(model, dataset, held_out, LikelihoodConfig(family="gaussian", scale="diagonal"))
    np.testing.assert_allclose(gaussian, expected, atol=0.02)


def test_the_constant_of_a_bijection_of_pixels_is_uniform_where_that_is_better():
    rows = np.random.RandomState(0).randint(0, 256, (200, 1, 2, 2)).astype(np.uint8)
    model, dataset = solved(rows, "ica", likelihood={"family": "delta"})
    found = best_constant(model, dataset, dataset.splits["validation"], LikelihoodConfig(family="delta"))
    assert (found == 0).all()
    narrow, dataset = solved(100 + rows // 16, "ica", likelihood={"family": "delta"})
    found = best_constant(narrow, dataset, dataset.splits["validation"], LikelihoodConfig(family="delta"))
    assert found.mean() == pytest.approx(4 * (math.log(16) + 0.5 * math.log(12) - 0.5 * math.log(2 * math.pi * math.e)),
                                         abs=0.2)  # fmt: skip


def test_every_likelihood_has_a_constant():
    assert CONSTANTS.keys() == LIKELIHOODS.keys()


@pytest.mark.parametrize(
    ("gain", "worse"),
    [
        ([0.0] * 20, False),
        ([-4.0] * 20, False),
        ([-6.0] * 20, True),
        ([math.nan] * 20, True),
        ([-math.inf] * 20, True),
        ([1.0] * 19 + [math.nan], True),
        ([1.0] * 19 + [-1e17], False),  # one odd row
        ([1.0] * 60 + [-1e17] * 40, True),  # many of them
        ([-1e17, -1e3, -1e19], True),  # of few rows the mean says little
    ],
)
def test_worse_is_beyond_the_slack_and_beyond_chance(gain, worse):
    assert is_worse(np.array(gain) - 100.0, np.full(len(gain), -100.0), 5.0) == worse


@pytest.mark.parametrize("case", CASES)
@pytest.mark.integration
def test_no_family_is_refused_after_two_epochs(case, fitted_family):
    refuse_diverged(fitted_family(case).run)


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretised_logistic", "gaussian", "delta", "squared_error"])
def test_a_model_that_has_learned_nothing_stands_and_one_blown_up_does_not(likelihood):
    model, dataset, config = untrained(likelihood)
    assert not standing(model, dataset, config, 1).diverged
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30).add_(10)
    found = standing(model, dataset, config, 1)
    assert found.diverged
    assert found.model < found.untrained


def test_a_collapsed_posterior_is_no_divergence():
    """The decoder says the pixels' means whatever z, and q(z|x) is the prior: the bound is the constant."""
    model, dataset, config = untrained("bernoulli")
    found = standing(model, dataset, config, 1)
    assert found.model == pytest.approx(found.constant, abs=1.5)


def test_a_small_beta_weighs_the_rate_as_the_training_did():
    model, dataset, _ = untrained("bernoulli")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" in name:
                parameter.mul_(20)  # a rate of many nats
    tree = {"model": {"latent_dim": 2, "network": {"hidden": [4]}}}
    free, full = (
        standing(model, dataset, Config.model_validate(tree | {"objective": {"beta": beta}}), 1) for beta in (0, 1)
    )
    assert full.model < free.model - 20
    assert (full.diverged, free.diverged) == (True, False)


FAST = ["optimiser.epochs=2", "run.validate_every=1", "run.threads=1", "evaluate.k=4", "score.k=2"]


def vaetrain(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def fit(folder, *words):
    overrides = [word for text in FAST for word in ("--set", text)]
    return vaetrain(
        "fit", "--data", "digits", *overrides, "--run-dir", folder / "run", "--to", folder / "exported", *words
    )


@pytest.mark.integration
def test_a_learning_rate_of_ten_thousand_is_refused_in_words_and_published_if_insisted_on(tmp_path):
    """An autoencoder's errors are then beyond float32: their figure ended in a traceback."""
    words = ["--preset", "autoencoder", "--set", "optimiser.learning_rate=1e4"]
    assert_refused(fit(tmp_path, *words), tmp_path)
    done = fit(tmp_path, *words, "--publish-anyway")
    assert done.exit_code == 0, done.stderr
    assert verify_bundle(tmp_path / "exported/digits/1").ok
    refused = vaetrain("publish", tmp_path / "run", "--to", tmp_path / "exported")
    assert refused.exit_code == 2
    assert "the training has diverged" in refused.stderr
    assert vaetrain("publish", tmp_path / "run", "--to", tmp_path / "exported", "--publish-anyway").exit_code == 0


@pytest.mark.integration
def test_an_elbo_of_minus_ten_to_the_eighteen_is_refused(tmp_path):
    words = [
        "--set",
        "model.latent_dim=2",
        "--set",
        "model.network.hidden=[16]",
        "--set",
        "optimiser.learning_rate=1e4",
    ]
    assert_refused(fit(tmp_path, *words), tmp_path)


def assert_refused(done, folder):
    """In one line that names both numbers and what to do, before anything is computed from the model."""
    assert done.exit_code == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vaetrain: the training has diverged: ")
    run = Run.open(folder / "run")
    found = standing(run.model, run.dataset, run.config, run.checkpoint["state"]["best_epoch"])
    for number in (found.model, found.constant):
        assert f"{abs(number):.4g}" in last
    assert "lower optimiser.learning_rate (10000 here)" in last
    assert "--publish-anyway" in last
    assert not (folder / "exported").exists()
    assert not (folder / "run" / "metrics.json").exists()


def test_a_bound_that_is_not_a_number_is_never_the_best():
    state = State()
    assert not state.is_best(1, math.nan, warmed_up=True)
    assert state.is_best(2, -3.0, warmed_up=True)
    assert not state.is_best(3, math.nan, warmed_up=True)
    assert (state.best_epoch, state.best_bound) == (2, -3.0)


@pytest.mark.integration
def test_a_training_without_one_finite_bound_is_refused_though_its_weights_are_those_before(tmp_path):
    done = fit(tmp_path, "--set", "model.likelihood.family=gaussian", "--set", "optimiser.learning_rate=1e4")
    assert done.exit_code == 2
    assert "fit: no validation gave a finite bound" in done.stderr
    assert "the training has diverged: no validation gave a finite bound; lower optimiser.learning_rate" in done.stderr


def blown_up(run, folder):
    """A copy of the run, its weights far off."""
    run = copied(run, folder)
    content = load_checkpoint(run.folder)
    content["best"] = {name: value * 1e3 + 10 for name, value in content["best"].items()}
    save_checkpoint(run.folder, run.config, content)
    return Run.open(run.folder)


@pytest.mark.integration
def test_nothing_is_drawn_or_published_of_a_model_that_has_diverged(calibrated_run, tmp_path):
    run, console = blown_up(calibrated_run, tmp_path), Console(file=io.StringIO())
    with pytest.raises(ModelDiverged, match="worse than the best constant"):
        all_stages(run, tmp_path / "exported", console)
    with pytest.raises(ModelDiverged, match="worse than the best constant"):
        publish_stage(run, tmp_path / "exported", console)
    assert not (run.folder / "report").exists()
    assert not (tmp_path / "exported").exists()


def test_figures_of_numbers_that_are_not_finite_have_gaps():
    history = [{"epoch": e, "a": value, "b": 1.0} for e, value in enumerate([1.0, math.nan, -1e250, 2.0])]
    curves = [("bound", (("a", "train"), ("b", "validation")))]
    (ax,) = figures.loss_curves(history, curves).axes
    assert ax.get_ylim()[1] < 3
    assert figures.png(figures.loss_curves(history[1:2], [("bound", (("a", "train"), ("a", "validation")))]))
    assert not figures.drawable(np.array([1.0, math.nan]))
    assert not figures.drawable(np.array([1.0, -math.inf], np.float32))
    assert not figures.drawable(np.array([]))
    assert figures.drawable(np.array([1.0, 2e30], np.float32), np.array([3.0]))
    same = np.full(20, -1e25)
    assert figures.png(figures.score_histogram(same, same, {}, "elbo"))


@pytest.mark.integration
def test_a_report_leaves_out_what_cannot_be_drawn(calibrated_run, tmp_path):
    run = copied(calibrated_run, tmp_path)
    manifest = open_staged(run).manifest
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.mul_(1e30)
    with np.load(run.folder / SCORES) as archive:
        scores = {name: archive[name] for name in archive.files}
    np.savez(run.folder / SCORES, **scores | {"test.elbo": np.full_like(scores["test.elbo"], np.nan)})
    drawn = draw(run, manifest)
    assert {"loss", "score-iwae"} <= drawn.keys()
    assert not {"rate", "aggregate", "traversal", "score-elbo"} & drawn.keys()
    assert all(map(figures.png, drawn.values()))
