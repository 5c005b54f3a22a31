"""Anomaly maps: numbers against scipy's, rows that do not feel each other, defects found, arrays checked; over HTTP."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

from service.api.schemas import Scored
from service.bundle.files import open_bundle
from service.bundle.manifest import DETECTORS
from service.commands.cli import app
from service.commands.offline_scoring import plan_pictures
from service.errors import BundleFormatError, InvalidInput, UnsupportedVerb
from service.formats.rendering import encode_heat_maps, encode_overlays
from service.inference.model import Model
from service.inference.tiled import TiledModel
from service.pixels import unit_levels
from service.scores.detectors import detector_arrays
from service.scores.fitting import fit_map
from service.scores.maps.anomaly_map import (
    LAST_COLOUR,
    PASSES,
    QUANTILES,
    SIGMA,
    UNIT,
    AnomalyMap,
    MapInputs,
    MapParameters,
    load_map,
    map_arrays,
)
from service.scores.maps.averages import LONGEST_PRODUCT, smoothed
from service.scores.maps.textures import NARROW, WIDE, ExpectedEnergy
from tests.ppca_bundle import images, write_ppca_bundle
from tests.service.fitted import N_FIT, write_fitted
from tests.service.fitted_bundles import npz, rewrite
from tests.service.http import assert_problem, npy, serving
from tests.service.linear_bundles import TABLE, UNITS, draw, write_all
from tests.tiled_bundle import crops, surface, with_scratch, write_tiled_bundle

X = images(5, seed=31)
LARGE = (1, 16, 16)
JSON, NPY, PNG = "application/json", "application/x-npy", "image/png"


def loaded_map(bundle):
    return load_map(bundle.manifest, detector_arrays(bundle))


@pytest.fixture(scope="module")
def root(tmp_path_factory, ppca_path, runtime):
    """ppca/2 has a map, weave/2 of tiles too; plain/1 and the linear models have none."""
    root = tmp_path_factory.mktemp("repository")
    write_fitted(root, ppca_path)
    rewrite(open_bundle(ppca_path), root, {"name": "plain"}, {})
    write_all(root)
    cpu = Model.load(open_bundle(write_tiled_bundle(root)), runtime)
    arrays = map_arrays(fit_map(cpu, crops(10, seed=2)))
    rewrite(cpu.bundle, root, {"version": "2"}, {DETECTORS: npz(arrays)})
    return root


@pytest.fixture(scope="module")
def fitted(root, runtime):
    return Model.load(open_bundle(root / "ppca" / "2"), runtime)


@pytest.fixture(scope="module")
def tiled(root, runtime):
    return TiledModel(Model.load(open_bundle(root / "weave" / "2"), runtime))


@pytest.fixture(scope="module")
def client(root):
    with serving(root, default_model="ppca") as client:
        yield client


def post(client, x=X, model="ppca", accept=JSON, **query):
    headers = {"content-type": NPY, "accept": accept}
    return client.post(f"/v1/models/{model}/score", content=npy(x), headers=headers, params=query)


def with_spot(x, y, column):
    """The images with a spot of 3×3 pixels, black on what is light there and white on what is dark."""
    spotted = x.copy()
    below = x[:, :, y : y + 3, column : column + 3]
    spotted[:, :, y : y + 3, column : column + 3] = below.mean(axis=(1, 2, 3), keepdims=True) < 0.5
    return spotted


@pytest.mark.parametrize("sigma", [0.8, SIGMA, 4.0])
@pytest.mark.parametrize("shape", [(8, 8), (3, 40, 33), (12, 1), (1, LONGEST_PRODUCT + 1)])
def test_averages_are_scipys(sigma, shape):
    values = np.random.RandomState(0).standard_normal(shape)
    radius = int(np.ceil(3 * sigma))
    axes = [sigma if at >= len(shape) - 2 and shape[at] > 1 else 0 for at in range(len(shape))]
    expected = gaussian_filter(values, axes, mode="reflect", radius=[radius if s else 0 for s in axes])
    np.testing.assert_allclose(smoothed(values, sigma), expected, atol=1e-12)


def test_without_a_sigma_values_stay_as_they_are():
    values = np.random.RandomState(0).standard_normal((1, 5))
    assert smoothed(values, 0.0) is values


def test_the_map_is_the_two_tails_joined(fitted):
    """By the formulas of the module, with scipy's filter, of a model that sees nothing but a fixed mean."""
    found, arrays = fitted.anomaly_map, fitted.anomaly_map.parameters.arrays
    random = np.random.RandomState(1)
    x, mean, distortion = (random.random_sample((2, 1, 8, 8)).astype(np.float32) for _ in range(3))
    inputs = MapInputs(x, mean, distortion)
    values = found.values(inputs)

    def blurred(a, wider=1.0):
        sigma = SIGMA * wider
        return gaussian_filter(a, sigma, mode="reflect", radius=int(np.ceil(3 * sigma)))

    tails = found.parameters.tails
    unit = np.sqrt((arrays["scale"].astype(float) ** 2).mean())
    for i in range(2):
        e = (x[i, 0].astype(float) - mean[i, 0] - arrays["mean"][0]) / arrays["scale"][0]
        energy = np.log(blurred(blurred(e) ** 2) + 1e-6)
        u = x[i, 0].astype(float) / unit
        slope = (np.abs(np.diff(u, axis=0, append=u[-1:])) + np.abs(np.diff(u, axis=1, append=u[:, -1:]))) / 2
        texture = [
            np.log(blurred(slope, WIDE) + 0.1),
            np.log(blurred((u - blurred(u, NARROW)) ** 2, WIDE) + 0.01),
            blurred(mean[i, 0].astype(float) / unit, WIDE),
            np.full((8, 8), np.log(slope.mean() + 0.1)),
        ]
        low, high = arrays["texture.low"], arrays["texture.high"]
        t = np.clip((np.stack(texture, axis=-1) - low) / (high - low), 0, 1)
        line, width = (arrays[f"texture.{name}"] for name in ("energy", "spread"))
        quadratic = [weights[0] + t @ weights[1:5] + t**2 @ weights[5:] for weights in (line, width)]
        excess = (energy - quadratic[0]) / np.maximum(quadratic[1], arrays["texture.least"])
        joined = tails[0].surprisal(excess) + tails[1].surprisal(blurred(distortion[i, 0].astype(float)))
        expected = (joined - arrays["location"]) / arrays["deviation"]
        np.testing.assert_allclose(values[i], expected, rtol=1e-5, atol=1e-5)
        highest = np.sort(expected.ravel())[-2:]  # 2.5% of 64 places
        assert found.peaks(inputs)[i] == pytest.approx(highest.mean(), rel=1e-5)


