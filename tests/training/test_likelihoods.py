"""Likelihoods: they sum or integrate to one, agree with torch.distributions, and their draws follow them."""

import math

import pytest
import torch

from training.config import LikelihoodConfig
from training.distributions import Bernoulli, ContinuousBernoulli, Delta, DiscretisedLogistic
from training.distributions.continuous_bernoulli import log_normaliser
from training.errors import ConfigError
from training.models.likelihoods import LIKELIHOODS, GaussianLikelihood, build_likelihood

DRAWN = ["bernoulli", "continuous_bernoulli", "gaussian", "discretised_logistic", "logistic_mixture"]
REALS = [name for name, family in LIKELIHOODS.items() if family.takes_reals]
LEVELS = torch.arange(256) / 255


def likelihood(family, shape=(1, 2, 3), **options):
    return build_likelihood(LikelihoodConfig(family=family, **options), shape)


def raw_outputs(model, count=6, seed=0):
    torch.manual_seed(seed)
    return torch.randn(count, model.raw, 1, 2, 3)


def test_bernoulli_probabilities_sum_to_one():
    model = likelihood("bernoulli")
    parameters = model(8 * raw_outputs(model))
    total = sum(model.log_prob(torch.full((6, 1, 2, 3), x), parameters).exp() for x in (0.0, 1.0))
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("log_scale", [-5.0, -2.0, 0.0, 3.0])
@pytest.mark.parametrize("loc", [-0.5, 0.0, 0.31, 1.0, 1.5])
def test_discretised_logistic_sums_to_one_over_the_256_levels(loc, log_scale):
    model = likelihood("discretised_logistic")
    raw = torch.tensor([loc, log_scale]).reshape(1, 2, 1, 1, 1)
    parameters = model(raw)
    total = model.log_prob(LEVELS.reshape(256, 1, 1, 1), parameters).double().exp().sum()
    assert total.item() == pytest.approx(1, abs=2e-4)


def test_discretised_logistic_equals_the_difference_of_its_cdf():
    model = likelihood("discretised_logistic")
    loc, scale = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    upper = torch.sigmoid((LEVELS.double() + 0.5 / 255 - loc) / scale)
    lower = torch.sigmoid((LEVELS.double() - 0.5 / 255 - loc) / scale)
    lower[0], upper[-1] = 0, 1
    ours = model.log_prob(LEVELS.double(), DiscretisedLogistic(loc, scale))
    torch.testing.assert_close(ours, torch.log(upper - lower), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 0.01, 0.3, 1.0, 7.4, 30.0, 54.0])
def test_discretised_logistic_in_float32_keeps_its_digits_at_every_scale(scale):
    """Errors, relative to one nat a pixel or more, add up to less than 0.002 over 784 pixels."""
    model = likelihood("discretised_logistic")
    loc, scales = torch.full((256,), 0.4), torch.full((256,), scale)
    exact = model.log_prob(LEVELS.double(), DiscretisedLogistic(loc.double(), scales.double()))
    d = 1 / 255 / scales.double()
    a, b = ((LEVELS.double() + side / 510 - loc.double()) / scales.double() for side in (1, -1))
    inner = -torch.nn.functional.softplus(-a) - torch.nn.functional.softplus(b) + torch.log(-torch.expm1(-d))
    torch.testing.assert_close(exact[1:-1], inner[1:-1], atol=1e-7, rtol=1e-7)
    error = (model.log_prob(LEVELS, DiscretisedLogistic(loc, scales)) - exact).abs() / exact.abs().clamp(min=1)
    assert error.mean() * 784 < 2e-3


def test_gaussian_equals_torch_distributions():
    model = likelihood("gaussian", scale="pixel")
    parameters = model(raw_outputs(model))
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
    p = model(torch.tensor([loc, math.log(scale) + 2]).reshape(1, 2, 1, 1, 1))
    u = (torch.arange(64) + 0.5) / 64
    target = model.target(LEVELS.unsqueeze(1).expand(256, 64), u.expand(256, 64))
    bound = model.log_prob(target, type(p)(*(value.flatten() for value in p))).double().mean(1) - math.log(256)
    normal = torch.distributions.Normal(*(value.double().flatten() for value in p))
    mass = normal.cdf(torch.arange(1, 257).double() / 256) - normal.cdf(torch.arange(256).double() / 256)
    assert (bound.exp() <= mass + 1e-6).all()
    assert bound.exp().sum() <= 1 + 1e-6
    assert bound.exp().sum() > 0.95 * mass.sum(), "at the narrowest scale the bound is still near"


