"""The corruption graph, score and map by it: alone, in the combination, verified, calibrated, over tiles and HTTP."""

import io

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from service.api.schemas import Scored
from service.bundle.files import open_bundle
from service.bundle.manifest import Manifest, ScoreDefinition
from service.commands.calibration_data import ModelRows
from service.commands.cli import app
from service.commands.recalibration import RecalibrationPlan, recalibrate
from service.errors import BundleFormatError, BundleGraphError, BundleParityError, UnsupportedVerb
from service.formats.rendering import encode_heat_maps, encode_overlays
from service.formats.tiling import Stitcher
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.tiled import TiledModel, fit_tile_tails
from service.inference.verification import replay, verify_bundle
from service.pixels import unit_levels
from service.repository.presenting import MapDescription, describe_map
from service.scores.corruption import corruption_scores
from service.scores.fitting import COMBINED, PARTS, fitted_definitions
from tests.ppca_bundle import SHAPE, GraphBuilder, images, write_ppca_bundle
from tests.service import linear_bundles as linear
from tests.service.corruption_bundles import built, corruption_graph, log_odds, with_corruption, write_corruption
from tests.service.fitted import write_fitted
from tests.service.http import assert_problem, npy, serving
from tests.service.inference.test_verification import in_arrays, nudge
from tests.service.scores.test_forward_pass import NO_LIKELIHOOD, of_kind
from tests.tiled_bundle import STRIDE, TILE, crops, surface

X = images(7, seed=11)


def painted(x):
    """The images with a chequered corner of 4×4."""
    x = x.copy()
    x[:, :, :4, :4] = np.indices((4, 4)).sum(axis=0) % 2
    return x


def expected(t):
    """The score: the highest of all places."""
    return np.array([max(row.ravel().tolist()) for row in t])


