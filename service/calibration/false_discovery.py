"""False-discovery control over a batch: of the images called anomalies at most the asked share are inliers, on average.

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
    """Benjamini–Hochberg adjusted p-values of a batch, float64 [N]: min over j ≥ rank of N p_(j) / j, at most 1.

    A q-value is the smallest rate at which its image would be called; it depends on the whole batch.
    Raises InvalidInput unless every p-value is of [0, 1].
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
    """Which images of a batch are anomalies at the false-discovery rate ``rate``: bool [N], ``q_values`` ≤ rate.

    Raises InvalidInput for p-values outside [0, 1] or a rate outside (0, 1).
    """
    return q_values(p_values) <= _checked(rate)


def least_discoveries(n: int, batch: int, rate: float) -> int:
    """How many of ``batch`` images must have the smallest p-value, 1/(n + 1), before any is called: ⌈batch/rate/(n+1)⌉.

    Above 1, a single anomaly in the batch cannot be found at this rate, however extreme: more calibration images,
    a smaller batch or a larger rate are needed. Above ``batch``, none ever is.
    """
    return max(1, math.ceil(batch / (_checked(rate) * (n + 1))))


def _checked(rate: float) -> float:
    if not 0 < rate < 1:
        raise InvalidInput(f"false_discovery_rate is {rate}, expected a number between 0 and 1")
    return float(rate)
