"""Whole images for a model of tiles: over HTTP in every format, refused where they should be, and offline."""

import base64
import io
import json
import zlib

import numpy as np
import pytest
from PIL import Image

from service.api.schemas import Scored
from service.commands.offline_scoring import BadFile, fields_of, open_sink, score_files
from service.formats.images import ImageLimits
from service.pixels import unit_levels
from service.repository.model_repository import load_bundle
from service.repository.score_parameters import ScoreParameters
from tests.service.http import assert_problem, npy, serving
from tests.tiled_bundle import TILE, surface, with_scratch, write_tiled_bundle

LIMITS = ImageLimits(2**24, 2**24)
PNG, NPY, JSON = "image/png", "application/x-npy", "application/json"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    write_tiled_bundle(root)
    return root


@pytest.fixture(scope="module")
def served(root, runtime):
    return load_bundle(root / "weave" / "1", runtime)


@pytest.fixture(scope="module")
def client(root):
    limits = {"max_evaluated_pixels": 900_000, "max_image_pixels": 2**16, "max_batch_pixels": 2**17}
    with serving(root, max_numbers_out=2**14, max_numbers_in=2**17, **limits) as client:
        yield client


def png(image, mode="L"):
    buffer = io.BytesIO()
    Image.fromarray(image[0]).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def post(client, body, kind=PNG, verb="score", accept=JSON, **query):
    headers = {"content-type": kind, "accept": accept}
    return client.post(f"/v1/models/weave/{verb}", content=body, headers=headers, params=query)


def test_an_answer_tells_score_p_value_tiles_and_where_the_worst_is(client, served):
    image, _ = with_scratch(surface(82, 120, 1), 40, 70)
    answer = post(client, png(image), also="all", map="true").json()
    Scored.model_validate(answer)
    (row,) = answer["results"]
    expected = served.tiled.score([image], maps=True, also=served.manifest.scores)
    tiles = expected.tiles[0]
    assert row["score"] == expected.score[0]
    assert row["p_value"] == 1 / 40
    assert row["is_anomaly"] is True
    assert row["standard_error"] is None
    assert row["tiles"] == {
        "n": tiles.n,
        "worst_y": tiles.worst_y,
        "worst_x": tiles.worst_x,
        "worst_score": tiles.worst_score,
    }
    assert tiles.n == len(served.tiled.plan(image)) == 10 * 14
    assert {name: each["score"] for name, each in row["also"].items()} == {
        name: scores[0] for name, scores in expected.also.items()
    }
    np.testing.assert_array_equal(np.float32(row["map"]), expected.map[0])


def test_every_format_gives_the_same_score(client):
    image = surface(50, 61, 2)
    expected = post(client, png(image)).json()["results"][0]
    text = base64.b64encode(png(image)).decode()
    bodies = [
        (npy(image), NPY),
        (npy(image[0]), NPY),
        (npy(unit_levels(image)), NPY),
        (json.dumps({"images": text}), JSON),
        (json.dumps({"images": [f"data:image/png;base64,{text}"]}), JSON),
        (json.dumps({"images": image.tolist(), "dtype": "uint8"}), JSON),
        (png(image, "RGB"), PNG),
    ]
    for body, kind in bodies:
        assert post(client, body, kind).json()["results"] == [expected]
    form = client.post("/v1/models/weave/score", files=[("images", ("a.png", png(image), PNG))])
    assert form.json()["results"] == [expected]


def test_images_of_different_sizes_go_together_in_json(client):
    images = [surface(40, 40, 3), surface(33, 64, 4)]
    alone = [post(client, png(image), map="true").json()["results"][0] for image in images]
    files = [("images", (f"{index}.png", png(image), PNG)) for index, image in enumerate(images)]
    together = client.post("/v1/models/weave/score", files=files, params={"map": "true"})
    assert together.json()["results"] == alone
    lists = json.dumps({"images": [image[0].tolist() for image in images], "dtype": "uint8"})
    assert post(client, lists, JSON, map="true").json()["results"] == alone
    refused = client.post("/v1/models/weave/score", files=files, params={"map": "true"}, headers={"accept": NPY})
    assert "(33, 64) and of (40, 40)" in assert_problem(refused, 422)["detail"]


def test_the_map_is_as_large_as_the_image_in_npy_and_png(client, served):
    image = surface(40, 71, 5)
    found = np.load(io.BytesIO(post(client, png(image), accept=NPY, map="true").content))
    assert found.shape == (1, 40, 71)
    assert np.array_equal(found[0], served.tiled.score([image], maps=True).map[0])
    picture = Image.open(io.BytesIO(post(client, png(image), accept=PNG, map="true").content))
    assert picture.size == (71, 40)


