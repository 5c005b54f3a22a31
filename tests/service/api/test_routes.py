"""Every verb over real HTTP, in every format, against the closed form."""

from __future__ import annotations

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from service.bundle.files import open_bundle
from tests.ppca_bundle import LATENT_DIM, SHAPE, images
from tests.service.http import assert_problem, npy, serving

NPY, JSON = "application/x-npy", "application/json"


PLAIN = {"unit": "nats", "of": [], "method": None}


@pytest.fixture(scope="module")
def client(ppca_root):
    with serving(ppca_root) as client:
        yield client


def from_npy(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == NPY
    return np.load(io.BytesIO(response.content), allow_pickle=False)


def encoded(pixels: np.ndarray, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[0]).save(buffer, form, **options)
    return buffer.getvalue()


def post(client: httpx.Client, verb: str, array: np.ndarray, accept: str = JSON, /, **query) -> httpx.Response:
    headers = {"content-type": NPY, "accept": accept}
    return client.post(f"/v1/models/ppca/{verb}", content=npy(array), headers=headers, params=query)


X = images(5, seed=11)
PIXELS = np.round(X * 255).astype(np.uint8)


def bodies() -> dict[str, tuple[dict, int]]:
    """Requests that carry the same pixels, and how many of the images each carries."""
    pngs = [encoded(image, "PNG") for image in PIXELS]
    webp = encoded(PIXELS[0], "WEBP", lossless=True)
    text = {"content-type": JSON}
    return {
        "npy uint8": ({"content": npy(PIXELS), "headers": {"content-type": NPY}}, 5),
        "npy float32": ({"content": npy(X), "headers": {"content-type": NPY}}, 5),
        "npy float64": ({"content": npy(PIXELS / 255.0), "headers": {"content-type": NPY}}, 5),
        "npy without the channel": ({"content": npy(PIXELS[:, 0]), "headers": {"content-type": NPY}}, 5),
        "npy of one image": ({"content": npy(PIXELS[0, 0]), "headers": {"content-type": NPY}}, 1),
        "npy Fortran order": ({"content": npy(np.asfortranarray(PIXELS)), "headers": {"content-type": NPY}}, 5),
        "json nested lists": ({"content": json.dumps({"images": X.tolist()}), "headers": text}, 5),
        "json base64": (
            {"content": json.dumps({"images": [base64.b64encode(p).decode() for p in pngs]}), "headers": text},
            5,
        ),
        "multipart": ({"files": [("images", (f"{i}.png", p, "image/png")) for i, p in enumerate(pngs)]}, 5),
        "png": ({"content": pngs[0], "headers": {"content-type": "image/png"}}, 1),
        "webp": ({"content": webp, "headers": {"content-type": "image/webp"}}, 1),
        "octet-stream": ({"content": PIXELS.tobytes(), "headers": {"content-type": "application/octet-stream"}}, 5),
    }


@pytest.mark.parametrize("name", bodies())
@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score"])
def test_every_input_format_gives_equal_answers(client, model, verb, name):
    request, n = bodies()[name]
    answer = client.post(f"/v1/{verb}", **request)
    assert answer.status_code == 200, answer.text
    expected = post(client, verb, X[:n]).json()
    assert answer.json() == expected
    if verb == "encode":
        np.testing.assert_array_equal(np.float32(answer.json()["loc"]), model.encode(X[:n]).loc)


def test_jpeg_equals_the_pixels_it_decodes_to(client):
    jpeg = encoded(PIXELS[0], "JPEG", quality=95)
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)))
    answer = client.post("/v1/score", content=jpeg, headers={"content-type": "image/jpeg"})
    assert answer.json() == post(client, "score", pixels).json()


def test_the_three_addresses_of_a_model_answer_alike(client):
    answers = [
        client.post(path, content=npy(X), headers={"content-type": NPY})
        for path in ("/v1/score", "/v1/models/ppca/score", "/v1/models/ppca/versions/1/score")
    ]
    assert len({answer.content for answer in answers}) == 1
    assert answers[0].json()["model"]["name"] == "ppca"


