"""The inference gap where both of its parts have closed forms, and what the latents carry, against other estimates."""

import math

import numpy as np
import pytest
import torch

from tests.training.linear_gaussian import SHAPE, Linear
from training.config import ModelConfig, PriorConfig
from training.evaluation.aggregate import aggregate_log_prob, collapsed, describe, marginal_kl
from training.evaluation.tightness import effective_samples, gaussian_elbo, inference_gap, optimise_posterior
from training.models.vae import VAE

MIXED = torch.tensor([[1.0, 0.9, 0.8], [0.0, 0.8, 0.5], [0.0, 0.0, 1.0]])


@pytest.fixture
def x():
    return torch.from_numpy(np.random.RandomState(1).random_sample((12, *SHAPE)).astype(np.float32))


def amortised_elbo(model, x):
    """Of the encoder's diagonal Gaussian q against the exact posterior p(z|x): log p(x) − KL(q ‖ p(z|x)), [N]."""
    q, best = model.encode(x), with_offset(model, 0.0).encode(x).loc
    loc, scale = q.loc, q.scale
    precision, shift = model.precision.double(), (loc - best).double()
    variance = scale.double() ** 2
    spread = (precision.diagonal() * variance).sum(1) - 3 - torch.log(variance).sum(1) - torch.logdet(precision)
    return model.log_evidence(x) - (0.5 * (spread + (shift @ precision * shift).sum(1))).numpy()


def with_offset(model, offset):
    other = Linear()
    other.W, other.widen, other.offset = model.W, model.widen, offset
    return other


def approximation_gap(model):
    """KL of the best diagonal Gaussian, of the precision's diagonal: ½(Σ log Λ_jj − log det Λ)."""
    precision = model.precision.double()
    return float(0.5 * (torch.log(precision.diagonal()).sum() - torch.logdet(precision)))


def test_effective_samples_count_equal_weights_and_a_single_large_one():
    log_w = torch.tensor([[0.3] * 8, [50.0] + [0.0] * 7], dtype=torch.float64)
    found = effective_samples(torch.logsumexp(log_w, 1), torch.logsumexp(2 * log_w, 1))
    torch.testing.assert_close(found, torch.tensor([8.0, 1.0], dtype=torch.float64))


