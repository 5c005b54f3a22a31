"""The rate by latent dimension: closed forms, integrals, what is joint, and how it is answered."""

import numpy as np
import pytest

from service.api.schemas import Scored
from service.bundle.capabilities import refusals
from service.bundle.files import open_bundle
from service.inference.model import Model
from service.scores.latent_contributions import PriorMarginals, divergences
from tests.ppca_bundle import images
from tests.service.http import assert_problem, npy, serving
from tests.service.linear_bundles import MIXTURE, draw, write_all

X = images(4, seed=21)
SHARES, LOCS, SCALES = MIXTURE.components


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("repository"))


@pytest.fixture(scope="module")
def mixture(root, runtime):
    return Model.load(open_bundle(root / "mixture" / "1"), runtime)


@pytest.fixture(scope="module")
def client(ppca_root):
    with serving(ppca_root) as client:
        yield client


def post(client, x=X, model="ppca", **query):
    headers = {"content-type": "application/x-npy"}
    return client.post(f"/v1/models/{model}/score", content=npy(x), headers=headers, params=query)


def log_marginal(j, values):
    """Of the mixture's prior, float64."""
    terms = [
        np.log(share) - 0.5 * ((values - loc[j]) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))
        for share, loc, scale in zip(SHARES, LOCS, SCALES, strict=True)
    ]
    return np.logaddexp.reduce(terms, axis=0)


def integrated(j, loc, scale):
    """KL(N(loc, scale²) ‖ p(z_j)) on a fine grid."""
    t = np.linspace(loc - 9 * scale, loc + 9 * scale, 20_001)
    log_q = -0.5 * ((t - loc) / scale) ** 2 - np.log(scale * np.sqrt(2 * np.pi))
    return float((np.exp(log_q) * (log_q - log_marginal(j, t))).sum() * (t[1] - t[0]))


def test_under_a_standard_normal_prior_the_rest_is_the_posterior_s_total_correlation(model, ppca):
    """Of PPCA: Σ log σ_j − ½ log det Σ, Σ = (I + WᵀW/σ²)⁻¹, the same for every x."""
    found = model.score(X, model.manifest.scores["elbo"].model_copy(update={"k": 4000}), latents=True)
    encoded = model.encode(X)
    loc, variance = encoded.loc.astype(np.float64), encoded.scale.astype(np.float64) ** 2
    posterior = np.linalg.inv(np.eye(ppca.latent_dim) + ppca.weight.T @ ppca.weight / ppca.sigma**2)
    correlation = 0.5 * np.log(np.diag(posterior)).sum() - 0.5 * np.linalg.slogdet(posterior)[1]
    assert correlation > 0.05
    trace = np.trace(posterior) - np.linalg.slogdet(posterior)[1] - ppca.latent_dim
    rate = 0.5 * ((loc**2).sum(axis=1) + trace)
    np.testing.assert_allclose(rate - found.latents.sum(axis=1), correlation, atol=1e-4)
    np.testing.assert_allclose(found.rate, rate, atol=0.2)
    np.testing.assert_allclose(found.latents, (loc**2 + variance - 1 - np.log(variance)) / 2, rtol=1e-9)


@pytest.mark.parametrize(("loc", "scale"), [(1.0, 1.0), (-2.0, 0.5), (0.0, 0.05), (2.5, 0.3), (-1.0, 1.5)])
def test_under_a_drawn_prior_it_is_the_integral_against_its_marginal(mixture, loc, scale):
    rows = np.full((1, 3), loc, np.float32), np.full((1, 3), scale, np.float32)
    expected = [integrated(j, loc, scale) for j in range(3)]
    np.testing.assert_allclose(divergences(*rows, mixture._scorer._marginals)[0], expected, atol=0.2)


