"""Vectors and signals over real HTTP: every input format, every verb's answer or refusal, hostile bodies."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from service.bundle.files import open_bundle
from service.bundle.manifest import ScoreDefinition
from service.commands.cli import app
from service.errors import InvalidInput, UnsupportedVerb
from service.inference import noise
from service.inference.model import Model
from tests.hostile import table_payloads
from tests.service import linear_bundles as linear
from tests.service.http import assert_problem, npy, serving

NPY, JSON, CSV = "application/x-npy", "application/json", "text/csv"
MODELS = {"table": linear.TABLE, "mixture": linear.MIXTURE, "pca": linear.PCA, "whitening": linear.WHITENING}
NATURAL = {"table": (4,), "mixture": (2, 6), "pca": (5,), "whitening": (3,)}
VERBS = {"encode": ["loc", "scale"], "reconstruct": ["rows"], "score": ["results"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return linear.write_all(tmp_path_factory.mktemp("linear"))


@pytest.fixture(scope="module")
def client(root):
    with serving(root, default_model="table") as client:
        yield client


@pytest.fixture(scope="module")
def models(root, runtime):
    return {name: Model.load(open_bundle(root / name / "1"), runtime) for name in MODELS}


def x_of(name: str, n: int = 5) -> np.ndarray:
    """Rows as graphs see them, float32 [n,C,H,W]."""
    return linear.draw(MODELS[name], n, seed=11)


def rows_of(name: str, n: int = 5) -> np.ndarray:
    """The same rows in their natural shape."""
    return x_of(name, n).reshape(n, *NATURAL[name])


def post(client, name: str, verb: str, array: np.ndarray, accept: str = JSON, /, **query):
    headers = {"content-type": NPY, "accept": accept}
    return client.post(f"/v1/models/{name}/{verb}", content=npy(array), headers=headers, params=query)


def from_npy(response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.load(io.BytesIO(response.content), allow_pickle=False)


def written(rows: np.ndarray, header: list[str] | None = None, line_end: str = "\r\n") -> str:
    """Rows as CSV, with every digit that float32 has."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator=line_end)
    if header:
        writer.writerow(header)
    writer.writerows([[f"{value:.9g}" for value in row] for row in rows])
    return stream.getvalue()


def bodies() -> dict[str, tuple[str, str | bytes]]:
    """The table's five rows in every format."""
    rows = rows_of("table")
    names, back = linear.FEATURES, [3, 1, 0, 2]
    objects = [{names[i]: float(row[i]) for i in back} for row in rows]
    return {
        "json lists": (JSON, json.dumps({"rows": rows.tolist()})),
        "json objects in another order": (JSON, json.dumps({"rows": objects})),
        "npy float64": (NPY, npy(rows.astype(np.float64))),
        "npy Fortran order": (NPY, npy(np.asfortranarray(rows))),
        "csv": (CSV, written(rows)),
        "csv with a charset": ("Text/CSV; charset=utf-8", written(rows)),
        "csv with a header": (CSV, written(rows, names)),
        "csv with columns in another order": (CSV, written(rows[:, back], [names[i] for i in back])),
        "csv as spreadsheets write it": (CSV, ("\ufeff" + written(rows, names)).encode()),
        "csv with lone line feeds and blank lines at the end": (CSV, written(rows, names, "\n") + "\n\n"),
        "csv with spaces": (CSV, written(rows, names).replace(",", ", ").replace("mass,  dry", "mass, dry")),
    }


@pytest.mark.parametrize("name", bodies())
@pytest.mark.parametrize("verb", VERBS)
def test_every_format_of_a_table_gives_equal_answers(client, verb, name):
    kind, body = bodies()[name]
    answer = client.post(f"/v1/{verb}", content=body, headers={"content-type": kind})
    assert answer.status_code == 200, answer.text
    assert answer.json() == post(client, "table", verb, rows_of("table")).json()


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("table", rows_of("table")[0]),
        ("mixture", rows_of("mixture")[0]),
        ("mixture", rows_of("mixture")[:1]),
        ("whitening", rows_of("whitening")[:1]),
    ],
)
def test_a_single_row_needs_no_axis_of_rows(client, name, array):
    row = rows_of(name)[:1]
    assert post(client, name, "score", array).json() == post(client, name, "score", row).json()
    by_json = client.post(f"/v1/models/{name}/score", json={"rows": array.tolist()})
    assert by_json.json() == post(client, name, "score", row).json()


def test_a_signal_s_line_of_csv_is_channel_after_channel(client):
    rows = rows_of("mixture")
    body = written(rows.reshape(5, -1))
    answer = client.post("/v1/models/mixture/score", content=body, headers={"content-type": CSV})
    assert answer.json() == post(client, "mixture", "score", rows).json()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("verb", VERBS)
def test_rows_together_are_bitwise_the_single_calls(client, name, verb):
    rows = rows_of(name, 9)
    together = post(client, name, verb, rows).json()
    for field in VERBS[verb]:
        assert together[field] == [post(client, name, verb, row[None]).json()[field][0] for row in rows]


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


