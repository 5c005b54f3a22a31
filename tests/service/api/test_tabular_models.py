"""Models of vectors and signals over real HTTP: each verb's answer against its closed form, or its refusal."""

from __future__ import annotations

import numpy as np
import pytest

from service.bundle.files import open_bundle
from service.bundle.manifest import ScoreDefinition
from service.errors import InvalidInput, UnsupportedVerb
from service.inference import noise
from service.inference.model import Model
from tests.service import linear_bundles as linear
from tests.service.http import assert_problem, serving
from tests.service.tabular import MODELS, NATURAL, NPY, from_npy, post, rows_of, x_of


@pytest.fixture(scope="module")
def client(linear_root):
    with serving(linear_root, default_model="table") as client:
        yield client


@pytest.fixture(scope="module")
def models(linear_root, runtime):
    return {name: Model.load(open_bundle(linear_root / name / "1"), runtime) for name in MODELS}


# Scores against closed forms.


@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_exact_evidence_is_the_closed_form(client, estimator, k):
    for name, expected in {
        "table": linear.TABLE.log_likelihood(x_of("table")),
        "whitening": linear.log_normal(
            rows_of("whitening") - linear.WHITENING.mean, linear.WHITENING.weight @ linear.WHITENING.weight.T
        ),
    }.items():
        results = post(client, name, "score", rows_of(name), estimator=estimator, k=k, seed=9).json()["results"]
        for result, log_p_x in zip(results, expected, strict=True):
            estimates = [-result["score"], result["elbo"], result["log_likelihood"]]
            assert estimates == pytest.approx([log_p_x] * 3, abs=1e-4)
            assert result["bits_per_dim"] is None
            if name == "table":
                assert result["rate"] + result["distortion"] == pytest.approx(-log_p_x, abs=1e-4)
            else:
                assert result["rate"] is result["distortion"] is None


def test_a_bound_under_a_mixture_prior_is_the_closed_form_at_the_seed_s_latents(client):
    """log w at z = loc + R ε for the frozen noise ε of the seed, in float64; and it bounds log p(x)."""
    model, x, k = linear.MIXTURE, x_of("mixture"), 5
    gain, cholesky = model.posterior()
    for row, result in enumerate(post(client, "mixture", "score", rows_of("mixture"), k=k, seed=3).json()["results"]):
        centred = x[row].ravel() - model.mean
        z = gain @ centred + noise.posterior_noise(3, k, 3) @ cholesky.T
        log_q = linear.log_normal(z - gain @ centred, cholesky @ cholesky.T)
        log_p_x = linear.log_normal(centred - z @ model.weight.T, np.diag(model.scale**2))
        log_w = log_p_x + model.log_p_z(z) - log_q
        assert result["elbo"] == pytest.approx(log_w.mean(), abs=1e-4)
        assert result["rate"] == pytest.approx((log_q - model.log_p_z(z)).mean(), abs=1e-4)
        assert result["distortion"] == pytest.approx(-log_p_x.mean(), abs=1e-4)
    results = post(client, "mixture", "score", rows_of("mixture"), estimator="iwae", k=4000).json()["results"]
    bounds = np.array([result["log_likelihood"] for result in results])
    errors = np.array([result["standard_error"] for result in results])
    assert (np.abs(bounds - model.log_likelihood(x)) < 5 * errors + 1e-3).all()


def test_a_model_without_a_likelihood_scores_by_its_reconstruction_error(client):
    model, rows = linear.PCA, rows_of("pca")
    centred = rows - model.mean
    errors = (centred - centred @ np.linalg.pinv(model.weight).T @ model.weight.T) ** 2
    answer = post(client, "pca", "score", rows, map=True).json()
    assert answer["definition"] == {
        "name": "error",
        "estimator": "reconstruction",
        "k": 1,
        "seed": 0,
        "unit": "squared error",
        "method": None,
        "of": [],
    }
    for result, error in zip(answer["results"], errors, strict=True):
        assert result["score"] == result["distortion"] == pytest.approx(error.sum(), abs=1e-4)
        assert result["map"] == pytest.approx(error, abs=1e-4)
        for absent in ("elbo", "log_likelihood", "bits_per_dim", "rate", "standard_error"):
            assert result[absent] is None
    np.testing.assert_allclose(from_npy(post(client, "pca", "score", rows, NPY, map=True)), errors, atol=1e-4)


