"""``vaeserve calibrate``: a new version whose verdicts rest on the user's own rows, and keep the rate on fresh ones."""

import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from service.bundle.files import open_bundle
from service.bundle.manifest import CALIBRATION, DETECTORS, TILES
from service.calibration.conformal import Calibrator
from service.commands.calibration_data import ModelRows
from service.commands.cli import app
from service.commands.recalibration import RecalibrationPlan, recalibrate
from service.errors import InvalidInput
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.tiled import TiledModel, fit_tile_tails, tile_tail_arrays
from service.inference.verification import open_verified
from service.pixels import unit_levels
from tests.ppca_bundle import images
from tests.service.fitted import write_fitted
from tests.service.fitted_bundles import rewrite
from tests.service.http import serving
from tests.service.linear_bundles import draw, linear, write_table
from tests.tiled_bundle import surface, with_scratch, write_tiled_bundle


def levels(n, seed, mirrored=False):
    """Images as 8-bit pixels; the mirrored ones are from another camera than those of training."""
    return np.rint(images(n, seed=seed)[..., :: -1 if mirrored else 1] * 255).astype(np.uint8)


def own(rows):
    return ModelRows(rows, unit_levels)


@pytest.fixture(scope="module")
def root(tmp_path_factory, ppca_path):
    root = tmp_path_factory.mktemp("own")
    write_fitted(root, ppca_path)
    return root


def load(path):
    return Model.load(open_bundle(path), Runtime("cpu"))


@pytest.fixture(scope="module")
def moved(root):
    """Calibrated on 600 images that are the mirror images of those of training."""
    return recalibrate(open_bundle(root / "ppca" / "2"), own(levels(600, 21, True)), None, root, RecalibrationPlan())


def test_the_next_version_keeps_the_graphs_and_has_new_detectors_and_scores(root, moved):
    old, new = open_bundle(root / "ppca" / "2"), open_bundle(moved.path)
    assert new.manifest.version == "3"
    for role in old.manifest.graphs:
        assert new.graph(role) == old.graph(role)
    assert new.read(DETECTORS) != old.read(DETECTORS)
    assert (moved.n, moved.n_fit) == (420, 180)
    assert (new.manifest.calibration.n, new.manifest.calibration.n_fit) == (420, 180)


def test_fresh_rows_like_the_users_own_are_flagged_at_the_asked_rate_where_the_old_calibration_flags_many(root, moved):
    fresh = unit_levels(levels(2000, 22, True))
    for path, low, high in ((moved.path, 0.02, 0.08), (root / "ppca" / "2", 0.15, 1.0)):
        model = load(path)
        p = Calibrator.from_bundle(model.bundle).p_values("combined", model.score(fresh).score)
        assert low <= np.mean(p <= 0.05) <= high, path


def test_what_fits_the_scores_does_not_calibrate_them(moved):
    """The stored scores are those of the rows outside the fitted share, each scored alone."""
    model = load(moved.path)
    order = np.random.RandomState(0).permutation(600)
    rows = unit_levels(levels(600, 21, True)[np.sort(order[180:])])
    np.testing.assert_array_equal(np.sort(model.score(rows).score), model.bundle.arrays(CALIBRATION)["combined"])


def test_a_bundle_that_had_too_few_rows_to_fit_gets_the_combination_as_its_default_and_it_is_said(ppca_path, tmp_path):
    old = open_bundle(ppca_path)
    assert "combined" not in old.manifest.scores
    done = recalibrate(old, own(levels(100, 23)), None, tmp_path, RecalibrationPlan())
    assert open_bundle(done.path).manifest.default_score == "combined"
    assert (
        f"the default score is combined now, fitted here for the first time; it was {old.manifest.default_score}"
        in (done.notes)
    )


def test_a_default_that_was_chosen_beside_the_combination_stays(root, tmp_path):
    old = open_bundle(root / "ppca" / "2")
    chosen = rewrite(old, tmp_path / "chosen", {"default_score": "elbo"}, {})
    done = recalibrate(open_bundle(chosen), own(levels(100, 23)), None, tmp_path, RecalibrationPlan())
    assert open_bundle(done.path).manifest.default_score == "elbo"


