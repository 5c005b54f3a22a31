"""The deterministic autoencoder: its code is a function, its error a sum over places, its prior a fitted mixture."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from service.bundle.files import open_bundle
from tests.training.finished import finished_run
from tests.training.shared import encoded
from tests.training.solved import factor_rows, solved, targets
from training.config import LikelihoodConfig, MixtureConfig, ModelConfig, NetworkConfig, load_config
from training.data import load_dataset
from training.distributions import unflattened
from training.errors import ConfigError
from training.export.staging import export
from training.fitting.devices import make_fabric
from training.fitting.fit import fit
from training.models.autoencoder import Autoencoder
from training.models.priors import FittedMixture

ERRORS = ["squared_error", "cross_entropy"]


def build(shape=(1, 6, 5), error="squared_error", latent_dim=3, **config):
    torch.manual_seed(0)
    config = ModelConfig(
        family="autoencoder",
        latent_dim=latent_dim,
        network=NetworkConfig(hidden=[12]),
        likelihood=LikelihoodConfig(family=error),
        **config,
    )
    return Autoencoder(shape, config).eval()


def fitted_mixture(covariance, codes, components=3):
    prior = FittedMixture(codes.shape[1], MixtureConfig(components=components, covariance=covariance))
    prior.fit(codes, seed=0)
    return prior


def codes(count=3000):
    """Three clusters in a plane, correlated, of very different scales."""
    random = np.random.RandomState(0)
    which = random.choice(3, count, p=[0.5, 0.3, 0.2])
    noise = random.randn(count, 2) @ np.array([[100.0, 0.5], [0.0, 0.3]])
    return torch.from_numpy(np.array([[0.0, 0.0], [900.0, 2.0], [-700.0, 5.0]])[which] + noise).float()


@pytest.mark.parametrize("error", ERRORS)
def test_the_code_is_a_function_and_the_error_a_sum_over_places(error):
    model = build(error=error)
    x = torch.rand(4, 1, 6, 5)
    found = encoded(model, x, torch.randn(4, 7, 0))
    assert found.z.shape == (4, 7, 3)
    assert found.z.eq(found.loc.unsqueeze(1)).all()
    assert found.scale.eq(0).all()
    assert found.log_q_z.shape == (4, 7)
    assert found.log_q_z.eq(0).all()
    p = model.decode(found.loc)
    joint = model.joint(found.target, found.z[:, :1], unflattened(p, (4, 1)))
    if error == "squared_error":
        expected = -((x - p.loc).double() ** 2).sum((1, 2, 3))
    else:
        bce = torch.nn.functional.binary_cross_entropy(model.likelihood.mean(p), x, reduction="none")
        expected = -bce.double().sum((1, 2, 3))
    torch.testing.assert_close(joint.negative_error[:, 0], expected, atol=1e-5, rtol=1e-5)
    terms = model(x, torch.randn(4, 7, 0))
    torch.testing.assert_close(terms.log_p_x_given_z.double(), joint.negative_error.expand(4, 7), atol=1e-5, rtol=1e-5)
    assert terms.kl.per_group.eq(0).all()
    assert (model.evidence, model.moments) == ("none", "point")


def test_without_a_likelihood_there_is_no_log_p_x_but_draws_there_are():
    model = build()
    with pytest.raises(ConfigError, match="'autoencoder' has no likelihood"):
        model.log_prob(torch.rand(2, 1, 6, 5))
    generator = torch.Generator().manual_seed(0)
    choice, noise = torch.rand(3, generator=generator), torch.randn(3, 3, generator=generator)
    expected = model.likelihood.mean(model.decode(model.prior.sample(noise, choice)))
    torch.testing.assert_close(model.sample(3, torch.Generator().manual_seed(0)), expected)


def test_a_likelihood_is_refused():
    with pytest.raises(ConfigError, match="expected cross_entropy or squared_error, got 'bernoulli'"):
        build(error="bernoulli")


@pytest.mark.parametrize("error", ERRORS)
def test_reconstructions_start_at_the_training_mean(error):
    """The decoder's last layer has it in its bias: without weights there is nothing else."""
    model = build(error=error)
    mean = torch.rand(1, 6, 5).clamp(0.01, 0.99)
    model.initialise(mean, torch.rand(9, 1, 6, 5))
    torch.nn.init.zeros_(model.decoder[1].weight)
    found = model.likelihood.mean(model.decode(torch.randn(4, 3)))
    torch.testing.assert_close(found, mean.expand(4, 1, 6, 5))


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_the_mixtures_density_is_that_of_its_components(covariance):
    prior = fitted_mixture(covariance, codes())
    z = codes(50)
    density = np.zeros(50)
    for weight, loc, factor in zip(prior.weights, prior.loc, prior.factor, strict=True):
        density += float(weight) * multivariate_normal.pdf(z.numpy(), loc.numpy(), (factor @ factor.T).numpy())
        assert covariance == "full" or factor.equal(torch.diag(torch.diagonal(factor)))
    np.testing.assert_allclose(prior.log_prob(z).numpy(), np.log(density), rtol=1e-6)
    assert prior.log_prob(z.view(5, 10, 2)).shape == (5, 10)


def test_an_unfitted_mixture_is_the_standard_normal():
    z = torch.randn(20, 4)
    prior = FittedMixture(4, MixtureConfig(components=5))
    np.testing.assert_allclose(prior.log_prob(z).numpy(), norm.logpdf(z.double().numpy()).sum(1), rtol=1e-9)