def test_the_peak_of_a_map_is_a_score(fitted):
    spotted = with_spot(X, 2, 3)
    peaks = fitted.score(spotted, fitted.manifest.scores["peak"]).score
    highest = np.sort(fitted.score(spotted, maps=True).map.reshape(len(X), -1), axis=1)[:, -2:]
    np.testing.assert_allclose(peaks, highest.mean(axis=1), rtol=1e-4)
    assert (peaks > fitted.score(X, fitted.manifest.scores["peak"]).score).mean() > 0.7


def test_a_score_peak_without_a_map_is_refused(fitted, tmp_path):
    arrays = {key: value for key, value in fitted.bundle.arrays(DETECTORS).items() if not key.startswith("@map")}
    path = rewrite(fitted.bundle, tmp_path, {}, {DETECTORS: npz(arrays)})
    with pytest.raises(BundleFormatError, match="peak"):
        loaded_map(open_bundle(path))


def test_rows_are_independent_bitwise(fitted):
    x = with_spot(images(70, seed=3), 1, 1)
    together = fitted.score(x, maps=True).map
    for i in (0, 31, 32, 69):
        assert np.array_equal(fitted.score(x[i : i + 1], maps=True).map[0], together[i])
    assert np.array_equal(fitted.score(x[::-1], maps=True).map[::-1], together)


def test_no_k_and_no_seed_moves_it(fitted):
    definition = fitted.manifest.scores["elbo"].model_copy(update={"k": 7, "seed": 9})
    assert np.array_equal(fitted.score(X, definition, maps=True).map, fitted.score(X, maps=True).map)


def test_over_inliers_it_has_mean_0_and_deviation_1(fitted):
    maps = fitted.score(images(300, seed=77), maps=True).map
    assert maps.dtype == np.float32
    assert abs(maps.mean()) < 0.15
    assert abs(maps.std() - 1) < 0.2


