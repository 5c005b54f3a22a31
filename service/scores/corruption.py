"""Which places of an image look painted over: a score learned from inliers and noise, with no label and no outlier.

corruption.onnx was trained on inliers x that had noise painted over parts of them. At each place i it gives, in nats,

    t(x)_i = log p(painted at i | x) − log p(not painted at i | x)

An odds is a ratio of densities, here of painted images to untouched ones, up to the share that was painted: estimated
by classification (Gutmann & Hyvärinen 2010, AISTATS; Sugiyama, Suzuki & Kanamori 2012, Density Ratio Estimation in
Machine Learning). Zavrtanik et al. 2021 (DRAEM, arXiv:2108.07610) localise anomalies by such a classifier.

The score is max over i of t(x)_i, the odds of the place that looks painted most; the map is t(x) itself.
"""

from __future__ import annotations

import numpy as np

SIZES = (1, 8)
"""Rows at once. A U-Net's one row is work enough for a processor, and every size costs its trials at the start."""

UNIT = "nats"
"""Of score and map."""
LOW, HIGH = -5.0, 5.0
"""The map's first and last colour, nats: odds of about 1:150 and 150:1. Odds mean the same of every model, so that
nothing is fitted."""


def corruption_scores(log_odds: np.ndarray) -> np.ndarray:
    """Scores in nats, float64 [N], of t, float32 [N,H,W]."""
    return log_odds.reshape(len(log_odds), -1).max(axis=1).astype(np.float64)