@pytest.mark.parametrize("estimator", ["elbo", "iwae"])
@pytest.mark.parametrize("k", [1, 7, 64])
@pytest.mark.parametrize("seed", [0, 1, 123456, 2**32 - 1])
def test_score_is_the_closed_form_log_likelihood(client, ppca, estimator, k, seed):
    expected = ppca.log_likelihood(X)
    results = post(client, "score", X, estimator=estimator, k=k, seed=seed).json()["results"]
    for result, log_p_x in zip(results, expected, strict=True):
        assert result["score"] == pytest.approx(-log_p_x, abs=1e-4)
        assert result["log_likelihood"] == pytest.approx(log_p_x, abs=1e-4)
        assert result["elbo"] == pytest.approx(log_p_x, abs=1e-4)
        assert result["rate"] + result["distortion"] == pytest.approx(-log_p_x, abs=1e-4)
        assert result["k"] == k
        assert (result["standard_error"] is None) == (k == 1)


@pytest.mark.parametrize("verb", ["encode", "reconstruct", "score"])
def test_rows_together_are_bitwise_the_single_calls(client, verb):
    together = post(client, verb, X).json()
    for field in {"encode": ["loc", "scale"], "reconstruct": ["images"], "score": ["results"]}[verb]:
        single = [post(client, verb, X[i : i + 1]).json()[field][0] for i in range(len(X))]
        assert together[field] == single


def test_verdicts_follow_the_calibration(client, ppca_path):
    calibration = np.load(ppca_path / "calibration.npz")["elbo"]
    noise = np.random.RandomState(0).random_sample(X.shape).astype(np.float32)
    answer = post(client, "score", np.concatenate([X, noise]), false_positive_rate=0.1).json()
    n = len(calibration)
    for i, result in enumerate(answer["results"]):
        p_value = (1 + (calibration >= result["score"]).sum()) / (n + 1)
        assert result["p_value"] == p_value
        assert result["is_anomaly"] is bool(p_value <= 0.1)
        assert result["is_anomaly"] is bool(result["score"] >= answer["calibration"]["threshold"])
        if i >= len(X):
            assert result["is_anomaly"] is True
    assert answer["calibration"]["n"] == n
    assert answer["calibration"]["smallest_p_value"] == 1 / (n + 1)
    assert answer["calibration"]["false_positive_rate"] == 0.1
    assert answer["verdict"] is None
    assert answer["definition"] == {"name": "elbo", "estimator": "elbo", "k": 4, "seed": 0, **PLAIN}


@pytest.mark.parametrize("query", [{"k": 5}, {"seed": 3}, {"estimator": "iwae"}])
def test_an_uncalibrated_estimator_scores_without_a_verdict_and_says_so(client, query):
    answer = post(client, "score", X, **query).json()
    assert all(result["p_value"] is None and result["is_anomaly"] is None for result in answer["results"])
    assert all(result["score"] is not None for result in answer["results"])
    assert "not calibrated" in answer["verdict"]
    assert answer["calibration"] is None
    assert answer["definition"]["name"] is None


def test_another_defined_score_has_its_own_calibration(client):
    by_name = post(client, "score", X, score="iwae").json()
    assert by_name["definition"] == {"name": "iwae", "estimator": "iwae", "k": 16, "seed": 1, **PLAIN}
    assert by_name["results"][0]["p_value"] is not None
    assert (
        post(client, "score", X, estimator="iwae", k=16, seed=1).content
        == post(client, "score", X, score="iwae").content
    )


def test_a_rate_that_the_calibration_cannot_answer_is_refused_with_the_number_needed(client):
    problem = assert_problem(post(client, "score", X, false_positive_rate=0.001), 422)
    assert "999" in problem["detail"]


def test_the_map_sums_to_the_distortion(client, model):
    answer = post(client, "score", X, map=True).json()
    maps = from_npy(post(client, "score", X, NPY, map=True))
    assert maps.shape == (5, 8, 8)
    np.testing.assert_array_equal(maps, model.score(X, maps=True).map)
    for result, single in zip(answer["results"], maps, strict=True):
        np.testing.assert_array_equal(np.float32(result["map"]), single)
        assert single.sum(dtype=np.float64) == pytest.approx(result["distortion"], rel=1e-5)
    assert_image(post(client, "score", X, "image/png", map=True), "PNG")


def test_scores_as_npy(client, model):
    np.testing.assert_array_equal(from_npy(post(client, "score", X, NPY)), model.score(X).score)


def assert_image(response: httpx.Response, form: str, frames: int = 1) -> Image.Image:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == f"image/{form.lower()}"
    image = Image.open(io.BytesIO(response.content))
    assert image.format == form
    assert getattr(image, "n_frames", 1) == frames
    return image