def test_reconstruction_scores_a_model_with_a_likelihood_too(client):
    rows = rows_of("table")
    by_name = post(client, "table", "score", rows, estimator="reconstruction", k=3, seed=0).json()
    elbo = post(client, "table", "score", rows, estimator="elbo", k=3, seed=0).json()
    for result, other in zip(by_name["results"], elbo["results"], strict=True):
        assert result["score"] == result["distortion"] == other["distortion"]
        assert (result["elbo"], result["rate"]) == (other["elbo"], other["rate"])
    assert by_name["definition"]["unit"] == "nats"


def test_a_table_s_verdicts_follow_its_calibration(client):
    far = rows_of("table") + 100 * linear.UNITS.astype(np.float32)
    answer = post(client, "table", "score", np.concatenate([rows_of("table"), far])).json()
    assert [result["is_anomaly"] for result in answer["results"][5:]] == [True] * 5
    assert answer["results"][5]["p_value"] == 0.01
    assert not all(result["is_anomaly"] for result in answer["results"][:5])


# The other verbs.


@pytest.mark.parametrize("name", MODELS)
def test_answers_have_the_natural_shape(client, models, name):
    rows, natural, model = rows_of(name), NATURAL[name], models[name]
    latents = model.encode(x_of(name)).loc
    for verb, body, decoded in (
        ("reconstruct", rows, model.reconstruct(x_of(name))),
        ("decode", latents, model.decode(latents)),
    ):
        expected = decoded.reshape(5, *natural)
        np.testing.assert_array_equal(from_npy(post(client, name, verb, body, NPY)), expected)
        np.testing.assert_array_equal(np.float32(post(client, name, verb, body).json()["rows"]), expected)
    path = post(client, name, "interpolate", rows[:2], steps=4).json()
    assert np.shape(path["rows"]) == (4, *natural)
    np.testing.assert_array_equal(np.float32(path["latents"])[[0, -1]], latents[:2])
    by_latents = client.post(f"/v1/models/{name}/interpolate", json={"latents": latents[:2].tolist(), "steps": 4})
    assert by_latents.json() == path


def test_reconstruct_and_whiten_are_the_closed_form(client):
    model, rows = linear.WHITENING, rows_of("whitening")
    np.testing.assert_allclose(from_npy(post(client, "whitening", "reconstruct", rows, NPY)), rows, atol=1e-5)
    encoded = post(client, "whitening", "encode", rows).json()
    np.testing.assert_allclose(encoded["loc"], np.linalg.solve(model.weight, (rows - model.mean).T).T, atol=1e-4)
    assert not np.any(encoded["scale"])


def test_npy_that_could_be_rows_or_latents_is_rows(client):
    """Both are [2,3] in a bijection: latents then go as JSON."""
    rows = rows_of("whitening")[:2]
    by_rows = post(client, "whitening", "interpolate", rows).json()
    assert by_rows == client.post("/v1/models/whitening/interpolate", json={"rows": rows.tolist()}).json()


def test_a_prior_s_graph_draws_from_its_mixture(client):
    (share, _), locs, scales = linear.MIXTURE.components
    answer = client.get("/v1/models/mixture/sample", params={"n": 200, "seed": 5, "temperature": 0.5}).json()
    first = noise.prior_choice(5, 200) < share
    drawn = np.float32(0.5) * noise.prior_noise(5, 200, 3)
    expected = np.where(first[:, None], locs[0] + scales[0] * drawn, locs[1] + scales[1] * drawn)
    np.testing.assert_allclose(answer["latents"], expected, atol=1e-6)
    assert 0.2 < first.mean() < 0.4
    assert np.shape(answer["rows"]) == (200, 2, 6)
    cold = client.get("/v1/models/mixture/sample", params={"n": 50, "temperature": 0}).json()["latents"]
    assert set(map(tuple, cold)) == {tuple(loc) for loc in locs}, "temperature scales the noise, never the choice"


def test_draws_of_the_prior_do_not_depend_on_their_number(models):
    together = models["mixture"].sample_latents(33, seed=4)
    for n in (1, 2, 7, 32):
        assert together[:n].tobytes() == models["mixture"].sample_latents(n, seed=4).tobytes()
    np.testing.assert_array_equal(noise.prior_choice(4, 100)[:7], noise.prior_choice(4, 7))


def test_draws_of_the_prior_do_not_depend_on_those_beside_them(models):
    """As requests with other seeds and temperatures are computed together."""
    model, draws = models["mixture"], [(2, 4, 1.0), (1, 5, 0.5), (3, 4, 2.0)]
    together = model.latents_of(np.concatenate([model.prior_noise(*draw) for draw in draws]))
    assert together.tobytes() == b"".join(model.sample_latents(*draw).tobytes() for draw in draws)


