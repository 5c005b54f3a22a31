"""Rows, latents and definitions that the tests of a model share."""

from __future__ import annotations

import tracemalloc

import numpy as np

from service.bundle.manifest import ScoreDefinition
from tests.ppca_bundle import images

X = images(45, seed=9)
Z = np.random.RandomState(5).standard_normal((45, 5)).astype(np.float32)


def definition(estimator: str = "elbo", k: int = 4, seed: int = 0) -> ScoreDefinition:
    return ScoreDefinition(estimator=estimator, k=k, seed=seed)


def peak(work) -> int:
    """Bytes that numpy and Python held at most, beyond what stood before."""
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most
