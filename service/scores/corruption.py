"""Score of images that look painted over at some place, learned from inliers and noise without label or outlier.

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
"""Batch sizes to try: one row of a U-Net keeps a processor busy, and each size costs trials when the service starts."""

UNIT = "nats"
"""Unit of the score and of its map."""
LOW, HIGH = -5.0, 5.0
"""First and last colour of the map, nats: odds of about 1:150 and 150:1.

Odds mean the same for every model, so that nothing needs to be fitted.
"""


def corruption_scores(log_odds: np.ndarray) -> np.ndarray:
    """Scores in nats, float64 [N], of log odds t, float32 [N,H,W]: the largest of each row."""
    return log_odds.reshape(len(log_odds), -1).max(axis=1).astype(np.float64)