def load(path):
    return Model.load(open_bundle(path), Runtime("cpu"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load(write_corruption(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """corrupted/2 with every score fitted, and ppca/1 without the graph."""
    root = tmp_path_factory.mktemp("fitted")
    draft, _ = write_ppca_bundle(root / ".draft", "corrupted", change=with_corruption)
    write_fitted(root, draft)
    write_ppca_bundle(root)
    return root


@pytest.fixture(scope="module")
def fitted(root):
    return load(root / "corrupted" / "2")


# The score.


def test_a_score_is_that_of_the_highest_place():
    t = np.random.RandomState(0).standard_normal((5, 9, 4)).astype(np.float32)
    found = corruption_scores(t)
    assert found.dtype == np.float64
    assert found.tolist() == expected(t).tolist()


def test_the_model_scores_by_its_graph_whatever_k_and_seed(plain):
    wanted = expected(log_odds(X))
    assert plain.corruption(X) == pytest.approx(wanted, abs=1e-4)
    for k, seed in ((1, 0), (5, 3)):
        scores = plain.score(X, ScoreDefinition(estimator="corruption", k=k, seed=seed))
        assert np.array_equal(scores.score, plain.corruption(X))
        assert np.isnan(scores.standard_error).all()
        assert np.isnan(scores.bits_per_dim).all()
    assert plain.corruption(painted(X)).min() > plain.corruption(X).max()


@pytest.mark.parametrize("shape", [SHAPE, (3, 19, 11)])
def test_rows_score_as_they_do_alone_bitwise(tmp_path, shape):
    model = load(write_corruption(tmp_path, shape=shape, latent_dim=2))
    x = images(35, shape, seed=1)
    alone = np.concatenate([model.score(x[i : i + 1], model.manifest.scores["corruption"]).score for i in range(35)])
    for size in (2, 9, 35):
        assert np.array_equal(model.score(x[:size], model.manifest.scores["corruption"]).score, alone[:size])


def runs(model, monkeypatch):
    """How many rows go through the graph, a number a call."""
    found, run = [], model._runners._corruption.run
    monkeypatch.setattr(model._runners._corruption, "run", lambda feeds: found.append(len(feeds["x"])) or run(feeds))
    return found


def test_the_graph_runs_once_for_all_scores_and_not_at_all_for_others(fitted, monkeypatch):
    found = runs(fitted, monkeypatch)
    fitted.score(X, fitted.manifest.scores["elbo"], also={"peak": fitted.manifest.scores["peak"]})
    assert found == []
    other = ScoreDefinition(estimator="corruption", k=2, seed=9)
    together = fitted.score(X, also=fitted.manifest.scores | {"other": other})
    assert found == [len(X)]
    assert np.array_equal(together.also["other"], together.also["corruption"])


def test_warming_up_runs_the_graph(plain, monkeypatch):
    found = runs(plain, monkeypatch)
    plain.warm_up()
    assert found == [1]
    assert plain.batch_sizes["corruption"][0] == 1


@pytest.mark.parametrize(("numerator", "message"), [("x", "nan for row 1"), (np.float32(1), "inf for row 1")])
def test_log_odds_that_are_no_numbers_are_the_graph_s_fault(tmp_path, numerator, message):
    g = GraphBuilder()
    g.add("Squeeze", g.add("Div", numerator, "x"), np.array([1]), output="log_odds")

    def change(_manifest, files):
        files["corruption.onnx"] = built(g)

    model = load(write_corruption(tmp_path, change))
    x = np.stack([np.full(SHAPE, 0.5), np.zeros(SHAPE)]).astype(np.float32)
    with pytest.raises(BundleGraphError, match=message):
        model.corruption(x)
    with pytest.raises(BundleGraphError, match=message):
        model.score(x, model.manifest.scores["corruption"])


def test_a_model_without_the_graph_refuses_the_score(model):
    definition = ScoreDefinition(estimator="corruption", k=1, seed=0)
    for score in (lambda: model.corruption(X), lambda: model.score(X, definition), lambda: mapped(model)):
        with pytest.raises(UnsupportedVerb, match="the bundle has no corruption graph"):
            score()
    assert "corruption" not in fitted_definitions(model.manifest)


# The map.


def mapped(model, x=X, **more):
    return model.score(x, maps=True, map_kind="corruption", **more)


def test_the_map_is_the_log_odds_whatever_is_scored_and_its_highest_place_the_score(fitted):
    found = mapped(fitted, painted(X), also={"corruption": fitted.manifest.scores["corruption"]})
    assert (found.map.dtype, found.map.shape) == (np.float32, (7, 8, 8))
    np.testing.assert_allclose(found.map, log_odds(painted(X)), atol=1e-4)
    assert found.also["corruption"].tolist() == expected(found.map).tolist()
    other = mapped(fitted, painted(X), definition=fitted.manifest.scores["elbo"])
    assert np.array_equal(other.map, found.map)
    assert np.array_equal(other.score, fitted.score(painted(X), fitted.manifest.scores["elbo"]).score)


def test_rows_are_mapped_as_they_are_alone_bitwise(tmp_path):
    model = load(write_corruption(tmp_path, shape=(3, 19, 11), latent_dim=2))
    x = images(35, (3, 19, 11), seed=1)
    alone = np.concatenate([mapped(model, x[i : i + 1]).map for i in range(35)])
    for size in (2, 9, 35):
        assert np.array_equal(mapped(model, x[:size]).map, alone[:size])


def test_score_and_map_are_of_one_run_of_the_graph(fitted, monkeypatch):
    found = runs(fitted, monkeypatch)
    mapped(fitted, also=fitted.manifest.scores)
    assert found == [len(X)]
    mapped(fitted, definition=fitted.manifest.scores["elbo"])
    assert found == [len(X)] * 2


def test_the_default_map_stays_what_it_is_without_the_graph(fitted, plain):
    assert (fitted.default_map, plain.default_map) == ("anomaly", "distortion")
    assert not np.array_equal(fitted.score(X, maps=True).map, mapped(fitted).map)


def test_it_needs_no_log_p_x_by_place(tmp_path):
    """As an image flow, whose log p(x) does not come apart."""

    def whole(manifest, _files):
        manifest["likelihood"]["pixelwise"] = False

    model = load(write_corruption(tmp_path, whole))
    np.testing.assert_allclose(mapped(model).map, log_odds(X), atol=1e-4)
    with pytest.raises(UnsupportedVerb, match="come apart"):
        model.score(X, maps=True, map_kind="distortion")


# With fitted scores.


def test_the_combination_is_of_five_where_there_is_the_graph(fitted, model):
    combined = fitted.manifest.scores[COMBINED]
    assert combined.of == list(PARTS) == ["peak", "latent", "statistics", "complexity", "corruption"]
    assert fitted_definitions(model.manifest)[COMBINED].of == list(PARTS[:4])
    also = fitted.score(painted(X), also=fitted.manifest.scores).also
    parts = [also[name] for name in combined.of]
    assert np.array_equal(also[COMBINED], fitted.detectors[COMBINED].score(parts))
    without = fitted.detectors[COMBINED].score([*parts[:4], np.full(len(X), -100.0)])
    assert (also[COMBINED] > without + 1).all(), "painted places count"


def test_an_autoencoder_has_it_too(fitted):
    definitions = fitted_definitions(of_kind(fitted.manifest, **NO_LIKELIHOOD))
    assert definitions["corruption"].unit == "nats"
    assert definitions[COMBINED].of == ["peak", "latent", "statistics", "corruption"]


def test_calibrating_keeps_the_graph_and_fits_the_combination_anew(root, fitted, tmp_path):
    rows = np.rint(images(300, seed=21)[..., ::-1] * 255).astype(np.uint8)
    outcome = recalibrate(fitted.bundle, ModelRows(rows, unit_levels), None, tmp_path, RecalibrationPlan())
    again = load(outcome.path)
    assert again.bundle.graph("corruption") == fitted.bundle.graph("corruption")
    assert again.manifest.scores == fitted.manifest.scores
    old, new = (each.detectors[COMBINED].arrays for each in (fitted, again))
    assert any(not np.array_equal(old[name], new[name]) for name in old)
    assert {COMBINED, "corruption"} <= set(again.manifest.calibration.quantiles)


# Tiles.


def stitched(plan, maps):
    stitcher = Stitcher(plan)
    stitcher.add(maps)
    return stitcher.stitched()


def test_tiles_are_scored_by_it_under_both_aggregates(tmp_path):
    for aggregate in ("top", "maximum"):

        def tiled(manifest, _files, aggregate=aggregate):
            manifest["preprocessing"]["tiling"] = {"stride": [STRIDE, STRIDE], "aggregate": aggregate, "share": 0.05}

        path = write_corruption(tmp_path / aggregate, tiled, name="weave", shape=(1, TILE, TILE), training=crops(5, 1))
        model = load(path)
        tails = fit_tile_tails({"corruption": model.corruption(crops(5, 2))}) if aggregate == "maximum" else {}
        definition = model.manifest.scores["corruption"]
        flawed = surface(64, 48, 7)
        flawed[:, 20:30, 20:30] = np.random.RandomState(0).randint(0, 256, (1, 10, 10))
        found = TiledModel(model, tails).score([surface(64, 48, 7), flawed], definition)
        assert found.score[1] > found.score[0]
        plan = TiledModel(model, tails).plan(flawed)
        cut = unit_levels(plan.cut(flawed, 0, len(plan)))
        tiles = model.corruption(cut)
        assert found.tiles[1].worst_score == tiles.max()
        shown = mapped(TiledModel(model, tails), [flawed], definition=definition).map[0]
        assert np.array_equal(shown, stitched(plan, model.log_odds(cut)))
        assert shown.argmax() // 48 in range(18, 32)
        if aggregate == "top":
            assert found.score[1] == np.sort(tiles)[::-1][: round(0.05 * len(tiles))].mean()


# What is refused.


def test_a_sound_bundle_is_verified_and_its_graph_replayed(plain):
    report = verify_bundle(plain.bundle.path)
    assert report.ok, report
    assert 0 < replay(plain)["corruption.log_odds"] < 1e-5


def other_weights(_manifest, files):
    g = GraphBuilder()
    g.add("Squeeze", g.add("Abs", "x"), np.array([1]), output="log_odds")
    files["corruption.onnx"] = built(g)


def wrong_shape(_manifest, files):
    g = GraphBuilder()
    g.add("Identity", "x", output="log_odds")
    files["corruption.onnx"] = built(g)


def of_other_pixels(_manifest, files):
    files["corruption.onnx"] = corruption_graph((1, 8, 9))


def of_other_channels(_manifest, files):
    files["corruption.onnx"] = corruption_graph((2, 8, 8))


def untold(manifest, _files):
    del manifest["reference"]["tolerances"]["corruption.log_odds"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (other_weights, BundleParityError, "corruption.log_odds differs by"),
        (in_arrays("reference.npz", nudge("corruption.log_odds", 1e-3)), BundleParityError, "corruption.log_odds"),
        (in_arrays("reference.npz", lambda a: a.pop("corruption.log_odds")), BundleFormatError, "lacks"),
        (untold, BundleFormatError, r"tolerances lacks \['corruption.log_odds'\]"),
        (wrong_shape, BundleGraphError, "log_odds"),
        (of_other_pixels, BundleGraphError, "the manifest's signature wants"),
        (of_other_channels, BundleGraphError, "corruption's x is"),
    ],
)
def test_a_changed_graph_or_reference_is_refused(tmp_path, change, error, message):
    report = verify_bundle(write_corruption(tmp_path, change))
    assert not report.ok
    with pytest.raises(error, match=message):
        report.raise_if_failed()


def without_graph(manifest, files):
    del manifest["graphs"]["corruption"], files["corruption.onnx"]


def in_bits(manifest, _files):
    manifest["scores"]["corruption"]["unit"] = "bits"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_graph, r"scores\.corruption is by corruption, of which graphs has none"),
        (in_bits, r"scores\.corruption is in 'bits', of log odds nats expected"),
    ],
)
def test_a_score_that_contradicts_its_bundle_is_refused_in_words(tmp_path, change, message):
    with pytest.raises(BundleFormatError, match=message):
        write_corruption(tmp_path, change)