def test_the_gaussian_scale_has_a_floor_at_which_gradients_stay_bounded():
    """The residual's gradient is (t − loc)/σ²: 10⁴ at most over [0,1]."""
    narrow = torch.tensor([0.5, -40.0]).reshape(1, 2, 1, 1, 1)
    assert likelihood("gaussian", scale="pixel")(narrow)[1].item() == pytest.approx(0.01)
    wider = likelihood("gaussian", scale="pixel", min_scale=0.05)(narrow)[1]
    assert wider.item() == pytest.approx(0.05)
    parameters = likelihood("discretised_logistic")(narrow)
    assert parameters[1].item() == pytest.approx(1e-3), "a probability mass has no such trouble"


def test_the_gaussian_mean_is_of_pixels_and_draws_are_levels():
    model = likelihood("gaussian")
    head = torch.empty(model.raw * 256)
    model.initialise(head, LEVELS)
    parameters = model(head.reshape(1, 1, 1, 16, 16))
    torch.testing.assert_close(model.mean(parameters).flatten(), LEVELS, atol=1e-6, rtol=0)
    draws = model.sample(parameters, torch.randn(1, 1, 16, 16)) * 255
    torch.testing.assert_close(draws, draws.round())
    assert draws.min() >= 0
    assert draws.max() <= 255


@pytest.mark.parametrize("family", DRAWN)
def test_mean_is_the_mean_of_draws(family):
    model = likelihood(family, scale="pixel")
    raw = raw_outputs(model, 1)
    loc = slice(5, 10) if family == "logistic_mixture" else slice(0, 1)
    raw[:, loc] = raw[:, loc] * 0.1 + 0.5
    parameters = model(raw)
    many = type(parameters)(*(p.expand(100_000, *p.shape[1:]) for p in parameters))
    torch.manual_seed(1)
    draw = torch.rand if model.observation_noise == "uniform" else torch.randn
    noise = draw(100_000, 1, 2, 3)
    if family == "gaussian":  # draws are clipped to pixels, the mean is not: compare where clipping is negligible
        many = many._replace(scale=many.scale.clamp(max=0.05))
    draws = model.sample(many, noise)
    assert draws.min() >= 0
    assert draws.max() <= 1
    torch.testing.assert_close(draws.mean(0), model.mean(parameters)[0], atol=0.008, rtol=0)


def test_draws_of_the_discretised_logistic_have_its_probabilities():
    model = likelihood("discretised_logistic")
    parameters = model(torch.tensor([0.05, -1.0]).reshape(1, 2, 1, 1, 1))
    noise = torch.rand(400_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    draws = model.sample(type(parameters)(*(p.expand(400_000, 1, 1, 1) for p in parameters)), noise)
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
    for family in LIKELIHOODS:
        model = likelihood(family)
        raw = 50 * raw_outputs(model)
        values = model.log_prob(torch.rand(6, 1, 2, 3).round(), model(raw))
        assert torch.isfinite(values).all(), family


LOGITS = torch.tensor([-300.0, -30.0, -2.0, -1.01, -0.99, -1e-3, 1e-5, 0.0, 0.3, 0.999, 1.001, 5.0, 80.0])


def test_continuous_bernoulli_integrates_to_one():
    x = torch.linspace(0, 1, 400_001, dtype=torch.float64).unsqueeze(1)
    density = ContinuousBernoulli(LOGITS.double()).log_prob(x).exp()
    torch.testing.assert_close(torch.trapezoid(density, x, dim=0), torch.ones(len(LOGITS)).double(), atol=1e-6, rtol=0)


def test_continuous_bernoulli_equals_torch_distributions_in_float32():
    exact = torch.distributions.ContinuousBernoulli(logits=LOGITS[1:-1].double(), lims=(0.4999, 0.5001))
    x = torch.linspace(0, 1, 11).unsqueeze(1)
    logits = LOGITS[1:-1].expand(11, -1)
    torch.testing.assert_close(
        ContinuousBernoulli(logits).log_prob(x), exact.log_prob(x.double()).float(), atol=2e-6, rtol=1e-6
    )
    torch.testing.assert_close(ContinuousBernoulli(logits[0]).mean, exact.mean.float(), atol=1e-6, rtol=0)
    u = x[:-1]
    torch.testing.assert_close(
        ContinuousBernoulli(logits[:-1]).sample(u), exact.icdf(u.double()).float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 3e-7), (torch.float64, 3e-8)])