def test_decode_in_every_format(client, model):
    z = np.random.RandomState(1).standard_normal((4, LATENT_DIM)).astype(np.float32)
    expected = model.decode(z)
    np.testing.assert_array_equal(from_npy(post(client, "decode", z, NPY)), expected)
    np.testing.assert_array_equal(np.float32(post(client, "decode", z).json()["images"]), expected)
    by_json = client.post("/v1/decode", json={"latents": z.tolist()}, headers={"accept": NPY})
    np.testing.assert_array_equal(from_npy(by_json), expected)
    single = from_npy(post(client, "decode", z[0], NPY))
    np.testing.assert_array_equal(single, expected[:1])
    image = assert_image(post(client, "decode", z[0], "image/png"), "PNG")
    np.testing.assert_array_equal(np.asarray(image), np.round(np.clip(expected[0, 0], 0, 1) * 255))
    assert_image(post(client, "decode", z, "image/png"), "PNG")


def test_decode_draws_with_the_seed(client, model):
    z = np.zeros((2, LATENT_DIM), np.float32)
    draws = from_npy(post(client, "decode", z, NPY, draw=True, seed=5))
    np.testing.assert_array_equal(draws, model.observe(z, 5))
    assert np.abs(draws - model.decode(z)).max() > 0.01


def test_encode_returns_seeded_samples(client, model):
    answer = post(client, "encode", X, samples=3, seed=9).json()
    expected = model.encode(X, 3, 9)
    np.testing.assert_array_equal(np.float32(answer["samples"]), expected.samples)
    np.testing.assert_array_equal(np.float32(answer["scale"]), expected.scale)
    np.testing.assert_array_equal(
        from_npy(post(client, "encode", X, NPY, samples=3, seed=9, array="samples")), expected.samples
    )
    assert "samples" not in post(client, "encode", X).json()


@pytest.mark.parametrize("accept", [JSON, NPY, "image/png"])
@pytest.mark.parametrize("draw", [False, True])
def test_sample_same_seed_same_bytes(client, accept, draw):
    def ask(**query):
        return client.get("/v1/sample", params={"n": 4, "draw": draw, **query}, headers={"accept": accept}).content

    assert ask(seed=7) == ask(seed=7)
    assert ask(seed=7) != ask(seed=8)
    assert ask(seed=7) != ask(seed=7, temperature=0.5)


def test_sample_by_get_by_query_and_by_body_are_one(client, model):
    by_get = client.get("/v1/models/ppca/sample", params={"n": 3, "seed": 2, "temperature": 0.7})
    by_body = client.post("/v1/sample", json={"n": 3, "seed": 2, "temperature": 0.7})
    by_both = client.post("/v1/sample", params={"n": 3}, json={"seed": 2, "temperature": 0.7})
    by_query = client.post("/v1/sample", params={"n": 3, "seed": 2, "temperature": 0.7})
    assert by_get.content == by_body.content == by_both.content == by_query.content
    latents = np.float32(by_get.json()["latents"])
    np.testing.assert_array_equal(latents, model.sample_latents(3, 2, 0.7))
    np.testing.assert_array_equal(np.float32(by_get.json()["images"]), model.decode(latents))


def test_draws_of_one_sample_differ_in_their_noise(client):
    answer = client.get("/v1/sample", params={"n": 2, "temperature": 0, "draw": True}, headers={"accept": NPY})
    first, second = from_npy(answer)
    assert np.abs(first - second).max() > 0.01


@pytest.mark.parametrize("mode", ["lerp", "slerp"])
def test_interpolate_between_images_and_between_latents(client, model, mode):
    loc = model.encode(X[:2]).loc
    path = model.interpolate(loc[0], loc[1], 6, mode)
    by_images = post(client, "interpolate", X[:2], steps=6, mode=mode)
    by_latents = post(client, "interpolate", loc, steps=6, mode=mode)
    by_json = client.post("/v1/interpolate", json={"latents": loc.tolist(), "steps": 6, "mode": mode})
    assert by_images.content == by_latents.content == by_json.content
    np.testing.assert_array_equal(np.float32(by_images.json()["latents"]), path)
    np.testing.assert_array_equal(
        from_npy(post(client, "interpolate", loc, NPY, steps=6, mode=mode)), model.decode(path)
    )


@pytest.mark.parametrize(("form", "frames"), [("PNG", 1), ("GIF", 6), ("WEBP", 6)])
def test_interpolate_as_pictures(client, form, frames):
    first = post(client, "interpolate", X[:2], f"image/{form.lower()}", steps=6)
    assert_image(first, form, frames)
    assert first.content == post(client, "interpolate", X[:2], f"image/{form.lower()}", steps=6).content