def test_a_draw_of_x_is_in_raw_units(client):
    answer = client.get("/v1/models/table/sample", params={"n": 200, "draw": True}, headers={"accept": NPY})
    drawn, spread = from_npy(answer), np.sqrt((linear.TABLE.weight**2).sum(axis=1) + linear.TABLE.scale**2)
    assert drawn.shape == (200, 4)
    np.testing.assert_allclose(drawn.mean(axis=0), linear.TABLE.mean, atol=5 * spread.max() / np.sqrt(200))
    np.testing.assert_allclose(drawn.std(axis=0), spread, rtol=0.25)


# Refusals.


REFUSED = {
    "table": {"score.map.anomaly", "score.map.corruption", "score.corruption"},
    "mixture": {"score.map.anomaly", "score.map.corruption", "score.corruption"},
    "pca": {
        "sample",
        "encode.samples",
        "score.elbo",
        "score.iwae",
        "score.rate",
        "score.top_latents",
        "score.map.anomaly",
        "score.map.corruption",
        "score.corruption",
        "decode.draw",
        "interpolate.draw",
        "sample.draw",
    },
    "whitening": {
        "encode.samples",
        "score.map",
        "score.map.anomaly",
        "score.map.corruption",
        "score.corruption",
        "score.rate",
        "score.top_latents",
        "score.reconstruction",
        "decode.draw",
        "interpolate.draw",
        "sample.draw",
    },
}
ASKS = {
    "sample": {},
    "encode.samples": {"samples": 2},
    "score.elbo": {"estimator": "elbo"},
    "score.iwae": {"estimator": "iwae"},
    "score.reconstruction": {"estimator": "reconstruction"},
    "score.corruption": {"score": "corruption"},
    "score.map": {"map": True},
    "score.map.corruption": {"map": True, "map_kind": "corruption"},
    "score.top_latents": {"top_latents": 2},
    "decode.draw": {"draw": True},
    "interpolate.draw": {"draw": True},
    "sample.draw": {"draw": True},
}


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_says_it_cannot_answer_is_409_with_the_reason_and_the_rest_is_answered(client, name, ask):
    refused = client.get(f"/v1/models/{name}").json()["refused"]
    assert refused.keys() == REFUSED[name]
    verb = ask.partition(".")[0]
    if verb == "sample":
        answer = client.get(f"/v1/models/{name}/sample", params=ASKS[ask])
    elif verb == "decode":
        body = np.zeros((2, MODELS[name].weight.shape[1]), np.float32)
        answer = post(client, name, verb, body, **ASKS[ask])
    else:
        answer = post(client, name, verb, rows_of(name)[:2], **ASKS[ask])
    reason = refused.get(verb) or refused.get(ask)
    if reason is None:
        assert answer.status_code == 200, answer.text
    else:
        assert reason in assert_problem(answer, 409)["detail"]


def test_a_model_tells_its_kind_evidence_prior_and_posterior(client):
    listed = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    summaries = {name: (model["kind"], model["shape"], model["evidence"]) for name, model in listed.items()}
    assert summaries == {
        "table": ("vector", [4], "exact"),
        "mixture": ("signal", [2, 6], "bound"),
        "pca": ("vector", [5], "none"),
        "whitening": ("vector", [3], "exact"),
    }
    assert listed["mixture"]["prior"] == {"family": "mixture", "noise_dim": 3, "choice": True}
    assert listed["pca"]["posterior"] == {"family": "point", "moments": "point"}
    card = client.get("/v1/models/table").json()
    assert card["preprocessing"]["features"] == linear.FEATURES
    assert card["refused"] == listed["table"]["refused"]
    assert card["refused"].keys() == REFUSED["table"]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("pca", lambda model, x: model.sample_latents(1)),
        ("pca", lambda model, x: model.observe(np.zeros((1, 2), np.float32))),
        ("pca", lambda model, x: model.encode(x, samples=1)),
        ("pca", lambda model, x: model.score(x, ScoreDefinition(estimator="elbo", k=1, seed=0))),
        ("whitening", lambda model, x: model.score(x, maps=True)),
    ],
)
def test_the_model_itself_refuses_what_it_does_not_have(models, name, call):
    with pytest.raises(UnsupportedVerb, match=f"{name} does not answer"):
        call(models[name], x_of(name))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_the_model_itself_takes_any_finite_number_and_no_other(models, value):
    x = x_of("table").astype(np.float64)
    assert np.isfinite(models["table"].score(x * -1000).score).all()
    x[3, 0, 0, 1] = value
    with pytest.raises(InvalidInput, match="x, row 3: expected finite float32 numbers"):
        models["table"].encode(x)