@pytest.mark.parametrize("accept", ["image/png", "image/gif", "image/*"])
@pytest.mark.parametrize("verb", ["reconstruct", "interpolate"])
def test_numbers_that_are_no_image_make_no_picture(client, verb, accept):
    problem = assert_problem(post(client, "table", verb, rows_of("table")[:2], accept), 406)
    assert "application/json, application/x-npy" in problem["detail"]


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x", "application/octet-stream", ""])
def test_a_body_of_images_is_415_with_what_is_read(client, kind):
    answer = client.post("/v1/score", content=b"body", headers={"content-type": kind} if kind else {})
    detail = assert_problem(answer, 415)["detail"]
    assert "vectors of 4 numbers ('length', 'mass, dry', 'ratio' and 1 more)" in detail
    assert "text/csv" in detail


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        (CSV, "1,2,3,4\n1,nan,3,4", "row 1, 'mass, dry': a finite float32 number expected"),
        (CSV, "1,2,3,4\n1,x,3,4", "row 1, 'mass, dry': 'x', a number expected"),
        (CSV, "1,2,3,4\n\n1,2,3,4", "row 1 has 0 values: 4 expected, separated by commas"),
        (CSV, "1;2;3;4", "the CSV's header: unknown '1;2;3;4'"),
        (CSV, "length,ratio,count\n1,2,3", "the CSV's header: missing 'mass, dry'"),
        (CSV, 'length,ratio,count,"mass, dry",ratio', "the CSV's header holds 'ratio' more than once"),
        (
            CSV,
            "length,width,ratio,count",
            "unknown 'width'; the features are 'length', 'mass, dry', 'ratio' and 1 more",
        ),
        (JSON, '{"rows": [[1,2,3,4],[1,2,3]]}', "row 1 has shape (3,): (4,) expected"),
        (JSON, '{"rows": [[1,2,3,4],[1,2,3,null]]}', "row 1: numbers in nested lists expected"),
        (JSON, '{"rows": [[1,2,3,4],[1,2,3,1e39]]}', "row 1, 'count': a finite float32 number expected"),
        (JSON, '{"rows": [{"length": 1}]}', "row 0: missing 'mass, dry', 'ratio', 'count'"),
        (JSON, '{"images": [[1,2,3,4]]}', '"images" is not read here: expected rows'),
        (NPY, npy(np.zeros((2, 5))), "rows have shape (2, 5): (N, 4) expected, vectors of 4 numbers"),
    ],
)
def test_an_error_names_the_row_and_the_feature(client, kind, body, words):
    answer = client.post("/v1/score", content=body, headers={"content-type": kind})
    assert words in assert_problem(answer, 422)["detail"]


def test_without_names_a_header_or_an_object_is_refused(client):
    for kind, body in ((CSV, "a,b,c,d,e\n1,2,3,4,5"), (JSON, '{"rows": [{"a": 1}]}')):
        answer = client.post("/v1/models/pca/score", content=body, headers={"content-type": kind})
        assert "no names" in assert_problem(answer, 422)["detail"]


PAYLOADS = table_payloads(linear.FEATURES)


@pytest.mark.parametrize("payload", PAYLOADS, ids=[f"{payload.verb}: {payload.name}" for payload in PAYLOADS])
def test_hostile_rows_are_refused(client, payload):
    headers = {"content-type": payload.content_type} if payload.content_type else {}
    response = client.post(f"/v1/models/table/{payload.verb}", content=payload.body, headers=headers)
    assert_problem(response)
    assert response.elapsed.total_seconds() < 1
    assert len(response.text) < 5000


def test_the_limits_of_a_request_hold_for_rows(root):
    rows = rows_of("table", 9)
    with serving(root, default_model="table", max_batch=8, max_numbers_in=20) as client:
        for n, status, setting in ((5, 200, ""), (8, 413, "max_numbers_in"), (9, 422, "max_batch")):
            for kind, body in ((NPY, npy(rows[:n])), (CSV, written(rows[:n]))):
                answer = client.post("/v1/score", content=body, headers={"content-type": kind})
                assert answer.status_code == status
                assert setting in answer.text
        assert "over 8 rows" in answer.text, "a table is read no further than its limit"


# Offline.


@pytest.mark.parametrize("suffix", ["csv", "npy"])
def test_vaeserve_score_reads_tables(client, root, tmp_path, suffix):
    rows = rows_of("table", 70)
    good, bad = tmp_path / f"good.{suffix}", tmp_path / "bad.csv"
    good.write_bytes(npy(rows) if suffix == "npy" else written(rows, linear.FEATURES).encode())
    bad.write_text("1,2,3,4\n1,2,3\n")
    arguments = ["score", str(tmp_path), "--model", "table", "--repository", str(root)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 3
    assert "bad.csv: row 1 has 3 values" in " ".join(done.stderr.split())
    assert "70 scored, 1 skipped" in done.stderr
    table = list(csv.DictReader(io.StringIO(done.stdout)))
    results = post(client, "table", "score", rows).json()["results"]
    assert [row["row"] for row in table] == [str(index) for index in range(70)]
    assert [row["score"] for row in table] == [str(result["score"]) for result in results]
    assert [row["p_value"] for row in table] == [str(result["p_value"]) for result in results]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("pca", ["--estimator", "elbo"], "no likelihood"),
        ("table", ["--estimator", "mse"], "estimator: Input should be"),
    ],
)
def test_vaeserve_score_refuses_in_one_line(root, tmp_path, name, arguments, words):
    (tmp_path / "rows.csv").write_text(written(rows_of(name)))
    done = CliRunner().invoke(app, ["score", str(tmp_path), "--model", name, "--repository", str(root), *arguments])
    assert done.exit_code == 1
    assert words in done.stderr


def test_vaeserve_score_says_which_files_it_looks_for(root, tmp_path):
    done = CliRunner().invoke(app, ["score", str(tmp_path), "--model", "pca", "--repository", str(root)])
    assert done.exit_code == 1
    assert "no CSV or npy file found there" in done.stderr
