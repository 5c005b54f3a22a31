"""Several scores a request, verdicts at a false-discovery rate, scores that a model cannot have: over real HTTP."""

import json

import numpy as np
import pytest

from service.bundle.files import open_bundle
from service.calibration.false_discovery import q_values
from tests.ppca_bundle import images
from tests.service.fitted import N_CALIBRATION, write_fitted
from tests.service.http import assert_problem, npy, serving
from tests.service.linear_bundles import write_all

GOOD = images(6, seed=11)
BAD = np.random.RandomState(5).random_sample((3, *GOOD.shape[1:])).astype(np.float32)
X = np.concatenate([GOOD, BAD])


@pytest.fixture(scope="module")
def root(tmp_path_factory, ppca_path):
    root = tmp_path_factory.mktemp("repository")
    write_fitted(root, ppca_path)
    write_all(root)
    return root


@pytest.fixture(scope="module")
def client(root):
    with serving(root, default_model="ppca") as client:
        yield client


@pytest.fixture(scope="module")
def manifest(root):
    return open_bundle(root / "ppca" / "2").manifest


def post(client, x=X, model="ppca", **query):
    body = {"content": npy(x), "headers": {"content-type": "application/x-npy"}}
    return client.post(f"/v1/models/{model}/score", params=query, **body)


def test_the_default_score_is_the_combination_and_finds_the_outliers(client):
    answer = post(client).json()
    assert (answer["definition"]["name"], answer["definition"]["estimator"]) == ("combined", "combination")
    assert answer["definition"]["of"] == ["peak", "latent", "statistics", "complexity"]
    flagged = [result["is_anomaly"] for result in answer["results"]]
    assert flagged[len(GOOD) :] == [True] * len(BAD)
    assert sum(flagged[: len(GOOD)]) <= 1
    assert answer["calibration"]["n"] == N_CALIBRATION


def test_further_scores_are_what_each_gives_when_asked_alone(client, manifest):
    together = post(client, also="all").json()
    assert set(together["also"]) == set(manifest.scores)
    for name in manifest.scores:
        alone = post(client, score=name).json()
        assert together["also"][name]["definition"] == alone["definition"]
        assert together["also"][name]["calibration"] == alone["calibration"]
        for row, expected in zip(together["results"], alone["results"], strict=True):
            assert row["also"][name] == {key: expected[key] for key in row["also"][name]}


def test_a_row_alone_has_the_scores_that_it_has_among_others(client):
    together = post(client, also="all").json()["results"]
    for i in range(len(X)):
        assert post(client, X[i : i + 1], also="all").json()["results"] == [together[i]]


def test_without_further_scores_nothing_of_them_is_in_the_answer(client):
    answer = post(client).json()
    assert answer["also"] == {}
    assert all("also" not in result or result["also"] is None for result in answer["results"])


@pytest.mark.parametrize("names", ["combined,nonsense", "nonsense", ",", "elbo,,iwae", "ALL"])
def test_an_unknown_further_score_is_refused_with_the_known_ones(client, names):
    detail = assert_problem(post(client, also=names), 422)["detail"]
    assert "statistics" in detail


def test_all_among_names_is_all_of_them_and_an_unknown_name_beside_it_is_refused(client):
    assert post(client, also="all,elbo").json()["also"] == post(client, also="all").json()["also"]
    assert "nonsense" in assert_problem(post(client, also="nonsense, all"), 422)["detail"]


@pytest.mark.parametrize("beside", [{}, {"false_discovery_rate": 0.2}])
def test_both_rates_at_once_are_refused_wherever_they_stand(client, beside):
    """In the query, or one of them in the body."""
    if beside:
        response = client.post("/v1/models/ppca/score?false_positive_rate=0.2", json={"images": X.tolist(), **beside})
    else:
        response = post(client, false_positive_rate=0.2, false_discovery_rate=0.2)
    assert "one or the other" in assert_problem(response, 422)["detail"]


def test_a_false_discovery_rate_judges_the_batch_by_benjamini_hochberg(client):
    answer = post(client, false_discovery_rate=0.2).json()
    p = np.array([result["p_value"] for result in answer["results"]])
    q = [result["q_value"] for result in answer["results"]]
    np.testing.assert_array_equal(q, q_values(p))
    assert [result["is_anomaly"] for result in answer["results"]] == [value <= 0.2 for value in q]
    assert sum(value <= 0.2 for value in q) >= len(BAD)
    calibration = answer["calibration"]
    assert (calibration["false_discovery_rate"], calibration["false_positive_rate"]) == (0.2, None)
    assert calibration["threshold"] is None


def test_a_false_discovery_rate_that_a_single_anomaly_cannot_reach_says_so(client):
    verdict = post(client, false_discovery_rate=0.01).json()["verdict"]
    assert "at least 9 rows" in verdict, "9 of 9 rows with p = 1/100 have q = 0.01"


def test_without_a_false_discovery_rate_there_are_no_q_values(client):
    assert {result["q_value"] for result in post(client).json()["results"]} == {None}


def test_a_fitted_score_has_no_other_k_or_seed(client):
    for query in ({"k": 3}, {"seed": 8}):
        assert "fitted" in assert_problem(post(client, score="latent", **query), 422)["detail"]
    assert post(client, score="elbo", k=3).status_code == 200


@pytest.mark.parametrize(("model", "score"), [("pca", "elbo"), ("pca", "iwae"), ("whitening", "reconstruction")])
def test_a_score_that_a_model_cannot_have_is_a_conflict_not_an_unknown_name(client, model, score):
    x = np.zeros((1, *client.get(f"/v1/models/{model}").json()["shape"]), np.float32)
    assert "does not answer" in assert_problem(post(client, x, model, score=score), 409)["detail"]


def test_too_few_calibration_scores_for_the_usual_rate_give_scores_and_say_why_no_verdict(root):
    """Nobody asked for a rate: the scores are an answer. Who asks for one gets an error with the number needed."""
    with serving(root, default_model="ppca", false_positive_rate=0.001) as strict:
        answer = post(strict).json()
        assert {result["is_anomaly"] for result in answer["results"]} == {None}
        assert None not in {result["p_value"] for result in answer["results"]}
        assert "999" in answer["verdict"]
        assert answer["calibration"]["threshold"] is None
        assert "999" in assert_problem(post(strict, false_positive_rate=0.001), 422)["detail"]


def test_a_group_that_the_bundle_does_not_have_is_refused_with_those_it_has(client):
    assert "none" in assert_problem(post(client, group="left"), 422)["detail"]


def test_a_group_s_name_has_one_limit_however_its_accents_are_typed(client):
    """64 letters are a name, of which the calibration has none; 65 are none."""
    for letter in ("a", "é", "e\u0301"):
        assert "known groups" in assert_problem(post(client, group=64 * letter), 422)["detail"]
        assert "at most 64" in assert_problem(post(client, group=65 * letter), 422)["detail"]
        drift = client.get("/v1/models/ppca/drift", params={"group": 65 * letter})
        assert "at most 64" in assert_problem(drift, 422)["detail"]


def test_the_scores_are_documented(client, manifest):
    document = client.get("/openapi.json").json()
    text = json.dumps(document["components"]["schemas"]["ScoredRow"])
    assert "q_value" in text
    card = client.get("/v1/models/ppca").json()
    assert set(card["scores"]) == set(manifest.scores)
    assert all(score["description"] for name, score in card["scores"].items() if name not in ("elbo", "iwae"))