def test_few_rows_keep_the_detectors_and_say_so(root, tmp_path):
    old = open_bundle(root / "ppca" / "2")
    done = recalibrate(old, own(levels(30, 23)), None, tmp_path, RecalibrationPlan())
    assert open_bundle(done.path).read(DETECTORS) == old.read(DETECTORS)
    assert (done.n, done.n_fit) == (30, 0)
    assert any("too few" in note for note in done.notes)


def test_a_rate_that_so_few_rows_cannot_answer_fails_before_any_work_with_the_number_needed(root, tmp_path):
    with pytest.raises(InvalidInput, match="at least 99"):
        recalibrate(
            open_bundle(root / "ppca" / "2"),
            own(levels(60, 1)),
            None,
            tmp_path,
            RecalibrationPlan(false_positive_rate=0.01),
        )
    assert not list(tmp_path.iterdir())


def test_outliers_among_the_good_rows_are_named_and_can_be_left_out(root, tmp_path):
    old = open_bundle(root / "ppca" / "2")
    noise = 255 * np.random.RandomState(0).randint(0, 2, (10, *images(1).shape[1:])).astype(np.uint8)
    rows = np.concatenate([levels(390, 24), noise])
    plain = recalibrate(old, own(rows), None, tmp_path / "plain", RecalibrationPlan(fit_share=0))
    assert set(range(390, 400)) <= set(plain.suspects)
    assert plain.notes
    trimmed = recalibrate(old, own(rows), None, tmp_path / "trimmed", RecalibrationPlan(fit_share=0, trim="auto"))
    assert trimmed.n == 400 - len(plain.suspects)
    assert open_bundle(trimmed.path).manifest.calibration.removed == len(plain.suspects)
    assert max(open_bundle(trimmed.path).arrays(CALIBRATION)["combined"]) < max(
        open_bundle(plain.path).arrays(CALIBRATION)["combined"]
    )


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two subfolders of pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for group, count, seed in (("left", 60, 31), ("right", 80, 32)):
        (folder / group).mkdir()
        for i, image in enumerate(levels(count, seed)):
            Image.fromarray(image[0]).save(folder / group / f"{i}.png")
    (folder / "left" / "broken.png").write_bytes(b"no picture")
    return folder


