"""Scores against the closed form of PPCA, in bounded memory."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from service.bundle.files import open_bundle
from service.errors import BundleGraphError
from service.inference.model import Model, TileSummary, join_scores
from service.scores import bounds as estimators
from tests.ppca_bundle import fit_ppca, graphs, images, write_ppca_bundle
from tests.service.inference.model.inputs import X, definition, peak

# The oracle: with an exact posterior every bound is log p(x).


@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
@pytest.mark.parametrize("k", [1, 2, 5, 32, 33, 100])
@pytest.mark.parametrize("seed", [0, 1, 12345, 2**32 - 1])
def test_the_score_of_ppca_is_its_closed_form(model, ppca, estimator, k, seed):
    scores = model.score(X, definition(estimator, k, seed))
    wanted = ppca.log_likelihood(X)
    assert np.abs(scores.score + wanted).max() < 1e-4
    assert np.abs(scores.elbo - wanted).max() < 1e-4
    assert np.abs(scores.log_likelihood - wanted).max() < 1e-4
    assert scores.k == k


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 6, 9)])
def test_the_oracle_holds_for_other_image_shapes(tmp_path, runtime, shape):
    path, ppca = write_ppca_bundle(tmp_path, shape=shape, latent_dim=3)
    x = images(9, shape, seed=4)
    model = Model.load(open_bundle(path), runtime)
    assert np.abs(model.score(x, definition(k=3)).score + ppca.log_likelihood(x)).max() < 1e-4
    assert np.array_equal(model.score(x).score, np.concatenate([model.score(row[None]).score for row in x]))


def test_the_default_score_is_the_manifest_s(model):
    assert np.array_equal(model.score(X[:3]).score, model.score(X[:3], model.manifest.scores["elbo"]).score)


@pytest.mark.parametrize("maps", [False, True])
def test_the_memory_of_a_score_is_that_of_one_part_whatever_the_batch(ppca_path, runtime, monkeypatch, maps):
    """MAX_ELEMENTS is 32 samples of 2 images: 32 images at once would take 16 times that."""
    monkeypatch.setattr("service.inference.model.graph_runners.MAX_ELEMENTS", 2 * 32 * 64)
    model = Model.load(open_bundle(ppca_path), runtime)
    x, k = images(32, seed=3), 64
    model.score(x[:2], definition(k=k))  # trials of batch sizes are over
    parts, weights = 8 * 2 * 32 * 64 * 4, 10 * 32 * k * 8
    assert peak(lambda: model.score(x, definition(k=k), maps)) < parts + weights + 2**16


def test_scores_of_parts_join_to_those_of_all_rows(model):
    whole = model.score(X, maps=True, latents=True, also={"b": definition(k=2), "a": definition("iwae", 3)})
    parts = [
        model.score(x, maps=True, latents=True, also={"b": definition(k=2), "a": definition("iwae", 3)})
        for x in (X[:2], X[2:])
    ]
    joined = join_scores(parts)
    assert list(joined.also) == ["b", "a"]
    for one, other in ((whole._asdict(), joined._asdict()), (whole.also, joined.also)):
        for name, value in one.items():
            if name != "also":
                np.testing.assert_array_equal(value, other[name], name)
    images = [part._replace(map=list(part.map), tiles=[TileSummary(1, 0, 0, 0.0)] * len(part.map)) for part in parts]
    assert len(join_scores(images).tiles) == len(X)
    np.testing.assert_array_equal(join_scores(images).map, whole.map)


# Rate, distortion, maps and errors.


def test_the_elbo_is_minus_rate_and_distortion(model):
    scores = model.score(X, definition(k=7))
    assert np.allclose(scores.elbo, -(scores.rate + scores.distortion), rtol=0, atol=1e-9)


def test_the_rate_estimates_the_kl_divergence(model, ppca):
    """(1/k) Σ log q − log p(z) at sampled z against KL(q ‖ p) in closed form, within 5 of its standard errors."""
    gain, cholesky = ppca.posterior()
    loc = (X[:8].reshape(8, -1) - ppca.mean) @ gain.T
    kl = 0.5 * ((cholesky**2).sum() + (loc**2).sum(axis=1) - 5) - np.log(np.diag(cholesky)).sum()
    spread = np.sqrt((loc**2).sum(axis=1).max() * (cholesky**2).sum() + 5)
    assert np.abs(model.score(X[:8], definition(k=4000)).rate - kl).max() < 5 * spread / math.sqrt(4000)


def test_the_map_sums_to_the_distortion(model):
    scores = model.score(X, definition(k=40), maps=True)
    assert scores.map is not None
    assert (scores.map.shape, scores.map.dtype) == ((45, 8, 8), np.float32)
    assert np.allclose(scores.map.sum(axis=(1, 2), dtype=np.float64), scores.distortion, rtol=1e-5, atol=1e-4)
    assert model.score(X, definition()).map is None


def test_bits_per_dim_is_of_the_score_s_own_bound_for_8_bit_pixels(model):
    for estimator in ("elbo", "iwae"):
        scores = model.score(X, definition(estimator))
        assert np.allclose(scores.bits_per_dim, scores.score / (64 * math.log(2)) + 8, rtol=1e-12)
    assert estimators.bits_per_dim(np.array([-64 * math.log(2)]), 64, "counting").tolist() == [1.0]


def test_a_reconstruction_is_the_distortion_and_no_bound(model):
    elbo, scores = model.score(X, definition(k=7)), model.score(X, definition("reconstruction", 7))
    assert np.array_equal(scores.score, elbo.distortion)
    assert np.array_equal(scores.elbo, elbo.elbo)
    assert np.isnan(scores.bits_per_dim).all()


def test_the_standard_error_of_one_sample_is_nan(model):
    assert np.isnan(model.score(X, definition(k=1)).standard_error).all()


def test_the_iwae_bound_rises_with_k_where_the_posterior_is_not_exact(tmp_path, runtime):
    """The decoder's noise is doubled behind the encoder's back, so q is wrong: elbo < iwae-k < iwae-k' ≤ log p(x)."""
    wrong = fit_ppca(images(400), 5)
    wrong = type(wrong)(wrong.weight * 2, wrong.mean, wrong.sigma, wrong.shape)

    def change(_manifest, files):
        files["decoder.onnx"] = graphs(wrong)["decoder"]

    path, _ = write_ppca_bundle(tmp_path, change=change)
    model = Model.load(open_bundle(path), runtime)
    bounds = [model.score(X, definition("iwae", k)).log_likelihood.mean() for k in (1, 8, 64, 512)]
    truth = wrong.log_likelihood(X).mean()
    assert all(low < high for low, high in itertools.pairwise(bounds))
    assert bounds[-1] < truth + 0.1
    assert model.score(X, definition("iwae", 64)).elbo.mean() < bounds[2]


def test_a_model_that_yields_nan_is_called_broken_not_the_image(tmp_path, runtime):
    def change(_manifest, files):
        broken = fit_ppca(images(400), 5)
        files["decoder.onnx"] = graphs(type(broken)(broken.weight, broken.mean * np.nan, broken.sigma, broken.shape))[
            "decoder"
        ]

    path, _ = write_ppca_bundle(tmp_path, change=change)
    with pytest.raises(BundleGraphError, match="NaN for row 0"):
        Model.load(open_bundle(path), runtime).score(X)
