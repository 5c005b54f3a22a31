"""Priors: densities against autograd's Jacobian and torch.distributions, draws, and what a VampPrior learns."""

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.func import jacrev

from training.config import ModelConfig, NetworkConfig, PriorConfig
from training.errors import ConfigError
from training.fitting.objectives import elbo
from training.models.priors import FlowPrior, GaussianPrior, StandardNormal, build_prior
from training.models.vae import VAE

SHAPE = (1, 3, 4)


def standard_log_prob(noise):
    return Normal(0.0, 1.0).log_prob(noise.double()).sum(-1)


def vae(prior, **options):
    torch.manual_seed(0)
    prior = PriorConfig(family=prior, **options)
    return VAE(SHAPE, ModelConfig(latent_dim=2, network=NetworkConfig(hidden=[8]), prior=prior))


@pytest.fixture
def flow():
    """A flow that is no identity."""
    torch.manual_seed(0)
    prior = FlowPrior(3, steps=4, hidden=8)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return prior


def test_a_flows_density_at_a_draw_is_the_noises_over_autograds_jacobian(flow):
    noise = torch.randn(6, 3)
    found = flow.log_prob(flow.sample(noise).view(2, 3, 3))
    volumes = torch.stack([torch.linalg.slogdet(jacrev(flow.sample)(row).double()).logabsdet for row in noise])
    assert volumes.abs().min() > 0.05
    torch.testing.assert_close(found.view(6), standard_log_prob(noise) - volumes, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prior", [StandardNormal(3), FlowPrior(3, steps=4, hidden=8), GaussianPrior(3)])
def test_priors_start_as_the_standard_normal(prior):
    z = torch.randn(2, 5, 3)
    torch.testing.assert_close(prior.log_prob(z), standard_log_prob(z), atol=1e-5, rtol=1e-6)
    assert prior.log_prob(z).dtype == torch.float64


def test_a_gaussian_prior_has_the_moments_that_it_is_given():
    prior, loc = GaussianPrior(2), torch.tensor([3.0, -1.0]).double()
    covariance = torch.tensor([[4.0, -1.5], [-1.5, 1.0]]).double()
    prior.set_moments(loc, covariance)
    expected, z = MultivariateNormal(loc, covariance), 3 * torch.randn(4, 5, 2)
    torch.testing.assert_close(prior.log_prob(z), expected.log_prob(z.double()))
    axes = prior.sample(torch.eye(2)).double() - loc
    torch.testing.assert_close(axes.T @ axes, covariance, atol=1e-5, rtol=1e-5)


def mixture_of_posteriors(model):
    """(1/J) Σ_j q(z|u_j) of the model's pseudo-inputs, by torch.distributions (Tomczak & Welling 2018, eq. 9)."""
    q = model.encode(model.prior.pseudo_inputs().unflatten(1, SHAPE))
    components = Independent(Normal(q.loc.double(), q.scale.double()), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(q.loc)).double()), components)


@pytest.mark.parametrize("training", [True, False])
def test_a_vamp_prior_is_the_mixture_of_the_present_posteriors_of_its_pseudo_inputs(training):
    model = vae("vamp", components=5).train()
    x = torch.rand(4, *SHAPE).round()
    elbo(model(x, torch.randn(4, 1, 2), torch.rand_like(x))).backward()
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not still, "the pseudo-inputs learn, too"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        terms = model.train(training)(x, torch.randn(4, 3, 2), torch.rand_like(x))
        expected = mixture_of_posteriors(model)
    torch.testing.assert_close(terms.log_p_z.double(), expected.log_prob(terms.z.double()), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        terms.kl.per_group, (terms.log_q_z - terms.log_p_z).mean(1, keepdim=True), atol=1e-6, rtol=0
    )
    assert not terms.kl.analytic


@torch.no_grad()
def test_draws_of_a_vamp_prior_have_its_moments():
    model = vae("vamp", components=3).eval()
    generator = torch.Generator().manual_seed(0)
    choice = (torch.arange(90_000) + 0.5) / 90_000
    draws = model.prior.sample(torch.randn(90_000, 2, generator=generator), choice).double()
    expected = mixture_of_posteriors(model)
    torch.testing.assert_close(draws.mean(0), expected.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(draws.var(0), expected.variance, atol=0, rtol=0.02)


@torch.no_grad()
def test_a_vamp_prior_starts_at_training_images_as_many_as_there_are():
    model = vae("vamp", components=4)
    images, before = torch.rand(3, *SHAPE), model.prior.pseudo_inputs()[3:]
    model.initialise(images.mean(0), images)
    torch.testing.assert_close(model.prior.pseudo_inputs()[:3], images.flatten(1).clamp(0.02, 0.98))
    assert torch.equal(model.prior.pseudo_inputs()[3:], before)


@pytest.mark.parametrize("family", ["flow", "vamp"])
def test_without_a_closed_form_the_rate_is_the_mean_over_the_samples(family):
    model, x = vae(family), torch.rand(4, *SHAPE)
    terms = model(x, torch.randn(4, 5, 2), torch.rand_like(x))
    assert terms.kl.per_group.shape == (4, 1)
    torch.testing.assert_close(terms.kl.per_group[:, 0], (terms.log_q_z - terms.log_p_z).mean(1))


def test_one_dimension_cannot_be_coupled():
    with pytest.raises(ConfigError, match=r"wants 2; got model\.latent_dim 1"):
        build_prior(PriorConfig(family="flow"), 1, SHAPE)