def test_the_command_writes_a_version_with_a_calibration_for_each_subfolder(root, folder, tmp_path):
    done = run("calibrate", "ppca", folder, "--groups", "--repository", root, "--to", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "broken.png" in done.stderr
    bundle = open_bundle(tmp_path / "ppca" / "1")
    calibrator = Calibrator.from_bundle(bundle)
    assert calibrator.groups("combined") == ["left", "right"]
    counts = [calibrator.n("combined", group) for group in ("left", "right")]
    assert sum(counts) == calibrator.n("combined") == 98
    assert list(bundle.manifest.calibration.groups.values()) == counts
    with serving(tmp_path) as client:
        picture = (folder / "right" / "0.png").read_bytes()
        for group, n in zip(("left", "right"), counts, strict=True):
            asked = {"params": {"group": group}, "content": picture, "headers": {"content-type": "image/png"}}
            assert client.post("/v1/models/ppca/score", **asked).json()["calibration"]["n"] == n
    scored = run("score", folder / "right" / "0.png", "--repository", tmp_path)
    assert scored.exit_code == 0, scored.stderr


def test_the_command_says_what_each_group_can_answer_and_that_a_server_must_start_again(root, folder, tmp_path):
    few = tmp_path / "few"
    shutil.copytree(folder / "right", few / "right")
    for name in [f"{i}.png" for i in range(10)]:
        (few / "left").mkdir(exist_ok=True)
        shutil.copy(folder / "left" / name, few / "left" / name)
    arguments = ("--fit-share", "0", "--repository", root, "--to", tmp_path / "to")
    done = run("calibrate", "ppca", few, "--groups", *arguments)
    assert done.exit_code == 0, done.stderr
    assert (
        "group left: 10 images; smallest p-value 0.0909; too few for the default false-positive rate, 0.05, which "
        "needs 19\ngroup right: 80 images; smallest p-value 0.0123\n"
    ) in done.stderr
    assert "a running server loads new versions when it is started again" in done.stderr
    assert "no groups" not in done.stderr
    again = run("calibrate", "ppca", few, "--repository", tmp_path / "to", "--fit-share", "0")
    assert "note: this version has no groups, the bundle had left, right" in again.stderr


def test_groups_without_subfolders_are_refused_before_any_work(root, folder, tmp_path):
    done = run("calibrate", "ppca", folder / "right", "--groups", "--repository", root, "--to", tmp_path / "to")
    assert done.exit_code == 1
    assert "no image lies in a subfolder" in done.stderr
    assert "expected a subfolder for each group" in done.stderr
    assert not (tmp_path / "to").exists()


def test_a_subfolder_whose_name_no_group_can_have_is_refused_before_any_work(root, tmp_path):
    names, worked = [f"a@b{i % 2}" for i in range(30)], []
    with pytest.raises(InvalidInput, match="a group's name is"):
        recalibrate(
            open_bundle(root / "ppca" / "2"), own(levels(30, 1)), names, tmp_path, RecalibrationPlan(), worked.append
        )
    assert not worked


def test_of_two_at_once_the_second_takes_the_next_version(root, tmp_path, monkeypatch):
    """While one is verified, another process writes the version that it was about to take."""
    taken = tmp_path / "ppca" / "1"

    def raced(path):
        if not taken.exists():
            shutil.copytree(path, taken)
        return open_verified(path)

    monkeypatch.setattr("service.commands.recalibration.open_verified", raced)
    done = recalibrate(open_bundle(root / "ppca" / "2"), own(levels(30, 23)), None, tmp_path, RecalibrationPlan())
    assert done.path == tmp_path / "ppca" / "2"
    assert open_bundle(done.path).manifest.version == "2"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--trim", "much"], "--trim is 'much'"),
        (["--trim", "0.9"], "expected a number from 0 to 0.5"),
        (["--false-positive-rate", "0.001"], "at least 999"),
    ],
)
def test_the_command_refuses_in_one_line(root, folder, tmp_path, arguments, text):
    done = run("calibrate", "ppca", folder, *arguments, "--repository", root, "--to", tmp_path / "to")
    assert done.exit_code == 1
    assert text in done.stderr
    assert len([line for line in done.stderr.splitlines() if line and "broken.png" not in line]) == 1, done.stderr


def test_an_unknown_model_is_refused(root, folder):
    assert "ppca" in run("calibrate", "nonsense", folder, "--repository", root).stderr


def test_tables_calibrate_too(tmp_path):
    write_table(tmp_path / "from")
    rows = draw(linear((1, 1, 4), 2, np.array([1.0, 300.0, 0.02, 25.0])), 200, seed=4)
    np.save(tmp_path / "rows.npy", rows.reshape(200, 4).astype(np.float32))
    done = run("calibrate", "table", tmp_path / "rows.npy", "--repository", tmp_path / "from", "--to", tmp_path / "to")
    assert done.exit_code == 0, done.stderr
    manifest = open_bundle(next((tmp_path / "to" / "table").iterdir())).manifest
    assert (manifest.calibration.n, manifest.calibration.n_fit) == (140, 60)


@pytest.fixture(scope="module")
def weave(tmp_path_factory):
    """A folder with a bundle of tiles, and one of 60 photographs of the surface in harder light, of two sizes."""
    root, photos = tmp_path_factory.mktemp("weave"), tmp_path_factory.mktemp("photos")
    write_tiled_bundle(root)
    for number in range(60):
        Image.fromarray(harsh(surface(40 + 8 * (number % 2), 56, number))[0]).save(photos / f"{number:02}.png")
    Image.fromarray(surface(15, 90, 0)[0]).save(photos / "narrow.png")
    return root, photos


