"""Models of tiles: whole images scored, calibrated and mapped at their own resolution, over HTTP and offline."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from scipy.stats import kstest

from service.bundle.files import open_bundle
from service.bundle.input_rules import Tiling
from service.errors import BundleFormatError, InvalidInput, UnsupportedVerb
from service.formats.tiling import TilePlan
from service.inference import tiled as module
from service.inference.model import Model
from service.inference.tiled import TiledModel, aggregate, fit_tile_tails, surprisal_of_maximum
from service.pixels import unit_levels
from service.repository.model_repository import load_bundle
from tests.tiled_bundle import TILE, surface, with_scratch, write_tiled_bundle


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    write_tiled_bundle(root)
    return root


@pytest.fixture(scope="module")
def served(root, runtime):
    return load_bundle(root / "weave" / "1", runtime)


def auroc(inliers, outliers):
    return np.mean([[(o > i) + (o == i) / 2 for i in inliers] for o in outliers])


# ---- aggregates


def test_the_aggregate_orders_as_sidaks_p_value_does_and_stays_finite():
    for p, m in [(0.5, 1.0), (0.01, 7.5), (1e-5, 200.0)]:
        found = surprisal_of_maximum(-np.log(p), m)
        assert 1 - np.exp(-np.exp(-found)) == pytest.approx(1 - (1 - p) ** m, rel=1e-9)
    assert surprisal_of_maximum(5000.0, 100.0) == pytest.approx(5000 - np.log(100))
    grid = np.concatenate([np.linspace(0, 40, 400), np.linspace(590, 610, 100)])
    found = np.array([surprisal_of_maximum(s, 64.0) for s in grid])
    assert np.isfinite(found).all()
    assert (np.diff(found) > 0).all()


def test_the_highest_of_more_tiles_means_less():
    """Of independent tiles the aggregate is a Gumbel variable, whatever their number; the plain maximum is not."""
    random = np.random.RandomState(0)
    tail = fit_tile_tails({"s": random.exponential(size=20_000)})["s"]
    tiling = Tiling(stride=(TILE, TILE))
    for side in (2, 16):
        plan = TilePlan((side * TILE, side * TILE), (TILE, TILE), tuple(range(side)), tuple(range(side)))
        scores = [aggregate(random.exponential(size=len(plan)), plan, tiling, tail) for _ in range(800)]
        assert kstest(scores, "gumbel_r").pvalue > 0.01


def test_top_is_the_mean_of_the_highest_share():
    plan = TilePlan((40, 40), (4, 4), tuple(range(0, 40, 4)), tuple(range(0, 40, 4)))
    tiling = Tiling(stride=(4, 4), aggregate="top", share=0.05)
    assert aggregate(np.random.RandomState(0).permutation(100.0 + np.arange(100)), plan, tiling, None) == 197.0
    assert aggregate(np.arange(3.0), plan, tiling, None) == 2.0


# ---- the model


def test_scores_do_not_depend_on_how_many_tiles_go_at_a_time_nor_on_other_images(served, monkeypatch):
    images = [surface(48, 70, 1), surface(40, 33, 2)]
    names = served.manifest.scores
    whole = served.tiled.score(images, maps=True, also=names)
    for at_once in (1, 5):
        monkeypatch.setattr(module, "AT_ONCE", at_once)
        for index in (1, 0):
            alone = served.tiled.score([images[index]], maps=True, also=names)
            assert alone.score[0] == whole.score[index]
            assert alone.tiles[0] == whole.tiles[index]
            assert np.array_equal(alone.map[0], whole.map[index])
            for name in ("elbo", "rate", "distortion"):
                assert getattr(alone, name)[0] == getattr(whole, name)[index]
            assert all(alone.also[name][0] == whole.also[name][index] for name in names)


def test_an_image_of_one_tile_is_that_tile(served):
    image = surface(TILE, TILE, 3)
    found = served.tiled.score([image], maps=True)
    row = served.model.score(unit_levels(image[None]), maps=True)
    assert found.tiles[0] == (1, 0, 0, row.score[0])
    assert np.array_equal(found.map[0], row.map[0])
    assert found.elbo[0] == row.elbo[0]
    tail = module.load_tails(served.model.bundle)[served.manifest.default_score]
    assert found.score[0] == pytest.approx(surprisal_of_maximum(tail.surprisal(row.score)[0], 1.0))


def test_without_overlap_the_map_is_the_tiles_own(root, runtime, tmp_path):
    path = write_tiled_bundle(tmp_path, calibration_n=9, stride=[TILE, TILE])
    model = TiledModel(Model.load(open_bundle(path), runtime))
    image = surface(2 * TILE, 3 * TILE, 4)
    whole = model.score([image], maps=True).map[0]
    for y in (0, TILE):
        for x in (0, TILE, 2 * TILE):
            tile = unit_levels(image[None, :, y : y + TILE, x : x + TILE])
            assert np.array_equal(whole[y : y + TILE, x : x + TILE], model.model.score(tile, maps=True).map[0])


def test_a_scratch_on_a_large_surface_is_found_by_the_score_by_the_worst_tile_and_by_the_map(served):
    good = [surface(160, 192, 900 + index) for index in range(12)]
    places = np.random.RandomState(5).randint(0, (140, 180), (12, 2))
    made = [with_scratch(surface(160, 192, 950 + index), y, x) for index, (y, x) in enumerate(places.tolist())]
    bad, where = [image for image, _ in made], [place for _, place in made]
    clean, scratched = served.tiled.score(good), served.tiled.score(bad, maps=True)
    assert auroc(clean.score, scratched.score) > 0.95
    for tiles, (y, x) in zip(scratched.tiles, places, strict=True):
        assert abs(tiles.worst_y + TILE / 2 - (y + 6)) <= TILE
        assert abs(tiles.worst_x + TILE / 2 - (x + 1)) <= TILE
    for found, place in zip(scratched.map, where, strict=True):
        assert auroc(found[~place][::17], found[place]) > 0.95


def test_verdicts_hold_for_images_of_the_calibration_sizes_and_others(served):
    """Calibrated on 64×64: rates at 10% on that size, and on one of nine times the area, where a maximum would not."""
    for side, seed in ((64, 70_000), (192, 80_000)):
        found = served.tiled.score([surface(side, side, seed + index) for index in range(60)])
        p = served.calibrator.p_values("elbo", found.score)
        assert np.mean(p <= 0.1) <= 0.1 + 3 * np.sqrt(0.09 * (1 / 60 + 1 / 39))


def test_float_pixels_score_as_the_same_levels_do(served):
    image = surface(30, 41, 6)
    assert served.tiled.score([unit_levels(image)]).score == served.tiled.score([image]).score


def test_a_score_that_is_none_of_the_bundles_has_no_tail(served):
    other = served.manifest.scores["elbo"].model_copy(update={"k": 2})
    with pytest.raises(InvalidInput, match="elbo, iwae"):
        served.tiled.score([surface(16, 16, 0)], other)


def test_a_bundle_without_tails_says_that_it_wants_calibration(served):
    with pytest.raises(UnsupportedVerb, match="calibrate"):
        TiledModel(served.model, {}).score([surface(16, 16, 0)])


def test_top_needs_no_tails(tmp_path, runtime):
    path = write_tiled_bundle(tmp_path, calibration_n=9, aggregate="top", share=1.0)
    model = TiledModel(Model.load(open_bundle(path), runtime), {})
    image = surface(40, 40, 7)
    tiles = model.plan(image).cut(unit_levels(image), 0, 100)
    assert model.score([image]).score[0] == pytest.approx(model.model.score(tiles).score.mean())


def test_tails_of_unknown_scores_are_refused(served, monkeypatch):
    bundle = served.model.bundle
    arrays = {key.replace("elbo", "other"): array for key, array in bundle.arrays("tiles.npz").items()}
    monkeypatch.setattr(type(bundle), "arrays", lambda *_: arrays)
    with pytest.raises(BundleFormatError, match="other"):
        module.load_tails(bundle)


def test_a_fault_of_the_tails_is_said_of_their_file(served, monkeypatch):
    bundle = served.model.bundle
    arrays = {key: -array if key == "elbo/scale" else array for key, array in bundle.arrays("tiles.npz").items()}
    monkeypatch.setattr(type(bundle), "arrays", lambda *_: arrays)
    with pytest.raises(BundleFormatError, match=r"tiles\.npz: scale of a tail holds numbers that are not pos"):
        module.load_tails(bundle)


# ---- memory

PEAK = """
import resource, sys
import numpy as np
from pathlib import Path
from service.formats.images import ImageLimits
from service.commands.offline_scoring import score_files
from service.repository.model_repository import load_bundle
from service.inference.sessions import Runtime
from service.repository.score_parameters import ScoreParameters
served = load_bundle(Path(sys.argv[1]), Runtime("cpu", 1))
row, = score_files(served, [Path(sys.argv[2])], ScoreParameters(k=4), 0.1, ImageLimits(2**30, 2**30))
print(row["tiles"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_beyond_the_map(served, image):
    """Bytes that are held at most while an image is scored, the least of three: what else runs only adds."""
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        found = served.tiled.score([image], maps=True)
        peaks.append(tracemalloc.get_traced_memory()[1] - found.map[0].nbytes)
        tracemalloc.stop()
    return min(peaks)


def test_memory_grows_by_the_images_own_bytes_alone(served):
    """What numpy holds beyond image and map: of 16 times the pixels less than a tenth more of them."""
    small, large = (np.tile(surface(64, 64, 8), (1, side // 64, side // 64)) for side in (256, 1024))
    served.tiled.score([small[:, :64, :64]], maps=True)
    assert peak_beyond_the_map(served, large) - peak_beyond_the_map(served, small) < 2 * (1024**2 - 256**2)


def test_the_whole_process_grows_by_a_few_times_the_decoded_image(root, tmp_path):
    """From file to score, 1k×1k against 4k×4k: Pillow's pixels, their bytes and the array, and no floats."""
    peaks = []
    for side in (1024, 4096):
        path = tmp_path / f"{side}.png"
        Image.fromarray(np.tile(surface(64, 64, 9)[0], (side // 64, side // 64))).save(path)
        coarse = write_tiled_bundle(tmp_path / str(side), calibration_n=2, stride=[TILE, TILE])
        code = [sys.executable, "-c", PEAK, str(coarse), str(path)]
        tiles, peak = subprocess.run(code, capture_output=True, text=True, check=True).stdout.split()
        assert int(tiles) == (side // TILE) ** 2
        peaks.append(int(peak))
    grown = peaks[1] - peaks[0]
    assert grown < 5 * (4096**2 - 1024**2)