def test_an_estimated_marginal_is_a_density_and_says_little_beyond_its_draws():
    draws = np.random.RandomState(0).standard_normal((4096, 1)).astype(np.float32)
    marginals, t = PriorMarginals(draws), np.linspace(-40, 40, 200_001)
    log_p = marginals.log_prob(0, t)
    assert np.exp(log_p).sum() * (t[1] - t[0]) == pytest.approx(1, abs=1e-3)
    near = np.abs(t) < 2
    np.testing.assert_allclose(log_p[near], -0.5 * t[near] ** 2 - 0.5 * np.log(2 * np.pi), atol=0.2)
    assert np.isfinite(marginals.log_prob(0, np.array([1e6])))
    far = np.array([-9.0, 12.0])
    wide = 2 * draws.astype(np.float64).std()
    expected = -0.5 * ((far - draws.mean()) / wide) ** 2 - np.log(wide * np.sqrt(2 * np.pi)) - np.log(4096)
    np.testing.assert_allclose(marginals.log_prob(0, far), expected, rtol=1e-6)


def test_draws_that_are_all_the_same_leave_numbers():
    assert np.isfinite(PriorMarginals(np.zeros((16, 2), np.float32)).log_prob(1, np.array([0.0, 1.0]))).all()


def test_rows_do_not_feel_each_other(model, mixture):
    for each, x in ((model, images(70, seed=5)), (mixture, draw(MIXTURE, 70, seed=5))):
        together = each.score(x, latents=True).latents
        for i in (0, 31, 32, 69):
            assert np.array_equal(each.score(x[i : i + 1], latents=True).latents[0], together[i])


def test_a_base_distribution_s_moments_are_not_taken_for_the_posterior_s(model):
    posterior = model.manifest.posterior.model_copy(update={"family": "planar", "moments": "base"})
    assert "base" in refusals(model.manifest.model_copy(update={"posterior": posterior}))["score.top_latents"]
    assert "score.top_latents" not in refusals(model.manifest)


def test_the_answer_names_the_largest_and_adds_up_to_the_rate(client, model):
    expected = model.score(X, latents=True).latents
    answer = post(client, top_latents=2).json()
    Scored.model_validate(answer)
    for row, nats in zip(answer["results"], expected, strict=True):
        latents = row["latents"]
        order = np.argsort(-nats)[:2]
        assert [each["index"] for each in latents["largest"]] == list(order)
        assert [each["nats"] for each in latents["largest"]] == list(nats[order])
        total = sum(each["nats"] for each in latents["largest"]) + latents["others"] + latents["joint"]
        assert total == pytest.approx(row["rate"], abs=1e-9)


def test_unasked_there_are_none_and_more_than_there_are_gives_all(client, model):
    assert all(row.get("latents") is None for row in post(client).json()["results"])
    row = post(client, top_latents=4096).json()["results"][0]["latents"]
    assert len(row["largest"]) == model.manifest.signature.latent_dim
    assert row["others"] == 0


def test_a_code_far_out_in_one_dimension_is_named(model, client, ppca):
    z = np.zeros((1, ppca.latent_dim), np.float32)
    z[0, 3] = 2.5
    x = np.clip(model.decode(z), 0, 1)
    assert post(client, x, top_latents=1).json()["results"][0]["latents"]["largest"][0]["index"] == 3


@pytest.mark.parametrize("count", [-1, 5000, "many"])
def test_a_bad_count_is_refused(client, count):
    assert_problem(post(client, top_latents=count), 422)


def test_their_count_is_limited(ppca_root):
    with serving(ppca_root, max_numbers_out=7) as client:
        assert "max_numbers_out" in assert_problem(post(client, top_latents=2), 422)["detail"]
        assert post(client, top_latents=1).status_code == 200


@pytest.mark.parametrize("name", ["pca", "whitening"])
def test_a_model_without_a_rate_refuses_with_the_reason(root, name):
    with serving(root) as client:
        x = np.zeros((1, *client.get(f"/v1/models/{name}").json()["shape"]), np.float32)
        reason = client.get(f"/v1/models/{name}").json()["refused"]["score.rate"]
        assert reason in assert_problem(post(client, x, name, top_latents=1), 409)["detail"]
        assert_problem(client.post(f"/v1/models/{name}/score", params={"top_latents": 1}, content=b""), 409)