def harsh(image):
    return np.rint(np.clip(1.3 * (image - 128.0) + 128, 0, 255)).astype(np.uint8)


@pytest.fixture(scope="module")
def of_whole_images(weave, tmp_path_factory):
    to = tmp_path_factory.mktemp("to")
    root, photos = weave
    done = run("calibrate", "weave", photos, "--repository", root, "--to", to)
    assert done.exit_code == 0, done.stderr
    return done, open_bundle(to / "weave" / "1")


def test_a_model_of_tiles_is_calibrated_by_whole_images(weave, of_whole_images):
    """The stored scores are those of the images outside the fitted share, each scored as the service scores it."""
    done, bundle = of_whole_images
    assert "narrow.png: the image is 90×15: at least 16×16 expected" in done.stderr
    assert "42 images calibrate, 18 fitted the scores" in done.stderr
    files = sorted(weave[1].glob("[0-9]*.png"))
    order = np.random.RandomState(0).permutation(60)
    images = [np.asarray(Image.open(files[index]))[None] for index in np.sort(order[18:])]
    model = TiledModel(Model.load(bundle, Runtime("cpu")))
    names = bundle.manifest.scores
    for name, scores in model.score(images, also=names).also.items():
        np.testing.assert_array_equal(np.sort(scores), bundle.arrays(CALIBRATION)[name])


def test_its_tails_are_those_of_the_tiles_of_the_fitted_share(weave, of_whole_images):
    bundle = of_whole_images[1]
    files = sorted(weave[1].glob("[0-9]*.png"))
    tiled, names = TiledModel(Model.load(bundle, Runtime("cpu"))), bundle.manifest.scores
    images = [np.asarray(Image.open(files[i]))[None] for i in np.random.RandomState(0).permutation(60)[:18]]
    scores = [tiled.tile_scores(image, names) for image in images]
    expected = tile_tail_arrays(
        fit_tile_tails({name: np.concatenate([each[name] for each in scores]) for name in names})
    )
    stored = bundle.arrays(TILES)
    assert stored.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(stored[key], array)


def test_fresh_images_like_the_users_own_keep_the_rate_and_a_scratch_is_found(weave, of_whole_images):
    fresh = [harsh(surface(40 + 8 * (number % 2), 56, 500 + number)) for number in range(150)]
    scratched = [with_scratch(image, 20, 30)[0] for image in fresh[:20]]
    flagged = {}
    for place, bundle in (("old", open_bundle(weave[0] / "weave" / "1")), ("new", of_whole_images[1])):
        model, calibrator = TiledModel(Model.load(bundle, Runtime("cpu"))), Calibrator.from_bundle(bundle)
        name = bundle.manifest.default_score
        flagged[place] = np.mean(calibrator.p_values(name, model.score(fresh).score) <= 0.1)
        found = np.mean(calibrator.p_values(name, model.score(scratched).score) <= 0.1)
    assert flagged["new"] < 0.2 < flagged["old"]
    assert found > 0.9


def test_too_few_whole_images_keep_detectors_and_tails(weave, tmp_path):
    root, photos = weave
    done = run("calibrate", "weave", *sorted(photos.glob("0*.png")), "--repository", root, "--to", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert "10 images are too few to fit the scores anew" in done.stderr
    old, new = open_bundle(root / "weave" / "1"), open_bundle(tmp_path / "weave" / "1")
    assert new.read(TILES) == old.read(TILES)
    assert new.manifest.calibration.n == 10


def test_one_whole_image_is_too_few(weave, tmp_path):
    done = run("calibrate", "weave", weave[1] / "00.png", "--repository", weave[0], "--to", tmp_path)
    assert done.exit_code == 1
    assert "vaeserve: images to calibrate on: 1, expected at least 2" in done.stderr
