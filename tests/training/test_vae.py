"""The VAE's parts against torch.distributions and against one another, for every network and likelihood."""

import pytest
import torch

from training.config import LikelihoodConfig, ModelConfig, NetworkConfig
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
    encoded = vae.encode(x, noise, torch.rand_like(x))
    decoded = vae.decode(encoded.z.flatten(0, 1))
    parameters = tuple(p.unflatten(0, (2, 4)) for p in decoded.parameters)
    density = vae.density(encoded.target, encoded.z, parameters)
    assert decoded.mean.shape == (8, *shape)
    assert decoded.mean.min() >= 0
    assert decoded.mean.max() <= 1
    assert density.log_p_x.shape == (2, 4)
    assert density.log_p_x_map.shape == (2, 4, *shape)
    torch.testing.assert_close(density.log_p_x_map.double().sum((-3, -2, -1)), density.log_p_x)


def test_densities_equal_torch_distributions():
    vae = build((1, 4, 4))
    x, noise = torch.rand(5, 1, 4, 4), torch.randn(5, 2, 3)
    encoded = vae.encode(x, noise, torch.rand_like(x))
    q = torch.distributions.Normal(encoded.loc.unsqueeze(1).double(), encoded.scale.unsqueeze(1).double())
    torch.testing.assert_close(encoded.log_q, q.log_prob(encoded.z.double()).sum(-1), atol=1e-5, rtol=1e-6)
    parameters = tuple(p.unflatten(0, (5, 2)) for p in vae.decode(encoded.z.flatten(0, 1)).parameters)
    density = vae.density(encoded.target, encoded.z, parameters)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(encoded.z.double()).sum(-1)
    torch.testing.assert_close(density.log_p_z, prior, atol=1e-5, rtol=1e-6)
    p_x = torch.distributions.Bernoulli(logits=parameters[0].double())
    expected = p_x.log_prob(encoded.target.unsqueeze(1).double().expand_as(parameters[0])).sum((-3, -2, -1))
    torch.testing.assert_close(density.log_p_x, expected, atol=1e-5, rtol=1e-6)


def test_training_terms_are_the_exported_densities():
    vae = build((1, 6, 6), "conv", "discretised_logistic")
    x, noise = torch.rand(3, 1, 6, 6), torch.randn(3, 4, 3)
    terms = vae(x, noise)
    encoded = vae.encode(x, noise)
    parameters = tuple(p.unflatten(0, (3, 4)) for p in vae.decode(encoded.z.flatten(0, 1)).parameters)
    density = vae.density(encoded.target, encoded.z, parameters)
    for ours, exported in [
        (terms.log_p_x, density.log_p_x),
        (terms.log_p_z, density.log_p_z),
        (terms.log_q, encoded.log_q),
    ]:
        torch.testing.assert_close(ours.double(), exported, atol=1e-4, rtol=1e-5)


def test_analytic_kl_equals_torch_distributions():
    vae = build((1, 4, 4))
    x = torch.rand(5, 1, 4, 4)
    dither = torch.rand_like(x)
    terms = vae(x, torch.randn(5, 1, 3), dither)
    encoded = vae.encode(x, torch.randn(5, 1, 3), dither)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(encoded.loc, encoded.scale), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(terms.kl, expected)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("family", "tolerance"), [("bernoulli", 0.1), ("discretised_logistic", 0.1)])
def test_initialise_starts_at_the_training_mean(network, family, tolerance):
    vae = build((1, 8, 8), network, family)
    mean = torch.full((1, 8, 8), 0.3)
    vae.initialise(mean, mean[None])
    assert vae.decode(torch.zeros(1, 3)).mean.mean().item() == pytest.approx(0.3, abs=tolerance)


def test_detached_q_changes_gradients_but_no_value():
    vae = build((1, 4, 4))
    x, noise, dither = torch.rand(3, 1, 4, 4), torch.randn(3, 2, 3), torch.rand(3, 1, 4, 4)
    plain, detached = vae(x, noise, dither), vae(x, noise, dither, detach_q=True)
    torch.testing.assert_close(plain.log_q, detached.log_q)
