"""PPCA and factor analysis against scikit-learn and dense Gaussians; log p(x) is the same at every z."""

import numpy as np
import pytest
import torch
from sklearn import decomposition

from service.bundle.input_rules import ArrayPreprocessing, Preprocessing
from tests.training.solved import digits, factor_rows, log_weights, solved, targets
from training.config import ModelConfig
from training.data.batches import to_unit
from training.errors import ConfigError
from training.models import moments
from training.models.factor import identified
from training.models.moments import moments_of
from training.models.registry import build_model

PPCA = {"latent_dim": 2, "likelihood": {"family": "gaussian", "scale": "shared"}}
FA = {"latent_dim": 2, "likelihood": {"family": "gaussian", "scale": "diagonal"}}
MODELS = {"ppca": PPCA, "fa": FA}


@pytest.fixture(scope="module", params=["ppca", "fa"])
def of_digits(request):
    model = MODELS[request.param] | {"latent_dim": 6}
    return solved(digits(), request.param, **model)


@pytest.fixture(scope="module", params=["ppca", "fa"])
def of_vectors(request):
    return solved(factor_rows(), request.param, **MODELS[request.param])


def covariance_of(model):
    """W Wᵀ + Ψ, float64."""
    weight = model.weight.detach().double()
    scale = model.likelihood(torch.zeros(1, 1, *model.shape)).scale
    return weight @ weight.T + torch.diag(scale.detach().flatten().double() ** 2)


def test_moments_of_batches_are_those_of_all_rows():
    rows = 1e4 + np.random.RandomState(0).standard_normal((103, 5)) @ np.random.RandomState(1).standard_normal((5, 5))
    found = moments_of(torch.from_numpy(rows).split([1, 50, 40, 12]))
    assert found.count == 103
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-12)


def test_ppca_of_vectors_is_scikit_learns():
    model, dataset = solved(factor_rows(), "ppca", **PPCA)
    target = targets(model, dataset).flatten(1).double().numpy()
    oracle = decomposition.PCA(2, svd_solver="full").fit(target)
    n = len(target)
    # scikit-learn divides the covariance by n − 1, maximum likelihood by n
    np.testing.assert_allclose(covariance_of(model), oracle.get_covariance() * (n - 1) / n, atol=2e-6)


def test_rows_of_more_numbers_than_there_are_rows_need_no_covariance(monkeypatch):
    """As a backbone's maps are: the same PPCA and PCA, in N·D memory."""
    rows = factor_rows(count=30, numbers=90, factors=5)
    monkeypatch.setattr(moments, "target_moments", None)
    model, dataset = solved(rows, "ppca", **PPCA | {"latent_dim": 5})
    target = targets(model, dataset).flatten(1).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(target.T, bias=True))
    variance = values[:-5].mean()
    expected = variance * np.eye(90) + (vectors[:, -5:] * (values[-5:] - variance)) @ vectors[:, -5:].T
    np.testing.assert_allclose(covariance_of(model), expected, atol=2e-6 * values[-1])
    pca, _ = solved(rows, "pca", latent_dim=5, likelihood={"family": "squared_error"})
    np.testing.assert_allclose(pca.axes.detach().abs(), np.abs(vectors[:, :-6:-1]), atol=1e-5)


@pytest.mark.parametrize("count", [1797, 70], ids=["by covariance", "by the rows themselves"])
def test_ppca_of_images_has_the_dithers_expectation_in_its_covariance(count):
    model, dataset = solved(digits()[:count], "ppca", **PPCA)
    levels = dataset.pixels(dataset.splits["train"]).reshape(-1, 64).astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(levels.T, bias=True) / 256**2)[::-1] + 1 / (12 * 256**2)
    np.testing.assert_allclose(model.loc.detach(), (levels.mean(0) + 0.5) / 256, atol=1e-6)
    scale = model.likelihood(torch.zeros(1, 1, 1, 8, 8)).scale
    np.testing.assert_allclose(scale.detach().numpy() ** 2, np.full((1, 1, 8, 8), values[2:].mean()), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.eigvalsh(covariance_of(model))[::-1][:2], values[:2], rtol=1e-5)


