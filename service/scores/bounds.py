"""Bounds on log p(x) from importance weights log w = log p(x|z) + log p(z) − log q(z|x) at sampled z. Float64, nats.

Where a model has no likelihood, or its reconstruction alone is asked for, log p(x|z) stands for log w.

Only sampled weights enter: a log-mean-exp with an analytic KL divergence inside would bound nothing.
"""

from __future__ import annotations

import numpy as np


def mean(log_w: np.ndarray) -> np.ndarray:
    """(1/k) Σ log w_i over the last axis, [N,k] -> [N]: the ELBO, or the mean reconstruction term."""
    return log_w.mean(axis=-1)


def log_mean_exp(log_w: np.ndarray) -> np.ndarray:
    """log (1/k) Σ w_i over the last axis, [N,k] -> [N] (Burda et al. 2016, eq. 8); −inf where every weight is zero."""
    top = log_w.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(log_w - top).mean(axis=-1)) + top[..., 0]


def standard_error(log_w: np.ndarray, estimator: str) -> np.ndarray:
    """Monte-Carlo standard error of the estimate, [N,k] -> [N]; NaN when k = 1, since one sample tells no spread.

    ``elbo``, ``reconstruction``: s(log w)/√k, a mean's. ``iwae``: s(w/w̄)/√k, the delta method for log w̄.
    """
    k = log_w.shape[-1]
    if k == 1:
        return np.full(log_w.shape[:-1], np.nan)
    if estimator == "iwae":
        log_w = np.exp(log_w - log_mean_exp(log_w)[..., None])
    return log_w.std(axis=-1, ddof=1) / np.sqrt(k)


def bits_per_dim(bound: np.ndarray, dimensions: int, measure: str) -> np.ndarray:
    """Bits per dimension −bound/(D ln 2) of a bound in nats, float64 [N], over D ``dimensions``.

    A density over [0, 1] (``measure`` "lebesgue") is stated for 8-bit pixels, one of 256 levels wide: 8 bits more.
    """
    return -bound / (dimensions * np.log(2)) + (8.0 if measure == "lebesgue" else 0.0)
