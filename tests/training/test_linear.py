"""PCA against scikit-learn, the linear autoencoder against PCA's subspace, and the prior fitted to their codes."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from sklearn import decomposition

from service.bundle.input_rules import ArrayPreprocessing
from tests.training.solved import dataset_of, digits, factor_rows, finish, solved, targets
from training.config import ModelConfig
from training.errors import ConfigError
from training.fitting.trainer import start
from training.models.registry import build_model

ERROR = {"family": "squared_error"}


@torch.no_grad()
@pytest.mark.parametrize("rows", [digits(), factor_rows()], ids=["pixels", "vectors"])
def test_pca_is_scikit_learns(rows):
    model, dataset = solved(rows, "pca", latent_dim=3, likelihood=ERROR)
    target = targets(model, dataset).flatten(1).double().numpy()
    oracle = decomposition.PCA(3, svd_solver="full").fit(target)
    axes = model.axes.numpy().T
    signs = np.sign((axes * oracle.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(signs * axes, oracle.components_, atol=1e-5)
    np.testing.assert_allclose(model.loc, oracle.mean_, atol=1e-6)
    held = targets(model, dataset, "test")
    q = model.encode(held)
    expected = oracle.transform(held.flatten(1).double().numpy()) * signs.T
    np.testing.assert_allclose(q.loc, expected, atol=1e-4)
    assert torch.equal(q.rsample(torch.randn(len(held), 2, 0)).z, q.loc.unsqueeze(1).expand(-1, 2, -1))
    reconstruction = model.decode(q.loc).loc.flatten(1)
    np.testing.assert_allclose(reconstruction, oracle.inverse_transform(expected * signs.T), atol=1e-4)


@torch.no_grad()
def test_axes_point_where_their_largest_entry_is_positive():
    model, _ = solved(digits(), "pca", latent_dim=5, likelihood=ERROR)
    axes = model.axes
    assert (axes.gather(0, axes.abs().argmax(0, keepdim=True)) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["pca", "linear_autoencoder"])
def test_the_prior_has_the_moments_of_the_training_codes(family):
    model, dataset = solved(factor_rows(), family, latent_dim=3, likelihood=ERROR)
    if family == "linear_autoencoder":
        model.encoder.bias += 1.0  # as it starts, the codes' mean is 0
        assert len(finish(model, dataset)) == 1
    codes = model.encode(targets(model, dataset)).loc
    draws = model.prior.sample(torch.randn(60_000, 3))
    torch.testing.assert_close(draws.mean(0), codes.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(draws.T), torch.cov(codes.T, correction=0), atol=0.04, rtol=0.03)
    expected = torch.distributions.MultivariateNormal(
        codes.double().mean(0), torch.cov(codes.T.double(), correction=0)
    ).log_prob(draws[:9].double())
    torch.testing.assert_close(model.prior.log_prob(draws[:9]), expected, atol=1e-5, rtol=1e-5)


def test_without_a_prior_nothing_is_fitted():
    model, _ = solved(factor_rows(), "pca", latent_dim=2, likelihood=ERROR, linear={"prior": "none"})
    assert model.prior.family == "none"
    with pytest.raises(NotImplementedError, match="without a prior"):
        model.sample(2)


def test_codes_that_do_not_vary_have_a_prior_too():
    rows = factor_rows()
    rows[:, 1:] = 3.0
    model, _ = solved(rows, "pca", latent_dim=3, likelihood=ERROR)
    draws = model.prior.sample(torch.randn(1000, 3))
    assert draws[:, 0].std() == pytest.approx(1.0, rel=0.1)
    assert draws[:, 1:].abs().max() < 1e-4


def test_training_terms_are_minus_the_squared_error():
    model, dataset = solved(factor_rows(), "pca", latent_dim=2, likelihood=ERROR)
    x = torch.from_numpy(dataset.pixels(dataset.splits["test"]))
    terms = model(x, torch.zeros(len(x), 3, 0))
    target = model.likelihood.target(x, None)
    expected = -((target - model.decode(model.encode(target).loc).loc) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(terms.log_p_x_given_z, expected.unsqueeze(1).expand(-1, 3))
    assert not torch.cat([terms.kl.per_group, terms.log_p_z, terms.log_q_z], 1).any()


@torch.no_grad()
def test_the_linear_autoencoder_starts_with_the_mean_at_zero():
    dataset = dataset_of(digits())
    model = build_model(dataset.preprocessing, ModelConfig(family="linear_autoencoder", latent_dim=4, likelihood=ERROR))
    mean = torch.rand(model.shape)
    model.initialise(mean, mean.unsqueeze(0))
    torch.testing.assert_close(model.code(mean.unsqueeze(0)), torch.zeros(1, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(torch.zeros(1, 4)).mean[0], mean)


def test_the_linear_autoencoder_finds_the_principal_subspace():
    dataset = dataset_of(digits())
    config = ModelConfig(family="linear_autoencoder", latent_dim=4, likelihood=ERROR)
    torch.manual_seed(0)
    model = build_model(dataset.preprocessing, config)
    start(model, dataset)
    x, noise = targets(model, dataset), torch.zeros(1, 1, 0)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 1500)
    for _ in range(1500):
        optimiser.zero_grad()
        (-model(x, noise).log_p_x_given_z.mean()).backward()
        optimiser.step()
        schedule.step()
    pca, _ = solved(digits(), "pca", latent_dim=4, likelihood=ERROR)
    angles = subspace_angles(model.decoder.weight.detach().double().numpy(), pca.axes.detach().double().numpy())
    assert angles.max() < 1e-2


@pytest.mark.parametrize("family", ["pca", "linear_autoencoder"])
@pytest.mark.parametrize(
    ("change", "text"),
    [({"latent_dim": 8}, "1 to 7, got 8"), ({"likelihood": {"family": "gaussian"}}, "squared_error")],
)
def test_what_cannot_be_is_refused(family, change, text):
    config = ModelConfig.model_validate({"family": family, "latent_dim": 2, "likelihood": ERROR, **change})
    with pytest.raises(ConfigError, match=text):
        build_model(ArrayPreprocessing(kind="vector", natural=(7,)), config)
