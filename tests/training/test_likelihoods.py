"""Likelihoods: they sum or integrate to one, agree with torch.distributions, and their draws follow them."""

import math

import pytest
import torch

from training.config import LikelihoodConfig
from training.likelihoods import build_likelihood

FAMILIES = ["bernoulli", "gaussian", "discretised_logistic"]
LEVELS = torch.arange(256) / 255


def likelihood(family, **options):
    return build_likelihood(LikelihoodConfig(family=family, **options))


def raw_outputs(model, count=6, seed=0):
    torch.manual_seed(seed)
    return torch.randn(count, model.raw, 1, 2, 3)


def test_bernoulli_probabilities_sum_to_one():
    model = likelihood("bernoulli")
    parameters = model.parameters_from(8 * raw_outputs(model))
    total = sum(model.log_prob(torch.full((6, 1, 2, 3), x), parameters).exp() for x in (0.0, 1.0))
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("log_scale", [-5.0, -2.0, 0.0, 3.0])
@pytest.mark.parametrize("loc", [-0.5, 0.0, 0.31, 1.0, 1.5])
def test_discretised_logistic_sums_to_one_over_the_256_levels(loc, log_scale):
    model = likelihood("discretised_logistic")
    raw = torch.tensor([loc, log_scale]).reshape(1, 2, 1, 1, 1)
    parameters = model.parameters_from(raw)
    total = model.log_prob(LEVELS.reshape(256, 1, 1, 1), parameters).double().exp().sum()
    assert total.item() == pytest.approx(1, abs=2e-4)


def test_discretised_logistic_equals_the_difference_of_its_cdf():
    model = likelihood("discretised_logistic")
    loc, scale = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    upper = torch.sigmoid((LEVELS.double() + 0.5 / 255 - loc) / scale)
    lower = torch.sigmoid((LEVELS.double() - 0.5 / 255 - loc) / scale)
    lower[0], upper[-1] = 0, 1
    ours = model.log_prob(LEVELS.double(), (loc, scale))
    torch.testing.assert_close(ours, torch.log(upper - lower), atol=1e-9, rtol=1e-9)


def test_gaussian_equals_torch_distributions():
    model = likelihood("gaussian", scale="pixel")
    parameters = model.parameters_from(raw_outputs(model))
    x = torch.rand(6, 1, 2, 3)
    expected = torch.distributions.Normal(*parameters).log_prob(x)
    torch.testing.assert_close(model.log_prob(x, parameters), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_is_the_mean_of_draws(family):
    model = likelihood(family, scale="pixel")
    raw = raw_outputs(model, 1)
    raw[:, 0] = raw[:, 0] * 0.1 + 0.5
    parameters = model.parameters_from(raw)
    many = tuple(p.expand(200_000, 1, 2, 3) for p in parameters)
    torch.manual_seed(1)
    noise = torch.rand(many[0].shape) if model.observation_noise == "uniform" else torch.randn(many[0].shape)
    if family == "gaussian":  # draws are clipped to pixels, the mean is not: compare where clipping is negligible
        many = (many[0], many[1].clamp(max=0.05))
    draws = model.sample(many, noise)
    assert draws.min() >= 0
    assert draws.max() <= 1
    torch.testing.assert_close(draws.mean(0), model.mean(parameters)[0], atol=0.006, rtol=0)


def test_draws_of_the_discretised_logistic_have_its_probabilities():
    model = likelihood("discretised_logistic")
    parameters = model.parameters_from(torch.tensor([0.05, -1.0]).reshape(1, 2, 1, 1, 1))
    noise = torch.rand(400_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    draws = model.sample(tuple(p.expand(400_000, 1, 1, 1) for p in parameters), noise)
    frequency = torch.bincount((draws.flatten() * 255).round().long(), minlength=256) / 400_000
    probability = model.log_prob(LEVELS.reshape(256, 1, 1, 1), parameters).exp().flatten()
    assert (frequency - probability).abs().max() < 4 * math.sqrt(probability.max() / 400_000)


def test_dynamic_binarisation_has_the_pixel_as_its_mean_and_keeps_binary_images():
    model = likelihood("bernoulli", binarisation="dynamic")
    x = torch.rand(1, 1, 2, 3)
    draws = model.target(x.expand(50_000, 1, 2, 3), torch.rand(50_000, 1, 2, 3))
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(draws.mean(0), x[0], atol=0.01, rtol=0)
    binary = draws[:100]
    torch.testing.assert_close(model.target(binary, torch.rand_like(binary)), binary)


def test_threshold_binarisation_wants_no_dither():
    model = likelihood("bernoulli", binarisation="threshold")
    assert not model.dither
    assert model.target(torch.tensor([0.2, 0.5, 0.9]), None).tolist() == [0, 1, 1]


def test_likelihood_is_finite_far_from_the_data():
    for family in FAMILIES:
        model = likelihood(family)
        raw = 50 * raw_outputs(model)
        values = model.log_prob(torch.rand(6, 1, 2, 3).round(), model.parameters_from(raw))
        assert torch.isfinite(values).all(), family
