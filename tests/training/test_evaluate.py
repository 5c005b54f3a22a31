"""Evaluation against the linear Gaussian model, whose log p(x) and posterior have closed forms."""

import math

import numpy as np
import pytest
import torch

from tests.training.linear_gaussian import SHAPE, Linear, noise_images
from training.config import EvaluateConfig, LikelihoodConfig, ModelConfig
from training.distributions import Normal
from training.evaluation.aggregate import aggregate_posterior, describe
from training.evaluation.evaluate import _evidence, batch_bounds, bits_per_dim, bounds, evaluate, log_weights, summary
from training.evaluation.tightness import inference_gap
from training.models.autoencoder import Autoencoder
from training.models.vae import VAE


@pytest.fixture
def dataset():
    return noise_images()


def pixels(dataset):
    return torch.from_numpy(dataset.pixels(np.arange(40)))


@pytest.mark.parametrize("k", [1, 7, 100])
def test_every_bound_is_log_p_x_where_the_posterior_is_exact(dataset, k):
    model = Linear()
    exact = model.log_evidence(pixels(dataset))
    found = bounds(model, dataset, dataset.splits["test"], k, chunk=64)
    np.testing.assert_allclose(found.elbo, exact, atol=2e-4)
    np.testing.assert_allclose(found.iwae, exact, atol=2e-4)
    np.testing.assert_allclose(found.distortion + found.rate, -found.elbo, atol=1e-9)
    np.testing.assert_allclose(found.effective_samples, k, rtol=1e-4)


def test_bounds_are_ordered_and_converge_where_it_is_not(dataset):
    model = Linear(exact=False)
    exact = model.log_evidence(pixels(dataset)).mean()
    means = [bounds(model, dataset, dataset.splits["test"], k).means() for k in (5, 50, 5000)]
    assert means[0]["elbo"] < means[0]["iwae"] < means[1]["iwae"] < exact + 0.01
    assert means[2]["iwae"] == pytest.approx(exact, abs=0.01)


@torch.no_grad()
def test_an_analytic_kl_has_no_place_in_the_log_mean_exp(dataset):
    """log-mean-exp(log p(x|z)) − KL is at least log p(x) at the exact posterior, where it bounds nothing: a figure that
    looks better than the model is. There every sampled weight is p(x), and the right estimate has no spread."""
    model = Linear()
    x = pixels(dataset)
    exact = model.log_evidence(x)
    right, wrong = [], []
    for seed in range(5):
        torch.manual_seed(seed)
        right.append(batch_bounds(model, x, None, 100, 4000)["iwae"].numpy())
        torch.manual_seed(seed)
        log_p_x = torch.cat([fit for _, fit in log_weights(model, x, None, 100, 4000)], 1)
        q = model.encode(x)
        kl = Normal(q.loc, q.scale).kl_to_standard().sum(1)
        wrong.append((torch.logsumexp(log_p_x, 1) - math.log(100) - kl).numpy())
    assert np.std(right, 0).max() < 1e-4
    assert np.abs(np.mean(right, 0) - exact).max() < 2e-4
    assert (np.mean(wrong, 0) - exact).min() > 0.05