@torch.no_grad()
def test_factor_analysis_is_scikit_learns():
    model, dataset = solved(factor_rows(), "fa", **FA, factor={"tolerance": 1e-10, "iterations": 20_000})
    target = targets(model, dataset).flatten(1).double()
    oracle = decomposition.FactorAnalysis(2, tol=1e-12, max_iter=20_000, svd_method="lapack").fit(target.numpy())
    np.testing.assert_allclose(covariance_of(model), oracle.get_covariance(), atol=2e-4)
    expected = oracle.score(target.numpy())
    ours = float(model.log_marginal(target.float().unflatten(1, model.shape)).mean() - model.likelihood.log_volume)
    assert ours == pytest.approx(expected, abs=1e-4)


def test_factors_are_told_apart():
    model, _ = solved(factor_rows(), "fa", **FA)
    scale = model.likelihood(torch.zeros(1, 1, *model.shape)).scale
    scaled = model.weight.detach() / scale.detach().reshape(-1, 1)
    strengths = scaled.T @ scaled
    assert strengths[0, 0] > strengths[1, 1]
    assert abs(strengths[0, 1]) < 1e-4 * strengths[1, 1]
    for weight in torch.randn(4, 7, 2).double():
        rotated = identified(weight, torch.ones(7).double())
        assert (rotated.gather(0, rotated.abs().argmax(0, keepdim=True)) > 0).all(), "and their signs"
        torch.testing.assert_close(rotated @ rotated.T, weight @ weight.T)


@torch.no_grad()
def test_em_never_lowers_the_likelihood():
    means = []
    for iterations in (1, 2, 5, 20, 100):
        model, dataset = solved(factor_rows(), "fa", **FA, factor={"iterations": iterations})
        means.append(float(model.log_marginal(targets(model, dataset)).mean()))
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.1


@torch.no_grad()
def test_log_marginal_is_the_dense_gaussians(of_vectors):
    model, dataset = of_vectors
    target = targets(model, dataset, "test")
    dense = torch.distributions.MultivariateNormal(model.loc.detach().double(), covariance_of(model))
    expected = dense.log_prob(target.flatten(1).double()) - torch.log(model.likelihood.unit.double()).sum()
    torch.testing.assert_close(model.log_marginal(target).detach(), expected, atol=1e-6, rtol=1e-8)


def assert_every_z_gives_log_p_x(model, target, atol):
    log_w = log_weights(model, target, 3 * torch.randn(len(target), 20, model.noise_dim))
    torch.testing.assert_close(log_w, model.log_marginal(target).unsqueeze(1).expand_as(log_w), atol=atol, rtol=0)


@torch.no_grad()
def test_every_z_gives_log_p_x(of_digits):
    model, dataset = of_digits
    target = targets(model, dataset, "test")[:50]
    assert_every_z_gives_log_p_x(model, target, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("family", "atol"), [("ppca", 2.5e-5), ("fa", 1e-4)])  # 3.1e-5 were log p(x|z) in float32
def test_every_z_gives_log_p_x_of_a_thousand_pixels(family, atol):
    noise = np.random.RandomState(0).randint(0, 12, (400, 1, 32, 32))
    rows = np.clip(np.kron(digits()[:400], np.ones((4, 4))) + noise, 0, 255).astype(np.uint8)
    model, dataset = solved(rows, family, **MODELS[family] | {"latent_dim": 6}, factor={"iterations": 50})
    target = targets(model, dataset, "test")[:50]
    assert_every_z_gives_log_p_x(model, target, atol)


@torch.no_grad()
def test_every_z_gives_log_p_x_of_vectors_in_their_own_units(of_vectors):
    model, dataset = of_vectors
    target = targets(model, dataset, "test")[:50]
    assert_every_z_gives_log_p_x(model, target, 1e-4)