def test_expected_energy_follows_the_texture():
    """Energies that are quadratic in the textures are expected exactly; beyond the inliers' range nothing grows."""
    random = np.random.RandomState(3)
    found = random.random_sample((5, 4, 8, 8))
    energies = 2 + 3 * found[:, 0] - found[:, 1] ** 2 + 0.5 * found[:, 3]
    expected = ExpectedEnergy.fit(energies, found)
    np.testing.assert_allclose(expected.excess(energies, found) * 1e-6, 0, atol=1e-8)
    far, edge = found[:1].copy(), found[:1].copy()
    far[:, 0], edge[:, 0] = 1e9, found[:, 0].max()
    assert np.array_equal(expected.excess(energies[:1], far), expected.excess(energies[:1], edge))


@pytest.fixture(scope="module")
def large(tmp_path_factory, runtime):
    """A model of all nine waves at 16×16 pixels, which leaves noise over, and its map."""
    path, _ = write_ppca_bundle(tmp_path_factory.mktemp("large"), shape=LARGE, latent_dim=9)
    model = Model.load(open_bundle(path), runtime)
    return model, AnomalyMap(fit_map(model, images(N_FIT, LARGE, seed=1)))


@pytest.mark.parametrize(("y", "x"), [(0, 0), (6, 7), (13, 13), (3, 11)])
def test_a_defect_s_place_is_the_highest_and_has_the_last_colour(large, y, x):
    model, found = large
    clean = images(40, LARGE, seed=41)
    maps = found.values(model.map_inputs(with_spot(clean, y, x)))
    at = [np.unravel_index(each.argmax(), each.shape) for each in maps]
    inside = [y <= row < y + 3 and x <= column < x + 3 for row, column in at]
    assert np.mean(inside) >= 0.8
    loud = found.scale("anomaly").high
    assert np.mean(maps.max(axis=(1, 2)) > loud) >= 0.9
    assert np.mean(found.values(model.map_inputs(clean)).max(axis=(1, 2)) > loud) <= 0.25


def test_the_scale_is_the_inliers_and_holds_for_new_ones(fitted):
    maps = fitted.score(images(400, seed=78), maps=True).map
    scale = fitted.anomaly_map.scale("anomaly")
    assert scale.low == fitted.anomaly_map.parameters.quantiles[QUANTILES.index(0.5)]
    assert scale.high == fitted.anomaly_map.parameters.largest[QUANTILES.index(0.9)]
    assert (maps < scale.low).mean() == pytest.approx(0.5, abs=0.12)
    assert (maps.max(axis=(1, 2)) <= scale.high).mean() == pytest.approx(LAST_COLOUR, abs=0.08)
    distortion = fitted.score(
        images(400, seed=78), fitted.manifest.scores["elbo"], maps=True, map_kind="distortion"
    ).map
    scale = fitted.anomaly_map.scale("distortion")
    assert (distortion < scale.low).mean() == pytest.approx(0.5, abs=0.12)
    assert (distortion.max(axis=(1, 2)) <= scale.high).mean() == pytest.approx(LAST_COLOUR, abs=0.12)


def test_the_distortion_map_sums_to_the_distortion(fitted):
    found = fitted.score(X, maps=True, map_kind="distortion")
    np.testing.assert_allclose(found.map.sum(axis=(1, 2), dtype=np.float64), found.distortion, rtol=1e-5)
    assert not np.array_equal(found.map, fitted.score(X, maps=True).map)


@pytest.fixture(scope="module")
def table(root, runtime):
    plain = Model.load(open_bundle(root / "table" / "1"), runtime)
    return plain, AnomalyMap(fit_map(plain, draw(TABLE, 400, seed=5)))


