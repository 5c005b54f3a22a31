"""The manifest and the inliers that the tests of all detectors share."""

from __future__ import annotations

import pytest

from service.bundle.manifest import Manifest
from service.scores.forward_pass import ForwardPass
from tests.ppca_bundle import images
from tests.service.scores.detectors.simulated import simulated


@pytest.fixture(scope="module")
def manifest(model) -> Manifest:
    return model.manifest


@pytest.fixture(scope="module")
def inliers() -> ForwardPass:
    return simulated(images(150))