@pytest.mark.parametrize(
    ("write", "whose"), [(linear.write_table, "vectors"), (linear.write_mixture, "signals")], ids=["table", "signals"]
)
def test_the_graph_is_of_images_alone(tmp_path, write, whose):
    graphs = open_bundle(write(tmp_path / "sound")).manifest.graphs
    with pytest.raises(
        BundleFormatError, match=f"graphs has a corruption, which is of images: this model is of {whose}"
    ):
        write(tmp_path, graphs={**graphs, "corruption": "encoder.onnx"})


def test_the_graph_never_stands_behind_a_backbone(plain):
    document = plain.manifest.model_dump(mode="json")
    document["graphs"]["backbone"] = "decoder.onnx"
    with pytest.raises(ValueError, match="this model is of a backbone's features"):
        Manifest.model_validate(document | {"backbone": {"kind": "map", "natural": [1, 8, 8]}})


# HTTP.


@pytest.fixture(scope="module")
def client(root):
    with serving(root, default_model="corrupted") as client:
        yield client


def post(client, model="corrupted", accept="application/json", **query):
    body = {"content": npy(painted(X)), "headers": {"content-type": "application/x-npy", "accept": accept}}
    return client.post(f"/v1/models/{model}/score", params=query, **body)


def test_it_is_asked_for_by_name_and_beside_another(client, fitted):
    alone = post(client, score="corruption").json()
    assert alone["definition"]["unit"] == "nats"
    wanted = fitted.corruption(painted(X))
    assert [row["score"] for row in alone["results"]] == wanted.tolist()
    assert all(row["p_value"] == 0.01 and row["is_anomaly"] for row in alone["results"])
    assert {row["standard_error"] for row in alone["results"]} == {None}
    beside = post(client, also="corruption").json()
    assert beside["definition"]["of"] == list(PARTS)
    assert [row["also"]["corruption"]["score"] for row in beside["results"]] == wanted.tolist()


