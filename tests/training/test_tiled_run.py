"""A run of crops becomes a bundle that scores whole images, calibrated by whole images under the same tiles."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from onnx import parser
from PIL import Image
from rich.console import Console

from service.bundle.files import open_bundle
from service.bundle.manifest import CALIBRATION, TILES
from service.calibration.contamination import Contamination
from service.inference.sessions import Runtime
from service.inference.tiled import fit_tile_tails, tile_tail_arrays
from service.repository.model_repository import load_bundle
from tests.tiled_bundle import surface, with_scratch
from training.config import Config, load_config
from training.console import all_stages, fit_stage
from training.export.calibrate import images_to_score, score_split, suspects
from training.runs import SCORES, Launch

pytestmark = pytest.mark.integration  # each is of a run from its fit to its bundle


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The run of PPCA on 60 woven surfaces, and the bundle it became."""
    folder = tmp_path_factory.mktemp("weave")
    for number in range(60):
        Image.fromarray(surface(48, 56 + 8 * (number % 2), number)[0]).save(folder / f"{number}.png")
    data = {"source": str(folder), "tile": 16, "crops": 30, "validation": 0.1, "calibration": 0.4, "test": 0.2}
    config = load_config("ppca", [], {"data": data, "model": {"latent_dim": 8}, "evaluate": {"k": 1}})
    console = Console(file=io.StringIO())
    run, _ = fit_stage(config, folder.parent / "run", Launch(data=str(folder)), False, console)
    return run, all_stages(run, folder.parent / "exported", console)


@pytest.fixture(scope="module")
def served(published):
    return load_bundle(published[1], Runtime("cpu"))


NET = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,1,16,16] x) => (float[N,1,4,4] y)
    { y = AveragePool<kernel_shape=[4,4],strides=[4,4]>(x) }"""


@pytest.mark.slow
def test_a_backbone_may_stand_before_a_model_of_tiles(published, tmp_path):
    """Its map's places are fewer than the tile's pixels; the image's map has the image's size."""
    run, _ = published
    (tmp_path / "net.onnx").write_bytes(parser.parse_model(NET).SerializeToString())
    changed = run.config.model_dump(mode="json") | {"backbone": {"path": str(tmp_path / "net.onnx")}, "name": "net"}
    config = Config.model_validate_json(json.dumps(changed))
    console = Console(file=io.StringIO())
    run, _ = fit_stage(config, tmp_path / "run", Launch(), False, console)
    served = load_bundle(all_stages(run, tmp_path / "exported", console), Runtime("cpu"))
    assert served.manifest.backbone.natural == (1, 4, 4)
    image, where = with_scratch(surface(56, 72, 901), 20, 30)
    found = served.tiled.score([image, surface(56, 72, 901)], maps=True)
    assert found.score[0] > found.score[1]
    assert found.map[0].shape == (56, 72)
    assert found.map[0][where].mean() > np.quantile(found.map[0], 0.95)


def test_the_calibration_is_of_whole_images_and_can_be_counted_again(published, served):
    run, path = published
    whole_images, calibration = run.dataset.whole_images, served.manifest.calibration
    assert (calibration.n, calibration.n_test) == (24, 12)
    assert images_to_score(run) == 36
    images = [whole_images.read(int(index)) for index in whole_images.splits["calibration"]]
    scores = served.tiled.score(images, also=served.manifest.scores).also
    stored = open_bundle(path).arrays(CALIBRATION)
    for name in served.manifest.scores:
        np.testing.assert_array_equal(np.sort(scores[name]), stored[name])
    with np.load(run.folder / SCORES) as kept:
        for name in served.manifest.scores:
            np.testing.assert_array_equal(kept[f"calibration.{name}"], np.sort(scores[name]))


def test_suspects_are_the_whole_images_by_their_files(published, served, monkeypatch):
    run, _ = published
    found = Contamination(24, 1, np.array([23]), 0.001, "look")
    monkeypatch.setattr("training.export.calibrate.contamination", lambda _: found)
    whole_images = run.dataset.whole_images
    scores = {
        int(i): served.tiled.score([whole_images.read(int(i))]).score[0] for i in whole_images.splits["calibration"]
    }
    highest = whole_images.read(max(scores, key=scores.get))
    _, (name,) = suspects(run)
    folder = Path(run.config.data.source)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / name)), highest[0])


def test_tails_are_those_of_held_out_tiles(published, served):
    run, path = published
    found = fit_tile_tails(score_split(served.model, run.dataset, "validation", list(served.manifest.scores)))
    stored = open_bundle(path).arrays(TILES)
    for key, array in tile_tail_arrays(found).items():
        np.testing.assert_array_equal(stored[key], array)


def test_a_scratch_is_found_by_the_default_score_at_its_place(served):
    clean = served.tiled.score([surface(100, 120, 7000 + index) for index in range(8)])
    places = [(20, 90), (70, 30), (0, 0), (86, 116)]
    bad = served.tiled.score([with_scratch(surface(100, 120, 8000 + i), *p)[0] for i, p in enumerate(places)])
    assert bad.score.min() > clean.score.max()
    for tiles, (y, x) in zip(bad.tiles, places, strict=True):
        assert tiles.worst_y - 12 < y < tiles.worst_y + 16
        assert tiles.worst_x - 2 < x < tiles.worst_x + 16


def test_the_card_tells_of_tiles_and_of_whole_images(published):
    text = (published[1] / "README.md").read_text()
    assert "tiles of that size, 8 pixels apart down and 8 across" in text
    assert "crops of 60 images" in text
    assert "24 held-out images" in text