def test_the_estimate_does_not_depend_on_the_chunk(dataset):
    """Not even in its draws, where a sample's noise fills whole blocks of the generator: 16 images of 3 dimensions."""
    model, indices = Linear(exact=False), np.arange(16)
    whole, parts = (bounds(model, dataset, indices, 2000, chunk) for chunk in (100_000, 97))
    for name in ("elbo", "iwae", "rate", "distortion", "effective_samples"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_the_chunked_bound_is_the_one_of_all_float64_weights_at_once(dataset):
    model, x = Linear(exact=False), pixels(dataset)[:16]
    torch.manual_seed(1)
    found = batch_bounds(model, x, None, 500, 64)
    torch.manual_seed(1)
    noise = torch.randn(500, 16, 3).transpose(0, 1)
    q = model.encode(x)
    loc, scale = q.loc, q.scale
    z = loc[:, None] + scale[:, None] * noise
    mean = (z.double() @ model.W.T.double() + model.mu.double()).reshape(16, 500, *SHAPE)
    normal = torch.distributions.Normal
    log_p_x = normal(mean, model.sigma).log_prob(x[:, None].double()).sum((-3, -2, -1))
    log_p_z = normal(0.0, 1.0).log_prob(z.double()).sum(-1)
    log_w = log_p_x + log_p_z - normal(loc[:, None].double(), scale[:, None].double()).log_prob(z.double()).sum(-1)
    w = torch.exp(log_w - log_w.max())
    torch.testing.assert_close(found["iwae"], torch.logsumexp(log_w, 1) - math.log(500), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["elbo"], log_w.mean(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["distortion"], -log_p_x.mean(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(found["effective_samples"], w.sum(1) ** 2 / (w**2).sum(1), atol=0, rtol=1e-4)


def test_same_seed_same_numbers(dataset):
    model = Linear(exact=False)
    first, second = (bounds(model, dataset, dataset.splits["test"], 5, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.iwae, second.iwae)
    assert (bounds(model, dataset, dataset.splits["test"], 5, seed=4).iwae != first.iwae).any()


def test_half_precision_rounds_the_decoder_and_nothing_else(dataset):
    torch.manual_seed(0)
    model = VAE(SHAPE, ModelConfig(latent_dim=3)).eval()
    dtypes = {}
    model.decoder.register_forward_hook(lambda _, inputs, output: dtypes.update(decoder=output.dtype))
    model.encoder.register_forward_hook(lambda _, inputs, output: dtypes.update(encoder=output.dtype))
    indices = dataset.splits["test"]
    rounded = bounds(model, dataset, indices, 50, precision="bf16-mixed")
    assert dtypes == {"decoder": torch.bfloat16, "encoder": torch.float32}
    plain = bounds(model, dataset, indices, 50)
    assert plain.iwae.dtype == rounded.iwae.dtype == np.float64
    assert 0 < np.abs(plain.iwae - rounded.iwae).max() < 0.1
    np.testing.assert_allclose(plain.rate, rounded.rate, atol=1e-9)


def test_standard_errors_are_of_means_over_images(dataset):
    model, indices = Linear(exact=False, offset=0.5), dataset.splits["test"][:20]
    config = EvaluateConfig(k=50, images=20, gaps=20, gap_steps=20)
    metrics, _ = evaluate(model, dataset, "test", config)
    by_image = bounds(model, dataset, indices, 50)
    expected = np.sqrt(((by_image.iwae - by_image.iwae.mean()) ** 2).sum() / 20 / 20)
    assert metrics["log_likelihood_standard_error"] == pytest.approx(expected)
    x = torch.from_numpy(dataset.pixels(indices))
    gap = inference_gap(model, x, None, by_image.elbo, by_image.iwae, 20, 0)
    for name, values in (("amortisation_gap", gap.amortisation), ("approximation_gap", gap.approximation)):
        assert metrics[f"{name}_standard_error"] == pytest.approx(np.sqrt(values.var() / 20), rel=1e-3)
    without = bounds(Linear(), dataset, indices, 1)
    error = _evidence(type("Model", (), {"evidence": "none"}), without)["reconstruction_error_standard_error"]
    assert error == pytest.approx(np.sqrt(without.distortion.var() / 20))


def test_a_unit_is_active_where_its_mean_varies_by_more_than_a_hundredth():
    deviations = torch.tensor([0.099, 0.101, 1.0])
    loc = deviations * torch.tensor([1.0, -1.0]).repeat(5000)[:, None]
    assert describe(Linear(), loc, torch.ones_like(loc), loc).active_units == 2


def test_active_units_counts_dimensions_that_move(dataset):
    model = Linear()
    assert aggregate_posterior(model, dataset, dataset.splits["test"]).active_units == 3
    model.W = model.W * torch.tensor([1.0, 1.0, 1e-3])
    assert aggregate_posterior(model, dataset, dataset.splits["test"]).active_units == 2


def test_metrics_of_a_bound(dataset):
    seen = []
    metrics = evaluate(
        Linear(exact=False), dataset, "test", EvaluateConfig(k=30, images=10), progress=seen.append
    ).metrics
    assert (metrics["images"], metrics["k"], sum(seen)) == (10, 30, 10)
    expected = -metrics["log_likelihood"] / (20 * math.log(2)) + 8
    assert metrics["bits_per_dim"] == pytest.approx(expected)
    assert metrics["bound_gap"] == pytest.approx(metrics["log_likelihood"] - metrics["elbo"])
    assert metrics["elbo"] == pytest.approx(-metrics["rate"] - metrics["distortion"])
    assert 1 < metrics["effective_sample_size"] < 30
    assert metrics["effective_sample_fraction"] == metrics["effective_sample_size"] / 30
    assert "amortisation_gap" not in metrics
    assert all(isinstance(value, int | float) for value in metrics.values())


def test_the_gap_is_split_where_it_is_asked_for(dataset):
    config = EvaluateConfig(k=200, images=20, gaps=8, gap_steps=100)
    metrics, latents = evaluate(Linear(exact=False, offset=0.5), dataset, "test", config)
    assert metrics["gap_images"] == 8
    assert metrics["approximation_gap"] == pytest.approx(0, abs=0.1)
    assert metrics["amortisation_gap"] > 0.4
    assert "by amortisation" in summary(metrics)
    assert len(latents["rate"]) == 3
    assert sum(latents["rate"]) == pytest.approx(metrics["rate"], rel=0.1)


def test_exact_evidence_takes_one_sample_and_has_no_gap(dataset):
    model = Linear()
    model.evidence = "exact"
    metrics, _ = evaluate(model, dataset, "test", EvaluateConfig(k=1000))
    assert metrics["k"] == 1
    assert metrics["log_likelihood"] == pytest.approx(model.log_evidence(pixels(dataset)).mean(), abs=1e-4)
    assert metrics["elbo"] == pytest.approx(metrics["log_likelihood"])
    assert not {"bound_gap", "effective_sample_size"} & metrics.keys()
    assert "(exact)" in summary(metrics)


def test_a_deterministic_encoder_has_neither_rate_nor_active_units(dataset):
    model = Linear()
    model.evidence, model.moments = "exact", "point"
    metrics, latents = evaluate(model, dataset, "test", EvaluateConfig(k=5))
    assert latents is None
    assert set(metrics) == {
        "log_likelihood",
        "log_likelihood_standard_error",
        "elbo",
        "bits_per_dim",
        "k",
        "images",
    }


def test_without_a_likelihood_there_is_a_reconstruction_error_only(dataset):
    likelihood = LikelihoodConfig(family="squared_error")
    model = Autoencoder(SHAPE, ModelConfig(family="autoencoder", latent_dim=2, likelihood=likelihood))
    metrics, latents = evaluate(model, dataset, "test", EvaluateConfig(k=500))
    assert latents is None
    assert summary(metrics).endswith("no likelihood")
    assert set(metrics) == {"reconstruction_error", "reconstruction_error_standard_error", "k", "images"}
    assert metrics["reconstruction_error"] > 0


def test_bits_per_dim_of_a_fair_coin_is_one():
    model = VAE(SHAPE, ModelConfig(latent_dim=1))
    assert bits_per_dim(20 * math.log(0.5), model) == pytest.approx(1)


def test_numbers_in_their_own_units_have_no_bits_per_dim():
    config = LikelihoodConfig(family="gaussian", values="reals")
    assert bits_per_dim(-3.0, VAE(SHAPE, ModelConfig(latent_dim=1, likelihood=config))) is None