def test_a_bundle_without_the_graph_answers_409_and_says_why(client):
    for query in ({"score": "corruption"}, {"also": "corruption"}, {"map": True, "map_kind": "corruption"}):
        assert "has no corruption graph" in assert_problem(post(client, "ppca", **query), 409)["detail"]
    refused = client.get("/v1/models/ppca").json()["refused"]
    assert refused["score.map.corruption"] == refused["score.corruption"]
    assert (
        not {"score.corruption", "score.map.corruption"} & client.get("/v1/models/corrupted").json()["refused"].keys()
    )


SHOWN = {"map": True, "map_kind": "corruption"}


def test_the_map_is_answered_as_json_and_as_npy(client, fitted):
    wanted, answer = mapped(fitted, painted(X)).map, post(client, **SHOWN).json()
    Scored.model_validate(answer)
    assert answer["map"] == {"kind": "corruption", "unit": "nats", "low": -5.0, "high": 5.0}
    assert np.array_equal(np.float32([row["map"] for row in answer["results"]]), wanted)
    found = np.load(io.BytesIO(post(client, accept="application/x-npy", **SHOWN).content))
    assert found.dtype == np.float32
    assert np.array_equal(found, wanted)


def test_its_colours_are_fixed_at_odds(client, fitted):
    heat, overlay = (post(client, accept="image/png", map_picture=each, **SHOWN) for each in ("heat-map", "overlay"))
    told = {"minimum": "-5.0", "maximum": "5.0", "kind": "corruption", "unit": "nats", "scale": "fixed"}
    assert Image.open(io.BytesIO(heat.content)).text == told
    maps, further = mapped(fitted, painted(X)).map, {name: told[name] for name in ("kind", "unit", "scale")}
    assert heat.content == encode_heat_maps(maps, (-5.0, 5.0), further)
    assert overlay.content == encode_overlays(painted(X), maps, (-5.0, 5.0), further)