@torch.no_grad()
def test_draws_have_the_posteriors_moments(of_vectors):
    model, dataset = of_vectors
    target = targets(model, dataset, "test")[:1]
    loc, scale, z, _ = model.encode(target).with_moments(torch.randn(1, 40_000, model.noise_dim))
    covariance = covariance_of(model)
    weight = model.weight.double()
    gain = weight.T @ torch.linalg.inv(covariance)
    expected_loc = gain @ (target.flatten().double() - model.loc.double())
    expected = torch.eye(model.latent_dim, dtype=torch.float64) - gain @ weight
    torch.testing.assert_close(loc[0].double(), expected_loc, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scale[0].double() ** 2, torch.diagonal(expected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cov(z[0].T.double(), correction=0), expected, atol=0.01, rtol=0.03)


@torch.no_grad()
@pytest.mark.parametrize("family", ["ppca", "fa"])
def test_a_rotated_basis_has_a_full_posterior_and_the_same_log_p_x(family):
    model, dataset = solved(factor_rows(), family, **MODELS[family] | {"latent_dim": 3})
    target = targets(model, dataset, "test")[:20]
    before = model.log_marginal(target)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    scale = model.likelihood(torch.zeros(1, 1, *model.shape)).scale
    one_or_each = scale.flatten()[0] if family == "ppca" else scale.flatten()
    model.set_values(model.weight.double() @ rotation, model.loc.double(), one_or_each.double())
    log_w = log_weights(model, target, 3 * torch.randn(20, 10, 3))
    torch.testing.assert_close(log_w, before.unsqueeze(1).expand_as(log_w), atol=1e-4, rtol=0)
    drawn = model.encode(target[:1]).rsample(torch.randn(1, 40_000, 3)).z[0].T.double()
    weight = model.weight.double()
    expected = torch.eye(3, dtype=torch.float64) - weight.T @ torch.linalg.inv(covariance_of(model)) @ weight
    assert expected.fill_diagonal_(0).abs().max() > 1e-3
    found = torch.cov(drawn, correction=0).fill_diagonal_(0)
    torch.testing.assert_close(found, expected, atol=0.005, rtol=0.05)


@torch.no_grad()
def test_draws_of_x_have_the_models_covariance():
    model, _ = solved(factor_rows(), "fa", **FA)
    drawn = model.sample(60_000, torch.Generator().manual_seed(0))
    standardised = ((drawn - model.likelihood.shift) / model.likelihood.unit).flatten(1).double()
    torch.testing.assert_close(torch.cov(standardised.T), covariance_of(model), atol=0.03, rtol=0)
    torch.testing.assert_close(standardised.mean(0), model.loc.double(), atol=0.03, rtol=0)


@torch.no_grad()
def test_log_prob_is_exact_by_one_sample_of_z(of_vectors, of_digits):
    for model, dataset in (of_vectors, of_digits):
        x = to_unit(dataset.pixels(dataset.splits["test"][:20]))
        found = model.log_prob(x, generator=torch.Generator().manual_seed(4))
        dither = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) if model.likelihood.dither else None
        torch.testing.assert_close(found, model.log_marginal(model.likelihood.target(x, dither)), atol=1e-4, rtol=0)
        assert found.dtype == torch.float64


@torch.no_grad()
def test_narrow_scales_stop_at_the_floor():
    rows = factor_rows()
    rows[:, 3] = rows[:, 2] * 2 + 1e-5 * rows[:, 4]
    model, dataset = solved(rows, "fa", **FA | {"likelihood": FA["likelihood"] | {"min_scale": 0.02}})
    scale = model.likelihood(torch.zeros(1, 1, *model.shape)).scale
    assert float(scale.min()) == pytest.approx(0.02, rel=1e-5)
    target = targets(model, dataset, "test")
    log_w = log_weights(model, target, torch.randn(len(target), 4, 2))
    torch.testing.assert_close(log_w, model.log_marginal(target).unsqueeze(1).expand_as(log_w), atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "change", "text"),
    [
        ("ppca", {"latent_dim": 7}, "1 to 6, got 7"),
        ("ppca", {"likelihood": {"family": "gaussian", "scale": "pixel"}}, "scale shared"),
        ("fa", {"likelihood": {"family": "bernoulli"}}, "family gaussian with scale diagonal"),
    ],
)
def test_what_cannot_be_is_refused(family, change, text):
    config = ModelConfig.model_validate({"family": family, **MODELS[family], **change})
    image = config.likelihood.family == "bernoulli"
    rule = Preprocessing(mode="L", height=1, width=7) if image else ArrayPreprocessing(kind="vector", natural=(7,))
    with pytest.raises(ConfigError, match=text):
        build_model(rule, config)
