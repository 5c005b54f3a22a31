"""Calibration: scores as the service computes them, sorted, and rates that can be counted again."""

import io

import numpy as np
import pytest
from PIL import Image

from service.bundle.files import open_bundle
from service.bundle.input_rules import Preprocessing
from service.bundle.manifest import CALIBRATION, DETECTORS
from service.calibration.conformal import Calibrator
from service.calibration.contamination import Contamination
from service.formats.images import ImageLimits, decode_image
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.verification import verify_bundle
from service.pixels import unit_levels
from service.scores.fitting import MIN_ROWS, fitted_arrays
from tests.training.finished import finished_run
from tests.training.shared import copied
from training.data.batches import to_unit
from training.errors import ExportError
from training.export.calibrate import ORDER, calibrate, images_to_score, realised, score_split, summary, suspects
from training.runs import SCORES

EVERY = {
    "elbo", "iwae", "rate", "reconstruction", "typicality", "complexity", "debiased", "path", "path-copod", "residual",
    "peak", "latent", "statistics", "combined",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(exported_run, tmp_path_factory):
    return copied(exported_run, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def calibrated(run):
    counted = []
    path = calibrate(run, counted.append)
    assert sum(counted) == images_to_score(run)
    return Model.load(open_bundle(path), Runtime("cpu"))


def test_scores_are_fitted_to_images_that_neither_training_nor_calibration_see(run, calibrated):
    """Fitted anew to the validation images alone they are the same arrays."""
    calibration = calibrated.manifest.calibration
    assert (calibration.split, calibration.fitted_on) == ("calibration", "validation")
    assert calibration.n_fit == len(run.dataset.splits["validation"])
    held_out, reference = (to_unit(split_pixels(run, split)).numpy() for split in ("validation", "train"))
    expected = fitted_arrays(calibrated, calibrated.manifest.scores, held_out, reference)
    found = calibrated.bundle.arrays(DETECTORS)
    assert set(found) == set(expected)
    for key, array in found.items():
        np.testing.assert_array_equal(expected[key], array)


def test_without_enough_validation_images_the_bound_stays_the_score(exported_run, tmp_path):
    few = copied(exported_run, tmp_path)
    few.dataset.splits["validation"] = few.dataset.splits["validation"][: MIN_ROWS - 1]
    manifest = open_bundle(calibrate(few)).manifest
    assert (set(manifest.scores), manifest.default_score) == ({"elbo", "iwae"}, "elbo")
    assert manifest.calibration.fitted_on is None


def test_a_run_without_a_bundle_is_sent_to_export(tmp_path):
    bare = finished_run(tmp_path, (1, 3, 4), {"latent_dim": 2})
    with pytest.raises(ExportError, match="vaetrain export"):
        calibrate(bare)


def test_calibration_holds_the_sorted_scores_of_single_images_as_the_service_sees_them(run, calibrated):
    """One PNG at a time through the service's decoder: what a caller would send."""
    stored = calibrated.bundle.arrays(CALIBRATION)
    assert set(stored) == set(calibrated.manifest.scores) == EVERY
    assert calibrated.manifest.default_score == "combined"
    for name, scores in stored.items():
        definition = calibrated.manifest.scores[name]
        assert (definition.k, definition.seed) == (3, 9)
        single = [calibrated.score(decoded(image), definition).score[0] for image in split_pixels(run, "calibration")]
        np.testing.assert_array_equal(scores, np.sort(single))
        assert scores.dtype == np.float64


def split_pixels(run, split):
    return run.dataset.pixels(run.dataset.splits[split])


def decoded(image):
    buffer = io.BytesIO()
    Image.fromarray(image[0]).save(buffer, format="PNG")
    rule = Preprocessing(mode="L", height=6, width=5)
    return decode_image(buffer.getvalue(), rule, ImageLimits(10_000, 100))[None].astype(np.float32) / np.float32(255)


def test_every_grey_level_is_the_same_number_in_training_and_serving():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    np.testing.assert_array_equal(to_unit(levels).numpy(), (levels / 255).astype(np.float32))
    np.testing.assert_array_equal(to_unit(levels).numpy(), unit_levels(levels))


def test_suspects_are_named_as_their_source_calls_them(run, calibrated, monkeypatch):
    """By their place in the array; scores.npz keeps the order in which they can be found again."""
    archive = dict(np.load(run.folder / SCORES))
    split = run.dataset.splits["calibration"]
    rows = split[archive[ORDER]]
    scores = calibrated.score(unit_levels(run.dataset.pixels(rows))).score
    np.testing.assert_array_equal(scores, archive["calibration.combined"])
    found = Contamination(len(rows), 2, np.array([len(rows) - 1, len(rows) - 2]), 0.001, "look")
    monkeypatch.setattr("training.export.calibrate.contamination", lambda _: found)
    message, names = suspects(run)
    assert (message, names) == ("look", [f"tiny.npy[{row}]" for row in rows[::-1][:2]])


def test_the_realised_rates_can_be_counted_again_from_the_test_scores(run, calibrated):
    calibration, calibrator = calibrated.manifest.calibration, Calibrator.from_bundle(calibrated.bundle)
    with np.load(run.folder / SCORES) as archive:
        saved = dict(archive)
    assert calibration.n_test == len(run.dataset.splits["test"])
    assert calibration.n == len(run.dataset.splits["calibration"])
    for name, rates in calibration.realised_false_positive_rate.items():
        scores = score_split(calibrated, run.dataset, "test", [name])[name]
        np.testing.assert_array_equal(scores, saved[f"test.{name}"])
        assert set(rates) == {"0.01", "0.05", "0.1"}, "270 held-out images cannot answer 0.1%"
        for rate, share in rates.items():
            assert share == np.mean(scores >= calibrator.threshold(name, float(rate)))


def test_a_calibrated_bundle_verifies_and_a_second_time_gives_the_same(run, calibrated):
    report = verify_bundle(run.staged)
    assert report.ok, report.summary()
    calibrate(run)
    assert open_bundle(run.staged).digest == calibrated.digest


def test_rates_are_shares_of_test_scores_among_the_held_out():
    held_out = {"s": np.arange(999.0)}
    rates = realised(Calibrator(held_out), "s", np.concatenate([np.zeros(90), np.full(10, 1e9)]))
    assert rates == {"0.001": 0.1, "0.01": 0.1, "0.05": 0.1, "0.1": 0.1}
    assert realised(Calibrator(held_out), "s", np.array([950.0, 949.0, 1.0, 2.0]))["0.05"] == 0.25


def test_inliers_realise_the_asked_rate():
    random = np.random.RandomState(0)
    rates = summary({"s": np.sort(random.normal(size=20_000))}, {"s": random.normal(size=20_000)})
    for asked, found in rates["realised_false_positive_rate"]["s"].items():
        deviation = np.sqrt(2 * float(asked) / 20_000)
        assert abs(found - float(asked)) < 4 * deviation
    assert rates["quantiles"]["s"]["0.5"] == pytest.approx(0, abs=0.05)
