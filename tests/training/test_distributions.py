"""Distributions and their mixtures against torch.distributions; draws against means, both as functions of noise."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily
from torch.distributions import MultivariateNormal as Full
from torch.distributions import Normal as Diagonal

from training.distributions import Bernoulli, Delta, DiscretisedLogistic, Mixture, MultivariateNormal, Normal
from training.distributions.mixture import chosen

FACTORS = torch.tensor(
    [[[0.5, 0.0, 0.0], [1.0, 2.0, 0.0], [-0.7, 0.4, 0.1]], [[3.0, 0.0, 0.0], [0.0, 0.2, 0.0], [0.5, -1.0, 1.0]]]
).double()
LOCS = torch.tensor([[1.0, -2.0, 0.5], [-4.0, 0.0, 3.0]]).double()
WEIGHTS = torch.tensor([0.3, 0.7]).double()
COMPONENTS = {
    "full": (MultivariateNormal(LOCS, FACTORS, torch.linalg.inv(FACTORS)), Full(LOCS, scale_tril=FACTORS)),
    "diagonal": (
        Normal(LOCS.float(), FACTORS.abs().sum(-1).float()),
        Independent(Diagonal(LOCS, FACTORS.abs().sum(-1)), 1),
    ),
}


@pytest.fixture
def full():
    """A normal distribution of three numbers whose covariance is not that of the transposed factor."""
    return MultivariateNormal(LOCS[0], FACTORS[0], torch.linalg.inv(FACTORS[0]))


def test_a_full_covariance_is_that_of_its_factor(full):
    expected, x = Full(LOCS[0], scale_tril=FACTORS[0]), 3 * torch.randn(2, 5, 3)
    torch.testing.assert_close(full.log_prob(x), expected.log_prob(x.double()))
    torch.testing.assert_close(full.mean, expected.mean)
    torch.testing.assert_close(full.scale, expected.stddev)
    axes = full.sample(torch.eye(3)) - full.loc
    torch.testing.assert_close(axes.T @ axes, expected.covariance_matrix)


@pytest.mark.parametrize("kind", COMPONENTS)
def test_a_mixture_is_the_weighted_sum_of_its_components(kind):
    components, reference = COMPONENTS[kind]
    mixture, expected = Mixture(WEIGHTS, components), MixtureSameFamily(Categorical(WEIGHTS), reference)
    x = 3 * torch.randn(4, 5, 3)
    found = mixture.log_prob(x)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.log_prob(x.double()))
    torch.testing.assert_close(Mixture(WEIGHTS.to(components.loc), components).mean, expected.mean.to(components.loc))


@pytest.mark.parametrize("kind", COMPONENTS)
def test_a_mixtures_draw_is_one_of_the_component_that_the_choice_picks(kind):
    components, reference = COMPONENTS[kind]
    choice = torch.tensor([0.0, 0.29, 0.31, 1 - 2**-24])
    draws = Mixture(WEIGHTS, components).sample(torch.eye(3)[[0, 1, 2, 0]], choice).double()
    scales = FACTORS if kind == "full" else torch.diag_embed(reference.base_dist.scale)
    expected = torch.stack([LOCS[j] + scales[j][:, i] for j, i in ((0, 0), (0, 1), (1, 2), (1, 0))])
    torch.testing.assert_close(draws, expected, atol=1e-6, rtol=1e-6)


def test_a_choice_beyond_the_rounded_sum_of_the_weights_picks_the_last_component():
    weights = torch.tensor([0.5, 0.25, 0.2499])
    picked = chosen(torch.tensor([0.0, 0.5, 0.7499, 0.99995]), weights)
    assert picked.argmax(1).tolist() == [0, 1, 1, 2]
    assert picked.sum(1).tolist() == [1] * 4


UNIFORM = ((torch.arange(100_000) + 0.5) / 100_000).unsqueeze(1)
NORMAL = 2**0.5 * torch.erfinv(2 * UNIFORM - 1)


@pytest.mark.parametrize(
    ("distribution", "noise"),
    [
        (Normal(torch.tensor([-1.0, 3.0]), torch.tensor([0.5, 2.0])), NORMAL),
        (Bernoulli(torch.tensor([-2.0, 0.7])), UNIFORM),
        (DiscretisedLogistic(torch.tensor([0.1, 0.9]), torch.tensor([0.05, 0.2])), UNIFORM),
        (Delta(torch.tensor([0.25, 0.75])), UNIFORM),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_mean_is_that_of_draws(distribution, noise):
    draws = distribution.sample(noise).expand(len(noise), 2)
    torch.testing.assert_close(draws.double().mean(0).float(), distribution.mean, atol=1e-3, rtol=0)


def test_the_density_of_a_draw_is_the_density_at_it():
    p, noise = Normal(torch.randn(4, 3), torch.rand(4, 3) + 0.1), torch.randn(4, 3)
    torch.testing.assert_close(p.log_prob_of_draw(noise), p.log_prob(p.sample(noise)), atol=1e-4, rtol=1e-5)