def test_em_finds_the_clusters_whatever_their_scale():
    prior = fitted_mixture("full", codes())
    order = prior.weights.argsort(descending=True)
    assert prior.weights[order].tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert prior.loc[order, 0].tolist() == pytest.approx([0, 900, -700], abs=30)
    covariance = prior.factor @ prior.factor.mT
    expected = np.array([[1e4, 50], [50, 0.34]])
    np.testing.assert_allclose(covariance[order[0]].numpy(), expected, rtol=0.15)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_draws_of_the_mixture_have_its_moments(covariance):
    prior = fitted_mixture(covariance, codes())
    generator = torch.Generator().manual_seed(1)
    choice = (torch.arange(200_000) + 0.5) / 200_000
    draws = prior.sample(torch.randn(200_000, 2, generator=generator), choice).double()
    mean = prior.weights @ prior.loc
    second = prior.weights[:, None, None] * (
        prior.factor @ prior.factor.mT + prior.loc[:, :, None] * prior.loc[:, None]
    )
    covariance_of_all = second.sum(0) - torch.outer(mean, mean)
    torch.testing.assert_close(draws.mean(0), mean, atol=1.0, rtol=0.01)
    torch.testing.assert_close(torch.cov(draws.T), covariance_of_all, rtol=0.02, atol=0)
    assert prior.sample(torch.zeros(3, 2), torch.tensor([0.0, 0.5, 1.0 - 2**-24])).isfinite().all()


def test_more_components_than_codes_are_refused():
    with pytest.raises(ConfigError, match="4 of 3 codes"):
        fitted_mixture("full", codes(3), components=4)


def test_a_code_that_never_varies_leaves_a_proper_density():
    rows = torch.cat([codes(500), torch.full((500, 1), 7.0)], 1)
    prior = fitted_mixture("full", rows)
    assert prior.log_prob(rows).isfinite().all()
    assert prior.sample(torch.randn(4, 3), torch.rand(4))[:, 2].tolist() == pytest.approx([7.0] * 4, abs=0.01)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """An autoencoder of 8×8 digits after a few epochs, its mixture fitted."""
    overrides = [
        "model.family=autoencoder",
        "model.latent_dim=4",
        "model.network.hidden=[32]",
        "model.likelihood.family=squared_error",
        "model.autoencoder.mixture.components=4",
        "optimiser.epochs=3",
        "optimiser.warmup_steps=0",
        "run.threads=1",
    ]
    config = load_config("digits", overrides)
    dataset = load_dataset(config.data)
    folder = tmp_path_factory.mktemp("autoencoder")
    fitted = fit(config, dataset, folder, make_fabric(config), None)
    return fitted, dataset


def test_training_lowers_the_error_and_ends_with_a_mixture_of_the_codes(digits):
    fitted, dataset = digits
    errors = [row["distortion"] for row in fitted.history]
    untrained = build((1, 8, 8), latent_dim=4)(torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 0))
    assert errors[-1] < 0.8 * untrained.log_p_x_given_z.neg().item()
    prior, model = fitted.model.prior, fitted.model
    x = torch.from_numpy(dataset.pixels(dataset.splits["test"]).astype(np.float32) / 255)
    z = model.encode(model.likelihood.target(x, None)).loc
    unfitted = FittedMixture(4, MixtureConfig(components=4))
    assert prior.log_prob(z).mean() > unfitted.log_prob(z).mean() + 1


@torch.no_grad()
def test_a_prior_of_vectors_is_fitted_to_the_codes_of_their_standardised_numbers():
    table = {"network": {"hidden": [12]}, "autoencoder": {"mixture": {"components": 1}}}
    likelihood = {"family": "squared_error"}
    model, dataset = solved(factor_rows(), "autoencoder", latent_dim=3, likelihood=likelihood, **table)
    z = model.encode(targets(model, dataset)).loc.double()
    torch.testing.assert_close(model.prior.loc[0], z.mean(0), atol=1e-5, rtol=1e-5)
    covariance = model.prior.factor[0] @ model.prior.factor[0].T
    torch.testing.assert_close(covariance, torch.cov(z.T, correction=0), atol=1e-4, rtol=1e-3)


def test_the_bundle_of_a_mixture_of_codes(fitted_family):
    check_manifest(fitted_family("autoencoder").served.manifest, prior="gaussian_mixture")


def test_the_bundle_of_a_model_without_a_prior(tmp_path):
    table = {
        "family": "autoencoder",
        "latent_dim": 3,
        "network": {"hidden": [12]},
        "likelihood": {"family": "cross_entropy"},
        "autoencoder": {"prior": "none"},
    }
    manifest = open_bundle(export(finished_run(tmp_path, (1, 6, 5), table))).manifest
    check_manifest(manifest, prior="none")
    assert list(manifest.scores) == ["reconstruction"]


def check_manifest(manifest, prior):
    """What every autoencoder's manifest says; graphs are held against torch as they are exported."""
    assert (manifest.evidence, manifest.posterior.moments) == ("none", "point")
    assert manifest.prior.family == prior
    assert set(manifest.reference.max_abs_error) >= {"encoder.loc", "joint.negative_error", "observation.sample"}
    assert ("prior.z" in manifest.reference.max_abs_error) == (prior != "none")