@pytest.mark.parametrize("feature", range(4))
def test_a_vector_s_places_are_no_neighbours_and_have_units_of_their_own(table, feature):
    plain, found = table
    x = draw(TABLE, 60, seed=6)
    shifted = x.copy()
    shifted[..., feature] += 8 * UNITS[feature]
    before, after = found.values(plain.map_inputs(x)), found.values(plain.map_inputs(shifted))
    assert before.shape == (60, 1, 4)
    assert np.mean(after[:, 0].argmax(axis=1) == feature) > 0.6
    assert after[:, 0, feature].mean() > before[:, 0, feature].mean() + 3
    quiet, changed = (MapInputs(rows, np.zeros_like(x), np.zeros_like(x)) for rows in (x, shifted))
    others = [at for at in range(4) if at != feature]
    assert np.array_equal(found.values(quiet)[..., others], found.values(changed)[..., others])


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("mean", np.zeros((1, 8, 7))),
        ("scale", np.zeros((1, 8, 8))),
        ("level", np.full((8, 8), np.nan)),
        ("texture.least", np.array(0.0)),
        ("texture.energy", np.zeros(8)),
        ("deviation", np.array(-1.0)),
        ("quantiles", np.array([3.0, 2.0, 1.0, 0.0])),
        ("largest", np.zeros(3)),
        ("distortion", np.array([1.0, 0.0])),
        ("location", np.array(np.inf)),
        ("tail.knots", np.zeros((1, 5))),
        ("spread", None),
        ("tail.scale", None),
        ("further", np.zeros(3)),
    ],
)
def test_bad_arrays_are_refused(fitted, name, array):
    arrays = {key: value for key, value in fitted.anomaly_map.parameters.arrays.items() if key != name}
    with pytest.raises(BundleFormatError):
        MapParameters.from_arrays(arrays | ({} if array is None else {name: array}), fitted.manifest)


def test_reserved_arrays_that_nobody_knows_are_refused(fitted, tmp_path):
    arrays = fitted.bundle.arrays(DETECTORS) | {"@later/weight": np.zeros(3)}
    path = rewrite(fitted.bundle, tmp_path, {}, {DETECTORS: npz(arrays)})
    with pytest.raises(BundleFormatError, match="@later/weight, which is nothing that this vaeserve knows"):
        loaded_map(open_bundle(path))


def test_it_is_the_same_from_its_arrays(fitted, model):
    again = AnomalyMap(fit_map(model, images(N_FIT, seed=1)))
    assert np.array_equal(again.values(model.map_inputs(X)), fitted.anomaly_map.values(fitted.map_inputs(X)))


def test_a_fit_to_too_little_is_refused(model):
    with pytest.raises(InvalidInput, match="at least"):
        fit_map(model, images(5))
    with pytest.raises(InvalidInput, match="halves"):
        MapParameters.fit([], [model.map_inputs(X)], model.manifest)
    with pytest.raises(InvalidInput, match="halves"):
        MapParameters.fit([model.map_inputs(X)], [], model.manifest)


def test_an_answer_says_which_map_it_holds(client, fitted):
    answer = post(client, map=True).json()
    Scored.model_validate(answer)
    scale = fitted.anomaly_map.scale("anomaly")
    assert answer["map"] == {"kind": "anomaly", "unit": UNIT, "low": scale.low, "high": scale.high}
    expected = fitted.score(X, maps=True).map
    assert np.array_equal(np.float32([row["map"] for row in answer["results"]]), expected)
    assert np.array_equal(np.load(io.BytesIO(post(client, accept=NPY, map=True).content)), expected)
    other = post(client, map=True, map_kind="distortion").json()
    assert other["map"]["kind"] == "distortion"
    assert other["map"]["unit"] == "nats"
    for row in other["results"]:
        assert np.sum(row["map"]) == pytest.approx(row["distortion"], rel=1e-5)


def test_unasked_there_is_no_map(client):
    answer = post(client).json()
    assert answer["map"] is None
    assert all(row.get("map") is None for row in answer["results"])


def test_a_bundle_without_one_gives_the_distortion_and_refuses_the_other(client, runtime, root):
    answer = post(client, model="plain", map=True).json()
    assert answer["map"] == {"kind": "distortion", "unit": "nats", "low": None, "high": None}
    refused = assert_problem(post(client, model="plain", map=True, map_kind="anomaly"), 409)["detail"]
    assert "vaeserve calibrate" in refused
    early = client.post("/v1/models/plain/score", params={"map": True, "map_kind": "anomaly"}, content=b"")
    assert_problem(early, 409)
    with pytest.raises(UnsupportedVerb):
        Model.load(open_bundle(root / "plain" / "1"), runtime).score(X, maps=True, map_kind="anomaly")
    unit = post(client, draw_one("pca"), "pca", map=True).json()["map"]["unit"]
    assert unit == "squared error"
    assert_problem(post(client, draw_one("whitening"), "whitening", map=True), 409)


