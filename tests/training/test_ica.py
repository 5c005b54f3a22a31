"""ICA: sources recovered, densities by change of variables, inverses, and draws of the sources' densities."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import FastICA

from service.bundle.input_rules import ArrayPreprocessing
from tests.training.solved import digits, log_weights, solved, targets
from training.config import ModelConfig
from training.distributions.logistic import log_normal_tail, standard_logistic_from_normal
from training.errors import ConfigError, DataError
from training.models.priors import ExtendedSources, LogisticSources
from training.models.registry import build_model

ICA = {"likelihood": {"family": "delta"}}
EXTENDED = ICA | {"ica": {"source": "extended"}}


def heavy_sources(count=4000):
    """Three sources of heavy tails: float64 [count,3]."""
    random = np.random.RandomState(0)
    return np.stack([random.laplace(size=count), random.standard_t(4, count), random.logistic(size=count) ** 3], 1)


def mixed_sources(count=4000):
    """A sine, a square wave, uniform noise and a Laplacian: float64 [count,4], three of lighter tails than N."""
    random, t = np.random.RandomState(0), np.arange(count)
    return np.stack(
        [np.sin(t / 7), np.sign(np.sin(t / 31.0)), random.uniform(-1, 1, count), random.laplace(size=count)], 1
    )


def mix(sources, seed=1):
    """Sources [n,D] through a random square matrix, in unequal units: float64 [n,D]."""
    count = sources.shape[1]
    matrix = np.random.RandomState(seed).standard_normal((count, count)) * np.geomspace(0.1, 10, count)[:, None]
    return sources @ matrix.T + 3


def recovery(found, sources):
    """For each source the largest |correlation| with something found, each found once: [D]."""
    table = np.abs(np.corrcoef(found.T, sources.T)[: found.shape[1], found.shape[1] :])
    assert len(set(table.argmax(0))) == len(table)
    return table.max(0)


@pytest.fixture(scope="module")
def of_vectors():
    return solved(mix(heavy_sources()), "ica", **ICA)


@pytest.fixture(scope="module")
def of_digits():
    return solved(digits(), "ica", **EXTENDED | {"ica": {"source": "extended", "iterations": 20}})


def test_sources_of_heavy_tails_are_recovered(of_vectors):
    model, dataset = of_vectors
    found = model.encode(targets(model, dataset)).loc
    sources = heavy_sources()[dataset.splits["train"]]
    assert recovery(found.detach().numpy(), sources).min() > 0.99
    oracle = FastICA(3, whiten="unit-variance", random_state=0).fit_transform(mix(heavy_sources())[: len(sources)])
    assert recovery(found.detach().numpy(), oracle).min() > 0.99


def test_sources_of_lighter_tails_are_recovered_by_the_extended_densities():
    sources = mixed_sources()
    model, dataset = solved(mix(sources), "ica", **EXTENDED)
    found = model.encode(targets(model, dataset)).loc
    assert recovery(found.detach().numpy(), sources[dataset.splits["train"]]).min() > 0.99
    assert sorted(model.prior.mixed.tolist()) == [0, 1, 1, 1]


@torch.no_grad()
def test_the_fit_is_stationary_in_scale_location_and_mixing():
    model, dataset = solved(mix(np.random.RandomState(0).exponential(size=(4000, 3)) ** 1.5), "ica", **ICA)
    z = model.encode(targets(model, dataset)).loc
    score = torch.tanh(z / 2)  # −d log p/dz of the logistic
    torch.testing.assert_close(score.mean(0), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(score.T @ z / len(z), torch.eye(3), atol=0.02, rtol=0)


@torch.no_grad()
def test_log_p_is_the_change_of_variables_by_autograd(of_vectors):
    model, dataset = of_vectors
    x = torch.from_numpy(dataset.pixels(dataset.splits["test"][:5]))
    log_w = log_weights(model, model.likelihood.target(x, None), torch.randn(5, 3, 0))
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(
            lambda row: model.encode(model.likelihood.target(row, None)).loc, x[i : i + 1].double()
        )
        z = model.encode(model.likelihood.target(x[i : i + 1], None)).loc
        log_p = stats.logistic.logpdf(z.double().numpy()).sum() + torch.linalg.slogdet(jacobian.reshape(3, 3))[1]
        np.testing.assert_allclose(log_w[i], np.full(3, log_p), atol=1e-4)
        np.testing.assert_allclose(model.log_prob(x[i : i + 1]), [log_p], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["of_vectors", "of_digits"])
def test_x_to_z_to_x_and_back(name, request):
    model, dataset = request.getfixturevalue(name)
    target = targets(model, dataset, "test")
    z = model.encode(target).loc
    again = model.decode(z).loc
    torch.testing.assert_close(again, target, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode(again).loc, z, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_unmixing_images_gains_over_whitening_and_over_a_gaussian(of_digits):
    model, dataset = of_digits
    target = targets(model, dataset, "test")
    log_p = log_weights(model, target, torch.zeros(len(target), 1, 0)).mean()
    rows = targets(model, dataset).flatten(1).double()
    gaussian = torch.distributions.MultivariateNormal(rows.mean(0), torch.cov(rows.T))
    assert log_p > gaussian.log_prob(target.flatten(1).double()).mean() + 10


def test_draws_have_the_sources_distribution():
    torch.manual_seed(0)
    drawn = LogisticSources(1).sample(torch.randn(20_000, 1)).numpy().ravel()
    assert stats.kstest(drawn, "logistic").pvalue > 0.01
    extended = ExtendedSources(2)
    extended.mixed.copy_(torch.tensor([1.0, 0.0]))
    first, second = extended.sample(torch.randn(20_000, 4)).numpy().T
    mixture = lambda s: 0.5 * stats.norm.cdf(s, -1) + 0.5 * stats.norm.cdf(s, 1)  # noqa: E731
    assert stats.kstest(first, mixture).pvalue > 0.01
    assert stats.kstest(second, "logistic").pvalue > 0.01


def test_tails_keep_their_precision_in_float32():
    noise = torch.cat([torch.linspace(-12, 12, 481), torch.tensor([0.0, 1e-4, -1e-4])])
    exact = stats.norm.logcdf(noise.double().numpy()) - stats.norm.logsf(noise.double().numpy())
    np.testing.assert_allclose(standard_logistic_from_normal(noise), exact, rtol=2e-6, atol=1e-6)
    a = torch.linspace(0, 30, 301)
    np.testing.assert_allclose(log_normal_tail(a), stats.norm.logsf(a.double().numpy()), rtol=1e-6, atol=1e-6)


def test_densities_integrate_to_one():
    grid = torch.linspace(-40, 40, 80_001, dtype=torch.float64).unsqueeze(1).expand(-1, 2)
    sources = ExtendedSources(2)
    sources.mixed.copy_(torch.tensor([0.0, 1.0]))
    total = torch.trapezoid(torch.exp(sources.log_density(grid)), dx=1e-3, dim=0)
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)


def test_dependent_numbers_are_refused():
    rows = mix(heavy_sources(500))
    rows[:, 2] = rows[:, 0] - rows[:, 1]
    with pytest.raises(DataError, match="linearly independent"):
        solved(rows, "ica", **ICA)
    with pytest.raises(DataError, match="linearly independent"):
        solved(np.pad(rows[:, :2], ((0, 0), (0, 1)), constant_values=1.0), "ica", **ICA)


def test_another_likelihood_is_refused():
    config = ModelConfig.model_validate({"family": "ica", "likelihood": {"family": "gaussian"}})
    with pytest.raises(ConfigError, match="expected delta, got gaussian"):
        build_model(ArrayPreprocessing(kind="vector", natural=(3,)), config)


def test_the_same_seed_gives_the_same_weights():
    rows = digits()[:300]
    first, second = (solved(rows, "ica", **ICA, ica={"iterations": 10})[0] for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