def test_continuous_bernoulli_mean_is_the_gradient_of_the_log_normaliser(dtype, atol):
    logits = LOGITS.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(log_normaliser(logits).sum(), logits)
    torch.testing.assert_close(gradient, ContinuousBernoulli(logits.detach()).mean, atol=atol, rtol=0)


@pytest.mark.parametrize("logit", [-900.0, -3.0, 0.1, 40.0])
def test_continuous_bernoulli_bounds_the_probabilities_of_levels(logit):
    """E_u[log p((x + u)/256)] − ln 256 ≤ log P(level x): probabilities that add up to one at most."""
    model = likelihood("continuous_bernoulli")
    u = (torch.arange(64) + 0.5) / 64
    target = model.target(LEVELS.unsqueeze(1).expand(256, 64), u.expand(256, 64))
    bound = model.log_prob(target, ContinuousBernoulli(torch.tensor(logit))).double().mean(1) - math.log(256)
    assert 0.5 < bound.exp().sum() <= 1 + 1e-6


def test_logistic_mixture_sums_to_one_and_is_the_weighted_sum_of_its_components():
    model, one = likelihood("logistic_mixture", components=3), likelihood("discretised_logistic")
    parameters = model(2 * raw_outputs(model, 1))
    assert model.parameter_names == tuple(f"{kind}_{j}" for kind in ("log_weight", "loc", "scale") for j in range(3))
    levels = LEVELS.reshape(256, 1, 1, 1)
    total = model.log_prob(levels, parameters).exp()
    log_weights, locs, scales = (part.unbind(1) for part in parameters)
    parts = [
        log_weights[j].exp() * one.log_prob(levels, DiscretisedLogistic(locs[j], scales[j])).exp() for j in range(3)
    ]
    torch.testing.assert_close(total, sum(parts))
    torch.testing.assert_close(total.sum(0), torch.ones(1, 2, 3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)])
def test_draws_of_the_logistic_mixture_have_its_probabilities(weights):
    model = likelihood("logistic_mixture", components=3)
    log_weights = torch.tensor(weights).clamp(min=1e-30).log()
    numbers = (*log_weights, *torch.tensor([0.1, 0.5, 0.97, 0.02, 0.1, 0.004]))
    parameters = model.of_parameters(tuple(number.reshape(1, 1, 1, 1) for number in numbers))
    u = (torch.arange(200_000) + 0.5).reshape(-1, 1, 1, 1) / 200_000
    draws = model.sample(parameters, u)
    frequency = torch.bincount((draws.flatten() * 255).round().long(), minlength=256) / 200_000
    probability = model.log_prob(LEVELS.reshape(256, 1, 1, 1), parameters).exp().flatten()
    assert (frequency - probability).abs().max() < 2e-4