def draw_one(name):
    return np.zeros((1, {"pca": 5, "whitening": 3}[name]), np.float32)


def test_the_colours_of_a_picture_do_not_depend_on_the_request(client, fitted):
    """The same image, alone and beside an outlier: the same colours, and the scale written into the file."""
    alone = opened(post(client, X[:1], accept=PNG, map=True))
    beside = opened(post(client, np.concatenate([X[:1], with_spot(X[1:2], 2, 2)]), accept=PNG, map=True))
    assert np.array_equal(np.asarray(beside)[:, :8], np.asarray(alone))
    scale = fitted.anomaly_map.scale("anomaly")
    expected = {"minimum": repr(scale.low), "maximum": repr(scale.high), "kind": "anomaly", "unit": UNIT}
    assert alone.text == beside.text == expected | {"scale": "calibration"}
    maps = fitted.score(X[:1], maps=True).map
    assert np.array_equal(np.asarray(alone), np.asarray(Image.open(io.BytesIO(encode_heat_maps(maps, scale)))))


def test_an_overlay_shows_the_image_below(client, fitted):
    x = with_spot(X, 2, 3)
    found = opened(post(client, x, accept=PNG, map=True, map_picture="overlay"))
    maps, scale = fitted.score(x, maps=True).map, fitted.anomaly_map.scale("anomaly")
    assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(encode_overlays(x, maps, scale)))))
    quiet = np.argwhere(maps[0] <= scale.low)
    assert len(quiet)
    row, column = quiet[0]
    assert set(np.asarray(found)[row, column]) == {round(float(x[0, 0, row, column]) * 255)}


def test_without_a_calibration_the_scale_is_that_of_the_maps_and_says_so(client):
    picture = opened(post(client, model="plain", accept=PNG, map=True))
    assert picture.text["scale"] == "of these maps"
    assert picture.text["kind"] == "distortion"


@pytest.mark.parametrize("option", [{"map_kind": "anomaly"}, {"map_picture": "overlay"}])
def test_options_of_a_map_without_one_are_refused(client, option):
    assert "without map=true" in assert_problem(post(client, **option), 422)["detail"]


@pytest.mark.parametrize("option", [{"map_kind": "heat"}, {"map_picture": "png"}])
def test_unknown_options_are_refused(client, option):
    assert_problem(post(client, map=True, **option), 422)


def test_the_options_may_stand_in_the_body(client):
    body = json.dumps({"images": X.tolist(), "map": True, "map_kind": "distortion"})
    answer = client.post("/v1/score", content=body, headers={"content-type": JSON}).json()
    assert answer["map"]["kind"] == "distortion"


def test_the_passes_of_a_map_count_as_work(root):
    with serving(root, default_model="ppca", max_evaluated_pixels=5 * 64 * (2 + PASSES)) as client:
        assert post(client, map=True, score="elbo", k=2).status_code == 200
        assert "max_evaluated_pixels" in assert_problem(post(client, map=True, score="elbo", k=3), 422)["detail"]
        assert post(client, map=True, score="elbo", k=3, map_kind="distortion").status_code == 200


def test_it_is_in_openapi(client):
    operation = client.get("/openapi.json").json()["paths"]["/v1/score"]["post"]
    assert {"map", "map_kind", "map_picture", "top_latents"} <= {each["name"] for each in operation["parameters"]}
    assert "minimum, maximum, kind, unit and scale" in operation["description"]