def test_the_elbo_of_a_gaussian_is_its_closed_form(x):
    model = Linear(exact=False, mixed=MIXED, offset=0.3)
    q = model.encode(x)
    loc, scale = q.loc, q.scale
    found = gaussian_elbo(model, x, loc, scale, 20_000, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(found.numpy(), amortised_elbo(model, x), atol=0.2)
    assert found.numpy().mean() == pytest.approx(amortised_elbo(model, x).mean(), abs=0.03)


def test_the_gap_is_split_as_the_closed_form_splits_it(x):
    """Of a correlated posterior no diagonal Gaussian is exact; the encoder is too wide and misses the mean besides."""
    model = Linear(exact=False, mixed=MIXED, offset=0.3)
    exact, elbo = model.log_evidence(x), amortised_elbo(model, x)
    gap = inference_gap(model, x, None, elbo, exact, 200, seed=0)
    assert approximation_gap(model) > 1
    np.testing.assert_allclose(gap.approximation.mean(), approximation_gap(model), atol=0.08)
    np.testing.assert_allclose(gap.approximation + gap.amortisation, exact - elbo, atol=1e-9)
    assert gap.amortisation.min() > 0.1
    metrics = gap.metrics()
    assert metrics["gap_images"] == 12
    assert metrics["amortisation_gap"] == pytest.approx(gap.amortisation.mean())


def test_the_optimised_posterior_is_the_best_diagonal_gaussian(x):
    model = Linear(exact=False, mixed=MIXED, offset=0.3)
    loc, scale = optimise_posterior(model, x, 300, torch.Generator().manual_seed(0))
    best = with_offset(model, 0.0).encode(x).loc
    torch.testing.assert_close(scale, model.precision.diagonal().rsqrt().expand_as(scale), rtol=0.1, atol=0)
    assert ((loc - best).abs() / scale).max() < 0.15


def test_nothing_is_gained_where_the_encoder_is_exact_and_the_model_is_left_as_it_was(x):
    model = VAE(SHAPE, ModelConfig(latent_dim=3)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimise_posterior(model, (x > 0.5).float(), 3, torch.Generator().manual_seed(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    exact = Linear()
    gap = inference_gap(exact, x, None, exact.log_evidence(x), exact.log_evidence(x), 50, seed=0)
    assert abs(gap.amortisation.mean()) < 0.02


def test_the_same_seed_gives_the_same_gap(x):
    model = Linear(exact=False)
    exact = model.log_evidence(x)
    first, second, other = (inference_gap(model, x, None, exact, exact, 5, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.amortisation, second.amortisation)
    assert (first.amortisation != other.amortisation).any()


def gaussians(count, spread, scale=0.5, seed=0):
    """Posteriors N(loc, scale²) with means N(0, spread²), and a draw of each."""
    random = torch.Generator().manual_seed(seed)
    loc = spread * torch.randn(count, 2, generator=random)
    return loc, torch.full_like(loc, scale), loc + scale * torch.randn(count, 2, generator=random)


def test_the_aggregate_density_is_the_mixture_of_all_posteriors():
    loc, scale, z = gaussians(7, 1.0)
    q = torch.distributions.Normal(loc.double(), scale.double())
    log_q = q.log_prob(z.double()[:, None]).sum(-1)
    with_own, without_own = aggregate_log_prob(loc, scale, z)
    torch.testing.assert_close(with_own, torch.logsumexp(log_q, 1) - math.log(7))
    log_q.fill_diagonal_(-math.inf)
    torch.testing.assert_close(without_own, torch.logsumexp(log_q, 1) - math.log(6))


def test_the_marginal_kl_is_bracketed_and_its_bounds_close_with_more_images():
    """q(z) is N(0, spread² + scale²) in each of two dimensions, so that KL(q(z) ‖ p(z)) is known."""
    model = VAE(SHAPE, ModelConfig(latent_dim=2))
    variance = 1.5**2 + 0.5**2
    exact = 2 * 0.5 * (variance - 1 - math.log(variance))
    widths = []
    for count in (100, 2000):
        found = np.mean([marginal_kl(model, *gaussians(count, 1.5, seed=seed)) for seed in range(5)], axis=0)
        assert found[0] < exact + 0.02
        assert found[1] > exact - 0.02
        widths.append(found[1] - found[0])
    assert 0 < widths[1] < 0.2 * widths[0]
    assert found.mean() == pytest.approx(exact, abs=0.03)


def test_posteriors_that_share_nothing_leave_the_bounds_far_apart():
    model = VAE(SHAPE, ModelConfig(latent_dim=2))
    loc, scale, z = gaussians(50, 1.0, scale=1e-4)
    lower, upper = marginal_kl(model, loc, scale, z)
    rate = 0.5 * (loc**2 + scale**2 - 1 - torch.log(scale**2)).sum(1).mean()
    assert lower == 0
    assert upper == pytest.approx(float(rate) - math.log(50), abs=0.5)


def test_moments_of_the_aggregate_and_of_the_prior():
    loc, scale, z = gaussians(20_000, 1.5)
    model = VAE(SHAPE, ModelConfig(latent_dim=2))
    found = describe(model, loc[:500], scale[:500], z[:500])
    np.testing.assert_allclose(found.variance, loc[:500].double().var(0, unbiased=False) + 0.25, rtol=1e-6)
    np.testing.assert_allclose(found.prior_variance, 1)
    assert found.rate.shape == (2,)
    model.moments = "base"
    sampled = describe(model, loc, scale, z)
    np.testing.assert_allclose(sampled.variance, 2.5, rtol=0.05)
    assert sampled.rate is None
    assert sampled.marginal_kl is None
    learned = VAE(SHAPE, ModelConfig(latent_dim=2, prior=PriorConfig(family="flow"))).eval()
    other = describe(learned, loc[:500], scale[:500], z[:500])
    assert other.rate is None
    np.testing.assert_allclose(other.prior_variance, 1, rtol=0.1)
    assert set(other.metrics()) == {"active_units", "marginal_kl_lower", "marginal_kl_upper"}
    assert set(other.by_dimension()) == set(found.by_dimension()) - {"rate"}


@pytest.mark.parametrize(
    ("rates", "layers", "text"),
    [
        ([0.0, 0.001], False, "does without z"),
        ([3.0] + [0.0] * 19, False, "only 1 of 20 latent dimensions"),
        ([3.0, 2.0] + [0.0] * 18, False, None),
        ([20.0], False, None),
        ([1e-4], False, "does without z"),
        ([20.0, 0.001, 3.0], True, "layer 2 of 3"),
        ([20.0, 0.1, 3.0], True, None),
        ([20.0, 0.011, 3.0], True, None),
        ([20.0, 0.009, 3.0], True, "layer 2 of 3"),
        ([3.0] + [0.0] * 9, False, None),
        ([3.0] + [0.0] * 10, False, "only 1 of 11 latent dimensions"),
    ],
)
def test_collapse_is_told(rates, layers, text):
    found = collapsed(rates, layers)
    assert (found is None) == (text is None)
    if text:
        assert text in found
        assert "objective.free_bits" in found
