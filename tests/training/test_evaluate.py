"""Evaluation against the linear Gaussian model, whose log p(x) and posterior have closed forms."""

import math

import numpy as np
import pytest
import torch

from service.bundle import Preprocessing
from training.config import EvaluateConfig, LikelihoodConfig, ModelConfig
from training.data.dataset import Dataset
from training.evaluate import active_units, bits_per_dim, bounds, evaluate
from training.likelihoods import Gaussian
from training.models.vae import VAE

SHAPE = (1, 4, 5)


class Continuous(Gaussian):
    """Evaluated at the pixels themselves: these are no levels."""

    dither = False

    def target(self, x, dither):
        return x


class Linear(VAE):
    """x = W z + μ + σ ε with its exact posterior: W has orthogonal columns, so the posterior is diagonal."""

    def __init__(self, exact=True):
        config = LikelihoodConfig(family="gaussian")
        super().__init__(SHAPE, ModelConfig(latent_dim=3, likelihood=config))
        self.likelihood = Continuous(config)
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(20, 3, generator=generator)).Q
        self.W = basis * torch.tensor([0.9, 0.5, 0.2])
        self.mu = torch.full((20,), 0.4)
        self.sigma = 0.3
        self.widen = 1.0 if exact else 1.5

    def infer(self, target):
        variance = 1 / (1 + (self.W**2).sum(0) / self.sigma**2)
        loc = variance / self.sigma**2 * ((target.flatten(1) - self.mu) @ self.W)
        return loc, (variance.sqrt() * self.widen).expand_as(loc)

    def parameters_at(self, z):
        loc = (z @ self.W.T + self.mu).reshape(-1, *SHAPE)
        return loc, torch.full_like(loc, self.sigma)

    def log_evidence(self, x):
        covariance = self.W.double() @ self.W.double().T + self.sigma**2 * torch.eye(20, dtype=torch.float64)
        p = torch.distributions.MultivariateNormal(self.mu.double(), covariance)
        return p.log_prob(x.flatten(1).double()).numpy()


@pytest.fixture
def dataset():
    x = np.random.RandomState(0).random_sample((40, *SHAPE)).astype(np.float32)
    every = np.arange(40)
    return Dataset(
        name="noise",
        preprocessing=Preprocessing(mode="L", height=4, width=5),
        splits={"train": every, "validation": every, "calibration": every, "test": every},
        labels=None,
        label_names=None,
        fingerprint="0" * 64,
        skipped=[],
        dtype=x.dtype,
        store=x,
    )


@pytest.mark.parametrize("k", [1, 7, 100])
def test_every_bound_is_log_p_x_where_the_posterior_is_exact(dataset, k):
    model = Linear()
    exact = model.log_evidence(torch.from_numpy(dataset.pixels(np.arange(40))))
    found = bounds(model, dataset, dataset.splits["test"], k, chunk=64)
    np.testing.assert_allclose(found.elbo, exact, atol=2e-4)
    np.testing.assert_allclose(found.iwae, exact, atol=2e-4)
    np.testing.assert_allclose(found.distortion + found.rate, -found.elbo, atol=1e-9)


def test_bounds_are_ordered_and_converge_where_it_is_not(dataset):
    model = Linear(exact=False)
    exact = model.log_evidence(torch.from_numpy(dataset.pixels(np.arange(40)))).mean()
    means = [bounds(model, dataset, dataset.splits["test"], k).means() for k in (5, 50, 5000)]
    assert means[0]["elbo"] < means[0]["iwae"] < means[1]["iwae"] < exact + 0.01
    assert means[2]["iwae"] == pytest.approx(exact, abs=0.01)


def test_the_estimate_does_not_depend_on_the_chunk_but_for_its_draws(dataset):
    model = Linear(exact=False)
    whole, parts = (bounds(model, dataset, dataset.splits["test"], 2000, chunk).means() for chunk in (100_000, 97))
    assert whole["iwae"] == pytest.approx(parts["iwae"], abs=0.02)
    assert whole["elbo"] == pytest.approx(parts["elbo"], abs=0.05)


def test_same_seed_same_numbers(dataset):
    model = Linear(exact=False)
    first, second = (bounds(model, dataset, dataset.splits["test"], 5, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.iwae, second.iwae)
    assert (bounds(model, dataset, dataset.splits["test"], 5, seed=4).iwae != first.iwae).any()


def test_active_units_counts_dimensions_that_move(dataset):
    model = Linear()
    assert active_units(model, dataset, dataset.splits["test"]) == 3
    model.W = model.W * torch.tensor([1.0, 1.0, 1e-3])
    assert active_units(model, dataset, dataset.splits["test"]) == 2


def test_metrics_of_a_split(dataset):
    metrics = evaluate(Linear(), dataset, "test", EvaluateConfig(k=3, images=10))
    assert metrics["images"] == 10
    assert metrics["k"] == 3
    expected = -metrics["log_likelihood"] / (20 * math.log(2)) + 8
    assert metrics["bits_per_dim"] == pytest.approx(expected)


def test_bits_per_dim_of_a_fair_coin_is_one():
    model = VAE(SHAPE, ModelConfig(latent_dim=1))
    assert bits_per_dim(20 * math.log(0.5), model) == pytest.approx(1)
