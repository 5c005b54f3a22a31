"""The VAE's parts against torch.distributions and against one another, for every network and likelihood."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from tests.training.linear_gaussian import SHAPE, Linear
from tests.training.shared import encoded
from training.config import LikelihoodConfig, ModelConfig, NetworkConfig, PosteriorConfig
from training.distributions import Normal, unflattened
from training.errors import ConfigError
from training.models.posteriors import build_posterior
from training.models.vae import VAE

NETWORKS = {
    "mlp": NetworkConfig(hidden=[12, 10]),
    "conv": NetworkConfig(kind="conv", channels=[4, 6], blocks=1, hidden=[8]),
    "conv-plain": NetworkConfig(kind="conv", channels=[4, 6, 8], blocks=0, hidden=[8]),
}


def build(shape, network="mlp", family="bernoulli", latent_dim=3, **likelihood):
    torch.manual_seed(0)
    config = ModelConfig(
        latent_dim=latent_dim,
        network=NETWORKS[network],
        likelihood=LikelihoodConfig(family=family, **likelihood),
    )
    return VAE(shape, config).eval()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 9), (1, 1, 5), (2, 16, 31)])
@pytest.mark.parametrize("family", ["bernoulli", "gaussian", "discretised_logistic"])
def test_any_image_size_and_channel_count(network, shape, family):
    vae = build(shape, network, family)
    x, noise = torch.rand(2, *shape), torch.randn(2, 4, vae.noise_dim)
    found = encoded(vae, x, noise, torch.rand_like(x))
    mean = vae.likelihood.mean(vae.decode(found.z.flatten(0, 1)))
    joint = vae.joint(found.target, found.z, vae.decode_samples(found.z))
    assert mean.shape == (8, *shape)
    assert mean.min() >= 0
    assert mean.max() <= 1
    assert joint.log_p_x_given_z.shape == (2, 4)
    assert joint.log_p_x_given_z_map.shape == (2, 4, *shape)
    torch.testing.assert_close(joint.log_p_x_given_z_map.double().sum((-3, -2, -1)), joint.log_p_x_given_z)


def test_densities_equal_torch_distributions():
    vae = build((1, 4, 4))
    x, noise = torch.rand(5, 1, 4, 4), torch.randn(5, 2, 3)
    found = encoded(vae, x, noise, torch.rand_like(x))
    q = torch.distributions.Normal(found.loc.unsqueeze(1).double(), found.scale.unsqueeze(1).double())
    torch.testing.assert_close(found.log_q_z, q.log_prob(found.z.double()).sum(-1), atol=1e-5, rtol=1e-6)
    p = vae.decode_samples(found.z)
    joint = vae.joint(found.target, found.z, p)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(found.z.double()).sum(-1)
    torch.testing.assert_close(joint.log_p_z, prior, atol=1e-5, rtol=1e-6)
    p_x = torch.distributions.Bernoulli(logits=p.logits.double())
    expected = p_x.log_prob(found.target.unsqueeze(1).double().expand_as(p.logits)).sum((-3, -2, -1))
    torch.testing.assert_close(joint.log_p_x_given_z, expected, atol=1e-5, rtol=1e-6)


def test_training_terms_are_the_exported_densities():
    vae = build((1, 6, 6), "conv", "discretised_logistic")
    x, noise = torch.rand(3, 1, 6, 6), torch.randn(3, 4, 3)
    terms = vae(x, noise)
    found = encoded(vae, x, noise)
    joint = vae.joint(found.target, found.z, vae.decode_samples(found.z))
    for ours, exported in [
        (terms.log_p_x_given_z, joint.log_p_x_given_z),
        (terms.log_p_z, joint.log_p_z),
        (terms.log_q_z, found.log_q_z),
    ]:
        torch.testing.assert_close(ours.double(), exported, atol=1e-4, rtol=1e-5)


def test_analytic_kl_equals_torch_distributions():
    vae = build((1, 4, 4))
    x = torch.rand(5, 1, 4, 4)
    dither = torch.rand_like(x)
    terms = vae(x, torch.randn(5, 1, 3), dither)
    q = vae.encode(vae.likelihood.target(x, dither))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.loc, q.scale), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(terms.kl.per_group, expected)
    assert terms.kl.analytic


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("family", "tolerance"), [("bernoulli", 0.1), ("discretised_logistic", 0.1)])
def test_initialise_starts_at_the_training_mean(network, family, tolerance):
    vae = build((1, 8, 8), network, family)
    mean = torch.full((1, 8, 8), 0.3)
    vae.initialise(mean, mean[None])
    found = vae.likelihood.mean(vae.decode(torch.zeros(1, 3)))
    assert found.mean().item() == pytest.approx(0.3, abs=tolerance)


@pytest.mark.parametrize("family", ["delta", "squared_error", "cross_entropy"])
def test_what_gives_no_density_of_x_is_refused(family):
    with pytest.raises(ConfigError, match=rf"expects one of bernoulli, .*; got '{family}'"):
        build((1, 4, 4), family=family)


def test_stop_gradient_q_changes_gradients_but_no_value():
    vae = build((1, 4, 4))
    x, noise, dither = torch.rand(3, 1, 4, 4), torch.randn(3, 2, 3), torch.rand(3, 1, 4, 4)
    plain, held = vae(x, noise, dither), vae(x, noise, dither, stop_gradient_q=True)
    torch.testing.assert_close(plain.log_q_z, held.log_q_z)
    head = list(vae.posterior.parameters())
    gradients, of_z_alone = (torch.autograd.grad(terms.log_q_z.sum(), head) for terms in (plain, held))
    assert all(gradient.any() for gradient in of_z_alone)
    assert not any(torch.allclose(a, b) for a, b in zip(gradients, of_z_alone, strict=True))


@pytest.mark.parametrize("family", ["bernoulli", "gaussian", "discretised_logistic", "logistic_mixture"])
@torch.no_grad()
def test_samples_of_a_row_are_decoded_as_each_alone(family):
    vae = build((1, 4, 5), "conv", family)
    z = torch.randn(3, 2, 3)
    p = vae.decode_samples(z)
    for n in range(3):
        for k in range(2):
            alone = vae.decode(z[n, k][None])
            assert type(p) is type(alone)
            torch.testing.assert_close(type(p)(*(value[n, k][None] for value in p)), alone)
    assert vae.likelihood.mean(p).shape == vae.likelihood.sample(p, torch.rand(3, 2, 1, 4, 5)).shape == (3, 2, 1, 4, 5)


@pytest.mark.parametrize("family", ["diagonal_gaussian", "householder"])
def test_stop_gradient_holds_the_parameters_constant_and_lets_z_move(family):
    """Gradients of log q(z|x) are then those of torch.distributions at a loc and a covariance that are numbers."""
    torch.manual_seed(0)
    head = build_posterior(PosteriorConfig(family=family, vectors=3), 5, 4)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    q, weights = head(torch.randn(2, 5)), list(head.parameters())
    z = q.rsample(torch.randn(2, 6, 4)).z
    factor = (q.rsample(torch.eye(4).expand(2, -1, -1)).z - q.loc.unsqueeze(1)).detach().double()
    fixed = MultivariateNormal(q.loc.detach().double().unsqueeze(1), (factor.mT @ factor).unsqueeze(1))
    held = q.stop_gradient().log_prob(z)
    torch.testing.assert_close(held, q.log_prob(z))
    expected, found, whole = (
        torch.autograd.grad(log_q_z.sum(), weights, retain_graph=True, materialize_grads=True)
        for log_q_z in (fixed.log_prob(z.double()), held, q.log_prob(z))
    )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert any((a - b).abs().max() > 0.1 for a, b in zip(found, whole, strict=True))
    assert not q.stop_gradient().log_prob(z.detach()).requires_grad


def test_unflattened_parameters_keep_their_order_and_their_names():
    p = unflattened(Normal(torch.arange(12.0).view(6, 2), torch.arange(12.0, 24.0).view(6, 2)), (2, 3))
    assert isinstance(p, Normal)
    assert p.loc[1, 2].tolist() == [10, 11]  # row 1·3 + 2
    assert p.scale[0, 1].tolist() == [14, 15]


def test_log_prob_of_an_exact_encoder_is_the_evidence_by_one_sample():
    torch.manual_seed(0)
    model, x = Linear(), torch.rand(20, *SHAPE)
    np.testing.assert_allclose(model.log_prob(x), model.log_evidence(x), atol=1e-4)


def test_log_prob_is_a_bound_that_rises_with_the_samples_to_the_evidence():
    """Of K samples it is IWAE's (Burda et al. 2016, theorem 1); of one it estimates the elbo, known in closed form."""
    torch.manual_seed(0)
    model, x = Linear(exact=False, offset=0.3), torch.rand(10, *SHAPE)
    rows, generator = x.repeat_interleave(1000, 0), torch.Generator().manual_seed(0)
    evidence = np.repeat(model.log_evidence(x), 1000)
    gaps = [float((evidence - model.log_prob(rows, k, generator).numpy()).mean()) for k in (1, 4, 16)]
    q = model.encode(x)
    encoder = MultivariateNormal(q.loc.double(), torch.diag_embed(q.scale.double() ** 2))
    exact = MultivariateNormal(q.loc.double() - model.offset, torch.linalg.inv(model.precision.double()))
    assert gaps[0] == pytest.approx(kl_divergence(encoder, exact).mean().item(), abs=0.1)
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] > 0
    assert gaps[2] < 0.1


def test_log_prob_and_draws_depend_on_the_generator_alone():
    vae = build((1, 4, 4), family="gaussian")
    x = torch.rand(3, 1, 4, 4)
    for call in (lambda seed: vae.log_prob(x, 5, seeded(seed)), lambda seed: vae.sample(3, seeded(seed))):
        assert torch.equal(call(1), call(1))
        assert not torch.equal(call(1), call(2))


def seeded(seed):
    return torch.Generator().manual_seed(seed)