TWO_IMAGES, TWO_LATENTS = X[:2].tolist(), np.eye(2, LATENT_DIM).tolist()


@pytest.mark.parametrize(
    ("verb", "body", "words"),
    [
        *[
            (verb, {"images": TWO_IMAGES, "latents": TWO_LATENTS}, '"latents" is not read here: expected images')
            for verb in ("encode", "reconstruct", "score")
        ],
        ("decode", {"latents": TWO_LATENTS, "images": TWO_IMAGES}, '"images" is not read here: expected latents'),
        ("decode", {"latents": TWO_LATENTS, "dtype": "uint8"}, '"dtype" is not read here: expected latents'),
        ("sample", {"n": 2, "images": TWO_IMAGES}, '"images" is not read here: expected parameters alone'),
        ("interpolate", {"latents": TWO_LATENTS, "images": TWO_IMAGES}, '"images" beside "latents"'),
        ("interpolate", {"latents": TWO_LATENTS, "dtype": "uint8"}, '"dtype" beside "latents"'),
    ],
)
def test_data_that_a_verb_does_not_read_is_refused(client, verb, body, words):
    assert words in assert_problem(client.post(f"/v1/{verb}", json=body), 422)["detail"]


def test_the_standard_error_is_that_of_the_score_as_documented(client):
    fields = client.get("/openapi.json").json()["components"]["schemas"]["ScoredRow"]["properties"]
    assert "standard error of score" in fields["standard_error"]["description"]


def test_strict_is_about_the_size_alone_as_documented(client):
    colour, buffer = Image.fromarray(np.repeat(PIXELS[0, 0][..., None], 3, 2)), io.BytesIO()
    colour.save(buffer, "PNG")
    headers = {"content-type": "image/png"}
    answer = client.post("/v1/encode", params={"strict": True}, content=buffer.getvalue(), headers=headers)
    assert answer.json() == post(client, "encode", PIXELS[:1]).json()
    parameters = client.get("/openapi.json").json()["paths"]["/v1/encode"]["post"]["parameters"]
    strict = next(parameter for parameter in parameters if parameter["name"] == "strict")
    assert "mode" not in strict["description"] + strict["schema"].get("description", "")


def test_an_image_of_another_size_follows_the_rule_or_is_refused_when_strict(client):
    large = Image.new("RGB", (40, 20), (200, 10, 10))
    buffer = io.BytesIO()
    large.save(buffer, "PNG")
    request = {"content": buffer.getvalue(), "headers": {"content-type": "image/png"}}
    assert client.post("/v1/encode", **request).status_code == 200
    assert "8" in assert_problem(client.post("/v1/encode", params={"strict": True}, **request), 422)["detail"]


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", JSON),
        ("", JSON),
        ("image/*", "image/png"),
        ("text/html, application/x-npy;q=0.5, */*;q=0.1", NPY),
        ("application/json;q=0, application/x-npy", NPY),
        ("application/json;q=0.2, image/png;q=0.9", "image/png"),
    ],
)
def test_accept_chooses_the_answer(client, accept, expected):
    answer = client.get("/v1/sample", headers={"accept": accept})
    assert answer.headers["content-type"] == expected


def test_unknown_models_and_versions_are_404_and_never_another(client):
    for path in ("/v1/models/other/score", "/v1/models/ppca/versions/2/score", "/v1/models/PPCA/score"):
        assert_problem(client.post(path, content=npy(X), headers={"content-type": NPY}), 404)
    assert "ppca" in assert_problem(client.get("/v1/models/other"), 404)["detail"]


def test_a_model_tells_what_it_is(client, ppca_path):
    listed = client.get("/v1/models").json()
    assert listed["default_model"] == "ppca"
    assert [(m["name"], m["versions"], m["default"]) for m in listed["models"]] == [("ppca", ["1"], True)]
    card = client.get("/v1/models/ppca").json()
    manifest = json.loads((ppca_path / "manifest.json").read_text())
    assert card["signature"]["shape"] == list(SHAPE)
    assert card["signature"] == {"dither": False, **manifest["signature"]}
    assert card["calibration"]["n"] == 199
    assert card["digest"] == open_bundle(ppca_path).digest
    assert card["metrics"] == {"test": {"elbo": 1.0}}
    assert client.get("/v1/models/ppca/versions/1").json() == card
