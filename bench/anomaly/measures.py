"""How well scores tell outliers from inliers, and whether p-values keep their word."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

RATE = 0.01
SPLITS = 5


def auroc(inliers: np.ndarray, outliers: np.ndarray) -> float:
    """Area under the ROC curve: P(outlier scores higher) + ½ P(equal); scores of any shape, higher is anomalous."""
    scores = np.concatenate([inliers.ravel(), outliers.ravel()])
    return float(roc_auc_score(np.arange(len(scores)) >= inliers.size, scores))


def pixel_auroc(inlier_maps: np.ndarray, maps: np.ndarray, masks: np.ndarray) -> float:
    """AUROC over pixels: those in ``masks`` [M,H,W] against all others, of outliers [M,H,W] and inliers [N,H,W]."""
    return auroc(np.concatenate([inlier_maps.ravel(), maps[~masks]]), maps[masks])


class Rates(NamedTuple):
    """Of ``n`` unseen inliers judged by ``n_calibration`` others.

    ``rate`` is the share of p ≤ RATE, ``standard_error`` that of it where both are drawn from one distribution, ``ks``
    the P-value of the Kolmogorov–Smirnov test that they are.
    """

    rate: float
    standard_error: float
    ks: float
    n: int
    n_calibration: int


def rates(p_values: np.ndarray, calibration: np.ndarray, scores: np.ndarray) -> Rates:
    """Of unseen inliers' ``p_values`` [n] and ``scores`` [n], against the sorted ``calibration`` scores.

    The standard error is both samples', √(α(1 − α)(1/n + 1/n_calibration)): given one calibration set, p-values are
    uniform only on average over such sets. For the same reason uniformity is tested by the two-sample test on scores,
    which is the one-sample test on p-values with the calibration's own scatter taken into account.
    """
    error = math.sqrt(RATE * (1 - RATE) * (1 / len(scores) + 1 / len(calibration)))
    ks = float(stats.ks_2samp(calibration, scores).pvalue)
    return Rates(float(np.mean(p_values <= RATE)), error, ks, len(scores), len(calibration))


def resplit(calibration: np.ndarray, scores: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Calibration and unseen scores pooled and drawn anew, in the same numbers: exchangeable whatever they were."""
    pool = np.random.RandomState(seed).permutation(np.concatenate([calibration, scores]))
    return np.sort(pool[: len(calibration)]), pool[len(calibration) :]
