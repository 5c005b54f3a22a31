"""The bundles that come with the repository: verified, small, and as good as their cards say."""

import os
from pathlib import Path

import numpy as np
import pytest

from service.bundle.files import open_bundle
from service.bundle.manifest import ScoreDefinition
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.inference.verification import verify_bundle
from service.pixels import unit_levels
from training.config import DataConfig
from training.data import load_dataset

EXPORTED = Path(__file__).parents[1] / "exported"
SHIPPED = {"mnist/5": "bernoulli", "fashion-mnist/6": "discretised_logistic", "ppca/3": "gaussian"}
FLOOR = -82.43
"""Nats: the published VampPrior with one stochastic layer on dynamic MNIST (Norouzi et al. 2020, table 1)."""


@pytest.fixture(params=sorted(SHIPPED))
def path(request):
    return EXPORTED / request.param


def test_no_other_bundle_is_shipped():
    assert {str(found.parent.relative_to(EXPORTED)) for found in EXPORTED.rglob("manifest.json")} == set(SHIPPED)


def test_it_verifies(path):
    report = verify_bundle(path)
    assert report.ok, report.summary()


def test_it_is_small(path):
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 15_000_000


def test_it_was_trained_evaluated_and_calibrated_on_all_of_the_data(path):
    manifest = open_bundle(path).manifest
    assert manifest.provenance.data["splits"] == {
        "train": 54_000,
        "validation": 3_000,
        "calibration": 3_000,
        "test": 10_000,
    }
    assert manifest.provenance.metrics["test"]["images"] == 10_000
    assert manifest.calibration is not None
    assert (manifest.calibration.n, manifest.calibration.n_test) == (3_000, 10_000)
    assert manifest.likelihood.family == SHIPPED[f"{manifest.name}/{manifest.version}"]
    assert "dirty" not in (manifest.provenance.commit or "")


def test_realised_false_positive_rates_are_what_was_asked(path):
    """On 10,000 unseen inliers, within four standard deviations of the chance of both splits."""
    calibration = open_bundle(path).manifest.calibration
    assert calibration is not None
    for rates in calibration.realised_false_positive_rate.values():
        for asked, realised in rates.items():
            rate = float(asked)
            chance = np.sqrt(rate * (1 - rate) * (1 / calibration.n + 1 / calibration.n_test))
            assert realised <= rate + 4 * chance


def test_mnist_reaches_the_published_floor():
    metrics = open_bundle(EXPORTED / "mnist" / "5").manifest.provenance.metrics["test"]
    assert metrics["k"] == 5000
    assert metrics["log_likelihood"] >= FLOOR


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_served_graphs_give_the_cards_log_likelihood(path):
    """IWAE-500 of 500 test images through onnxruntime: within four standard errors, and a little of k, of the card."""
    manifest = open_bundle(path).manifest
    config = DataConfig(source=manifest.provenance.data["name"])
    if directory := os.environ.get("VAETRAIN_DATA_DIR"):
        config = config.model_copy(update={"directory": Path(directory)})
    dataset = load_dataset(config)
    assert dataset.fingerprint == manifest.provenance.data["fingerprint"]
    model = Model.load(open_bundle(path), Runtime())
    x = unit_levels(dataset.pixels(dataset.splits["test"][:500]))
    scores = model.score(x, ScoreDefinition(estimator="iwae", k=500, seed=1))
    error = scores.log_likelihood.std() / np.sqrt(len(x))
    stated = manifest.provenance.metrics["test"]["log_likelihood"]
    assert abs(scores.log_likelihood.mean() - stated) < 4 * error + 1
