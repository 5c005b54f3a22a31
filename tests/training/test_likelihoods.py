"""Likelihoods: they sum or integrate to one, agree with torch.distributions, and their draws follow them."""

import math

import pytest
import torch

from training.config import LikelihoodConfig
from training.likelihoods import build_likelihood

FAMILIES = ["bernoulli", "gaussian", "discretised_logistic"]
LEVELS = torch.arange(256) / 255


def likelihood(family, shape=(1, 2, 3), **options):
    return build_likelihood(LikelihoodConfig(family=family, **options), shape)


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


@pytest.mark.parametrize("scale", [1e-3, 0.01, 0.3, 1.0, 7.4, 30.0, 54.0])
def test_discretised_logistic_in_float32_keeps_its_digits_at_every_scale(scale):
    """Errors, relative to one nat a pixel or more, add up to less than 0.002 over 784 pixels."""
    model = likelihood("discretised_logistic")
    loc, scales = torch.full((256,), 0.4), torch.full((256,), scale)
    exact = model.log_prob(LEVELS.double(), (loc.double(), scales.double()))
    d = 1 / 255 / scales.double()
    a, b = ((LEVELS.double() + side / 510 - loc.double()) / scales.double() for side in (1, -1))
    inner = -torch.nn.functional.softplus(-a) - torch.nn.functional.softplus(b) + torch.log(-torch.expm1(-d))
    torch.testing.assert_close(exact[1:-1], inner[1:-1], atol=1e-7, rtol=1e-7)
    error = (model.log_prob(LEVELS, (loc, scales)) - exact).abs() / exact.abs().clamp(min=1)
    assert error.mean() * 784 < 2e-3


def test_gaussian_equals_torch_distributions():
    model = likelihood("gaussian", scale="pixel")
    parameters = model.parameters_from(raw_outputs(model))
    x = torch.rand(6, 1, 2, 3)
    expected = torch.distributions.Normal(*parameters).log_prob(x)
    torch.testing.assert_close(model.log_prob(x, parameters), expected)


def test_uniform_dequantisation_fills_the_unit_interval_and_can_be_undone():
    model = likelihood("gaussian")
    below_one = torch.tensor([0.0, 0.25, 0.999])
    target = model.target(LEVELS.unsqueeze(1).expand(256, 3), below_one.expand(256, 3))
    torch.testing.assert_close(target, (torch.arange(256.0).unsqueeze(1) + below_one) / 256)
    torch.testing.assert_close(torch.floor(256 * target[:, 1]) / 255, LEVELS, atol=0, rtol=0)


@pytest.mark.parametrize("loc", [0.1, 0.5, 0.5 + 0.3 / 256])
@pytest.mark.parametrize("scale", [1e-4, 0.02, 0.2])
def test_eight_bits_above_the_density_bound_the_bits_of_a_level(loc, scale):
    """E_u[log p((x + u)/256)] − ln 256 ≤ log P(level x), the density's mass on it (Theis et al. 2016, eq. 4)."""
    model = likelihood("gaussian", scale="pixel")
    p = model.parameters_from(torch.tensor([loc, math.log(scale) + 2]).reshape(1, 2, 1, 1, 1))
    u = (torch.arange(64) + 0.5) / 64
    target = model.target(LEVELS.unsqueeze(1).expand(256, 64), u.expand(256, 64))
    bound = model.log_prob(target, tuple(value.flatten() for value in p)).double().mean(1) - math.log(256)
    normal = torch.distributions.Normal(*(value.double().flatten() for value in p))
    mass = normal.cdf(torch.arange(1, 257).double() / 256) - normal.cdf(torch.arange(256).double() / 256)
    assert (bound.exp() <= mass + 1e-6).all()
    assert bound.exp().sum() <= 1 + 1e-6
    assert bound.exp().sum() > 0.95 * mass.sum(), "at the narrowest scale the bound is still near"


def test_the_gaussian_scale_has_a_floor_at_which_gradients_stay_bounded():
    """The residual's gradient is (t − loc)/σ²: 10⁴ at most over [0,1]."""
    narrow = torch.tensor([0.5, -40.0]).reshape(1, 2, 1, 1, 1)
    assert likelihood("gaussian", scale="pixel").parameters_from(narrow)[1].item() == pytest.approx(0.01)
    wider = likelihood("gaussian", scale="pixel", min_scale=0.05).parameters_from(narrow)[1]
    assert wider.item() == pytest.approx(0.05)
    parameters = likelihood("discretised_logistic").parameters_from(narrow)
    assert parameters[1].item() == pytest.approx(1e-3), "a probability mass has no such trouble"


def test_the_gaussian_mean_is_of_pixels_and_draws_are_levels():
    model = likelihood("gaussian")
    head = torch.empty(model.raw * 256)
    model.initialise(head, LEVELS)
    parameters = model.parameters_from(head.reshape(1, 1, 1, 16, 16))
    torch.testing.assert_close(model.mean(parameters).flatten(), LEVELS, atol=1e-6, rtol=0)
    draws = model.sample(parameters, torch.randn(1, 1, 16, 16)) * 255
    torch.testing.assert_close(draws, draws.round())
    assert draws.min() >= 0
    assert draws.max() <= 255


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