def test_a_model_of_tiles_stitches_it_and_finds_the_scratch(client, tiled):
    image, where = with_scratch(surface(70, 90, 61), 30, 50)
    query = {"map": "true", "score": "elbo"}
    answer = post(client, image, "weave", **query, top_latents=2).json()
    assert answer["map"]["kind"] == "anomaly"
    found = np.float32(answer["results"][0]["map"])
    assert found.shape == where.shape
    assert where[np.unravel_index(found.argmax(), found.shape)]
    distortion = np.float32(post(client, image, "weave", **query, map_kind="distortion").json()["results"][0]["map"])
    assert not np.array_equal(found, distortion)
    for picture in ("heat-map", "overlay"):
        shown = opened(post(client, image, "weave", accept=PNG, **query, map_picture=picture))
        assert (shown.size, shown.text["scale"]) == ((90, 70), "calibration")
    row, column = np.argwhere(found <= tiled.model.anomaly_map.scale("anomaly").low)[0]
    assert set(np.asarray(shown)[row, column]) == {image[0, row, column]}
    latents = answer["results"][0]["latents"]
    total = sum(each["nats"] for each in latents["largest"]) + latents["others"] + latents["joint"]
    assert total == pytest.approx(answer["results"][0]["rate"], abs=1e-9)
    plan = tiled.plan(image)
    nats = tiled.model.score(unit_levels(plan.cut(image, 0, len(plan))), latents=True).latents.mean(axis=0)
    assert latents["largest"][0] == {"index": int(nats.argmax()), "nats": pytest.approx(nats.max())}


def opened(response):
    assert response.headers["content-type"] == PNG, response.text[:300]
    return Image.open(io.BytesIO(response.content))


def score(*arguments):
    return CliRunner().invoke(app, ["score", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    """0.png, and deep/0.png with a spot."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for name, image in (("0.png", X[0]), ("deep/0.png", with_spot(X[:1], 2, 2)[0])):
        Image.fromarray(np.rint(image[0] * 255).astype(np.uint8)).save(root / name)
    (root / "bad.png").write_text("not a picture")
    return root


@pytest.mark.parametrize("options", [{}, {"map_picture": "overlay"}, {"map_kind": "distortion"}])
def test_offline_pictures_are_the_services(folder, root, client, tmp_path, options):
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    done = score(folder, "--model", "ppca", "--repository", root, "--maps", tmp_path / "maps", *flags)
    assert done.exit_code == 3, done.output
    written = {str(path.relative_to(tmp_path / "maps")) for path in (tmp_path / "maps").rglob("*.png")}
    assert written == {"0.png", "deep/0.png"}
    for name in ("0.png", "deep/0.png"):
        headers = {"content-type": PNG, "accept": PNG}
        body = (folder / name).read_bytes()
        answer = client.post("/v1/models/ppca/score", content=body, headers=headers, params={"map": True, **options})
        assert (tmp_path / "maps" / name).read_bytes() == answer.content


def test_offline_pictures_of_tiles(root, tmp_path):
    image, _ = with_scratch(surface(40, 50, 62), 10, 20)
    Image.fromarray(image[0]).save(tmp_path / "a.png")
    options = ("--score", "elbo", "--maps", tmp_path / "maps")
    done = score(tmp_path / "a.png", "--model", "weave", "--repository", root, *options)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "maps/a.png") as picture:
        assert picture.size == (50, 40)


def test_a_picture_of_another_format_keeps_its_suffix_beside_one_of_its_name(tmp_path):
    files = [tmp_path / name for name in ("a.jpg", "a.png", "b.PNG")]
    planned = plan_pictures(files, [tmp_path], tmp_path / "out")
    assert [str(path.relative_to(tmp_path / "out")) for path in planned.values()] == ["a.jpg.png", "a.png", "b.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{x}/0.png", "--maps", "{x}/out", "--map-kind", "anomaly", "--model", "plain"], "vaeserve calibrate"),
        (["{x}/0.png", "--maps", "{x}/out", "--map-kind", "heat"], "map_kind"),
        (["{x}/0.png", "--map-kind", "anomaly"], "--maps FOLDER"),
        (["{x}/0.png", "{x}/deep/0.png", "--maps", "{x}/out", "--model", "ppca"], "would both be"),
        (["{x}/0.png", "--maps", "{x}", "--model", "ppca"], "0.png would take the place of"),
        (["{x}/rows.npy", "--maps", "{x}/out", "--model", "table"], "no pictures"),
    ],
)
def test_offline_pictures_that_cannot_be_are_refused_in_one_line(folder, root, arguments, says):
    np.save(folder / "rows.npy", draw(TABLE, 2)[:, 0, 0])
    done = score(*(part.replace("{x}", str(folder)) for part in arguments), "--repository", root)
    assert done.exit_code == 1
    assert says in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not (folder / "out").exists()
