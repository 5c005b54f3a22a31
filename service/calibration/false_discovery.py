"""False-discovery control over a batch: on average, at most a given share of the images called anomalies are inliers.

Conformal p-values share one calibration set and so depend on each other, but positively (PRDS: Bates et al. 2023,
Theorem 2), and under PRDS the procedure of Benjamini & Hochberg (1995) keeps its promise (Benjamini & Yekutieli 2001,
Theorem 1.2): E[false / max(1, called)] ≤ rate · (share of inliers in the batch). P-values of several groups, each
against its own calibration, are PRDS too: those of different groups are independent.
"""

from __future__ import annotations

import math

import numpy as np

from service.errors import InvalidInput


def q_values(p_values: np.ndarray) -> np.ndarray:
    """Return the Benjamini–Hochberg adjusted p-values of a batch, float64 [N]: min over j ≥ rank of N p_(j) / j, ≤ 1.

    A q-value is the smallest rate at which its image would be called an anomaly; it depends on the whole batch.

    Raises:
        InvalidInput: a p-value is outside [0, 1].
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise InvalidInput("p-values: expected [N], each from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(adjusted[::-1])[::-1], 1.0)
    return q


def benjamini_hochberg(p_values: np.ndarray, rate: float) -> np.ndarray:
    """Call the images of a batch anomalies at a false-discovery rate, bool [N]: those with ``q_values`` ≤ ``rate``.

    Raises:
        InvalidInput: a p-value is outside [0, 1], or the rate outside (0, 1).
    """
    return q_values(p_values) <= _checked(rate)


def min_discoveries(n: int, batch: int, rate: float) -> int:
    """Return ⌈batch/rate/(n + 1)⌉, the images that must have the smallest p-value, 1/(n + 1), before any is called.

    If it is above 1, a single anomaly in the batch is never called at this rate, however extreme it is: that takes more
    calibration images, a smaller batch or a larger rate. If it is above ``batch``, none ever is.

    Args:
        n: number of calibration scores.
        batch: number of images.
        rate: false-discovery rate.

    Raises:
        InvalidInput: the rate is outside (0, 1).
    """
    return max(1, math.ceil(batch / (_checked(rate) * (n + 1))))


def _checked(rate: float) -> float:
    if not 0 < rate < 1:
        raise InvalidInput(f"false_discovery_rate is {rate}, expected a number between 0 and 1")
    return float(rate)