@pytest.mark.parametrize("family", [name for name in LIKELIHOODS if name != "delta"])
@pytest.mark.parametrize("scale", ["shared", "pixel"])
def test_pixels_start_at_the_training_mean(family, scale):
    model = likelihood(family, scale=scale)
    mean = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.98, 0.1]).reshape(1, 2, 3)
    head = torch.zeros(model.raw * 6)
    if family.endswith("logistic") or family == "logistic_mixture":
        head[-(head.numel() // (2 if family != "logistic_mixture" else 3)) :] = -2.0  # narrow: little is clipped
    model.initialise(head, mean)
    start = model.mean(model(head.reshape(1, model.raw, 1, 2, 3)))
    torch.testing.assert_close(start[0], mean, atol=0.03 if family == "logistic_mixture" else 0.01, rtol=0)


MEAN, STD = torch.tensor([5.0, -300.0, 0.0]).reshape(1, 1, 3), torch.tensor([2.0, 40.0, 0.0]).reshape(1, 1, 3)


def of_reals(family, **options):
    model = likelihood(family, shape=(1, 1, 3), values="reals", **options)
    model.initialise_values(MEAN, STD)
    return model


@pytest.mark.parametrize("scale", ["fixed", "shared", "diagonal", "pixel"])
def test_the_density_of_reals_is_in_their_own_units(scale):
    model = of_reals("gaussian", scale=scale)
    unit = torch.tensor([2.0, 40.0, 1.0])
    parameters = model(raw_outputs(likelihood("gaussian", scale=scale), 1)[..., :1, :])
    loc, sigma = (p.flatten() for p in parameters)
    expected = torch.distributions.Normal(MEAN.flatten() + unit * loc, unit * sigma)
    x = torch.tensor([4.0, -250.0, 0.5])
    log_prob = model.log_prob(model.target(x.reshape(1, 1, 1, 3), None), parameters)
    torch.testing.assert_close(log_prob.flatten(), expected.log_prob(x))
    torch.testing.assert_close(model.mean(parameters).flatten(), expected.mean)
    noise = torch.randn(1, 1, 1, 3)
    torch.testing.assert_close(
        model.sample(parameters, noise).flatten(), expected.mean + expected.stddev * noise.flatten()
    )


@pytest.mark.parametrize("family", REALS)
def test_the_volume_of_reals_is_the_jacobian_of_their_target(family):
    model = of_reals(family)
    assert not model.dither
    jacobian = torch.autograd.functional.jacobian(lambda x: model.target(x, None), torch.randn(1, 1, 1, 3))
    sign, log_det = torch.linalg.slogdet(jacobian.reshape(3, 3))
    assert sign == 1
    assert model.log_volume.item() == pytest.approx(log_det.item(), rel=1e-6)
    assert model.network_input(MEAN).equal(MEAN), "reals are standardised already"


@pytest.mark.parametrize("family", sorted(set(LIKELIHOODS) - set(REALS)))
def test_families_of_pixels_refuse_reals(family):
    with pytest.raises(
        ConfigError, match=r"numbers in their own units: expected one of gaussian, delta, squared_error"
    ):
        likelihood(family, values="reals")


@pytest.mark.parametrize("family", LIKELIHOODS)
def test_pixels_have_no_volume_and_networks_see_them_around_zero(family):
    model = likelihood(family)
    model.initialise_values(torch.rand(1, 2, 3), torch.rand(1, 2, 3))
    assert model.log_volume.item() == 0
    assert model.network_input(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1, 0, 1]
    assert not dict(model.named_buffers(remove_duplicate=True)).keys() & {"shift", "unit"}


def test_a_scale_set_in_closed_form_has_no_floor_and_no_gradient_loop_to_protect():
    for scale, sigma in (("shared", torch.tensor(1e-4)), ("diagonal", torch.tensor([1e-4, 0.5, 3.0]).reshape(1, 1, 3))):
        config = LikelihoodConfig(family="gaussian", values="reals", scale=scale)
        model = GaussianLikelihood(config, (1, 1, 3), closed_form=True)
        model.set_scale(sigma)
        torch.testing.assert_close(model(torch.zeros(2, 1, 1, 1, 3))[1], sigma.expand(2, 1, 1, 3))
    learned = likelihood("gaussian", scale="diagonal")
    learned.set_scale(torch.full((1, 2, 3), 0.3))
    torch.testing.assert_close(learned(torch.zeros(1, 1, 1, 2, 3))[1], torch.full((1, 1, 2, 3), 0.3))


def test_a_fixed_scale_is_no_parameter():
    model = likelihood("gaussian", scale="fixed", fixed_scale=0.002)
    assert not list(model.parameters())
    assert model(torch.zeros(1, 1, 1, 2, 3))[1].flatten().tolist() == pytest.approx([0.002] * 6)


def test_reconstruction_errors_are_least_at_the_target_and_draw_nothing():
    x = torch.rand(1, 1, 2, 3)
    squared, entropy = likelihood("squared_error"), likelihood("cross_entropy")
    for model, best in ((squared, x), (entropy, torch.logit(x))):
        assert model.measure == "none"
        assert not model.dither
        away = model.log_prob(model.target(x, None), model.of_parameters((best + 0.1,)))
        assert (away < model.log_prob(x, model.of_parameters((best,)))).all()
        torch.testing.assert_close(model.sample(model.of_parameters((best,))), x)
    torch.testing.assert_close(squared.log_prob(x, Delta(x + 0.1)), torch.full_like(x, -0.01))
    expected = -torch.nn.functional.binary_cross_entropy(torch.full_like(x, 0.25), x, reduction="none")
    torch.testing.assert_close(entropy.log_prob(x, Bernoulli(torch.logit(torch.full_like(x, 0.25)))), expected)


def test_a_bijections_likelihood_gives_x_back_and_says_nothing():
    pixels = likelihood("delta")
    x = LEVELS[:6].reshape(1, 1, 2, 3)
    target = pixels.target(x, torch.rand_like(x))
    torch.testing.assert_close(pixels.sample(Delta(target)), x, atol=0, rtol=0)
    assert pixels.log_prob(target, Delta(target + 1)).eq(0).all()
    assert pixels.observation_noise == "none"
    assert not pixels.pixelwise
    reals, rows = of_reals("delta"), 30 * torch.randn(4, 1, 1, 3)
    torch.testing.assert_close(reals.mean(Delta(reals.target(rows, None))), rows, atol=1e-4, rtol=1e-5)
