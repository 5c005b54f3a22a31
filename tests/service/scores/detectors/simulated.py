"""Simulated forward passes: what detectors are fitted to and score, without a model."""

from __future__ import annotations

import numpy as np

from service.bundle.manifest import ScoreDefinition
from service.scores.forward_pass import ForwardPass


def definition(estimator: str, method: str | None = None) -> ScoreDefinition:
    return ScoreDefinition(estimator=estimator, k=2, seed=0, method=method)


def simulated(
    x: np.ndarray, surprisal: np.ndarray | None = None, distortion: np.ndarray | None = None, seed: int = 0
) -> ForwardPass:
    """A pass of random numbers but for x, −elbo [N] and −log p(x|z) by place [N,C,H,W]; k = 2."""
    random, n = np.random.RandomState(seed), len(x)
    mean = (x + 0.1 * random.standard_normal(x.shape)).astype(np.float32)
    loc, scale = random.standard_normal((n, 5)), np.exp(0.1 * random.standard_normal((n, 5)))
    places = np.square(x - mean, dtype=np.float64) * 50 if distortion is None else distortion
    log_p_x = np.stack([-places.sum(axis=(1, 2, 3))] * 2, axis=1)
    log_p_z, log_q = random.standard_normal((2, n, 2))
    if surprisal is not None:
        log_q = log_p_x + log_p_z + surprisal[:, None]
    return ForwardPass(
        x, mean, loc.astype(np.float32), scale.astype(np.float32), log_p_x, log_p_z, log_q, places, places
    )


def in_parts(measured: ForwardPass, size: int = 7) -> list[ForwardPass]:
    return [measured.rows(slice(i, i + size)) for i in range(0, len(measured.x), size)]