@pytest.mark.parametrize("size", [(1, 1), (TILE - 1, 100), (100, TILE - 1), (1, 200)])
def test_an_image_smaller_than_a_tile_is_refused_with_both_sizes(client, size):
    image = surface(*size, 6)
    for body, kind in ((png(image), PNG), (npy(image), NPY)):
        detail = assert_problem(post(client, body, kind), 422)["detail"]
        assert f"{size[1]}×{size[0]}" in detail
        assert f"{TILE}×{TILE}" in detail


def test_a_small_image_among_large_ones_is_named(client):
    files = [("images", (name, png(surface(*size, 7)), PNG)) for name, size in (("a", (40, 40)), ("b", (8, 40)))]
    assert "image 1: " in assert_problem(client.post("/v1/models/weave/score", files=files), 422)["detail"]


def bomb(side):
    """A PNG of side×side zeros, a few bytes of it."""
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def test_limits_stay(client):
    """Pixels by the header, of all images together, arrays, tiles, and maps: each names its setting."""
    two = [("images", (name, bomb(255), PNG)) for name in "abc"]
    found = [
        (post(client, bomb(2000)), 413, "65536 pixels"),
        (client.post("/v1/models/weave/score", files=two), 413, "max_batch_pixels"),
        (post(client, npy(np.zeros((400, 400), np.uint8)), NPY), 413, "max_numbers_in"),
        (post(client, bomb(250)), 422, "max_evaluated_pixels"),
        (post(client, bomb(130), map="true"), 422, "max_numbers_out"),
    ]
    for response, status, says in found:
        assert says in assert_problem(response, status)["detail"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", PNG, 422),
        (bytes(TILE * TILE), "application/octet-stream", 415),
        (b"\x89PNG\r\n\x1a\n" + zlib.compress(bytes(99)), PNG, 422),
        (npy(np.zeros((20, 20, 3), np.uint8)), NPY, 422),
        (npy(np.full((20, 20), 1.5, np.float32)), NPY, 422),
        (npy(np.full((20, 20), np.nan, np.float32)), NPY, 422),
        (npy(np.zeros((0, 20, 20), np.uint8)), NPY, 422),
        (b'{"images": []}', JSON, 422),
        (b'{"images": [[[0.5], [1]], 3]}', JSON, 422),
        (b'{"images": ["AAAA"]}', JSON, 422),
        (b'{"pictures": []}', JSON, 422),
        (b'{"images": [[[0]]], "dtype": "int8"}', JSON, 422),
    ],
)
def test_hostile_bodies_are_refused(client, body, kind, status):
    assert_problem(post(client, body, kind), status)


def test_a_score_without_a_tail_is_refused_and_says_which_have_one(client):
    assert "elbo, iwae" in assert_problem(post(client, png(surface(16, 16, 0)), k=3), 422)["detail"]


@pytest.mark.parametrize("verb", ["encode", "reconstruct"])
def test_other_verbs_answer_a_tile_and_never_resize(client, verb):
    assert post(client, png(surface(TILE, TILE, 8)), verb=verb).status_code == 200
    for body, kind in ((png(surface(40, 40, 8)), PNG), (npy(surface(40, 40, 8)), NPY)):
        assert "only score takes larger images" in assert_problem(post(client, body, kind, verb), 422)["detail"]


def test_the_card_of_the_model_tells_the_tiling(client):
    rule = client.get("/v1/models/weave").json()["preprocessing"]
    assert rule["tiling"] == {"stride": [8, 8], "aggregate": "maximum", "share": 0.05}


def test_offline_scores_are_the_services_and_small_files_are_named(client, served, tmp_path):
    images = [surface(40, 52, 9), surface(64, 33, 10), surface(10, 90, 11)]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(png(image))
    *scored, bad = score_files(served, paths, ScoreParameters(), 0.1, LIMITS)
    assert isinstance(bad, BadFile)
    assert "90×10" in bad.reason
    for row, image in zip(scored, images, strict=False):
        (answer,) = post(client, png(image), false_positive_rate=0.1).json()["results"]
        assert (row["score"], row["p_value"], row["is_anomaly"]) == (
            answer["score"],
            answer["p_value"],
            answer["is_anomaly"],
        )
        found = answer["tiles"]
        assert (row["tiles"], row["worst_y"], row["worst_x"]) == (found["n"], found["worst_y"], found["worst_x"])
    fields = fields_of(served.manifest.preprocessing)
    for name in ("a.csv", "a.parquet"):
        with open_sink(tmp_path / name, io.StringIO(), fields) as write:
            write(scored[0])