def test_an_offline_picture_is_the_service_s(client, root, tmp_path):
    Image.fromarray(np.rint(painted(X)[0, 0] * 255).astype(np.uint8)).save(tmp_path / "0.png")
    options = ("--model", "corrupted", "--repository", root, "--maps", tmp_path / "maps", "--map-kind", "corruption")
    done = CliRunner().invoke(app, ["score", *map(str, (tmp_path / "0.png", *options))])
    assert done.exit_code == 0, done.output
    headers = {"content-type": "image/png", "accept": "image/png"}
    content = (tmp_path / "0.png").read_bytes()
    answer = client.post("/v1/models/corrupted/score", content=content, headers=headers, params=SHOWN)
    assert (tmp_path / "maps/0.png").read_bytes() == answer.content


def test_an_uncalibrated_bundle_has_the_same_colours(plain):
    assert describe_map(plain, "corruption") == MapDescription("corruption", "nats", (-5, 5), "fixed")
    assert describe_map(plain, None).origin == "of these maps"


def test_the_map_s_pass_counts_as_work(root):
    with serving(root, default_model="corrupted", max_evaluated_pixels=7 * 64 * 3) as client:
        assert post(client, score="elbo", k=2, **SHOWN).status_code == 200
        assert "max_evaluated_pixels" in assert_problem(post(client, score="elbo", k=3, **SHOWN), 422)["detail"]
