"""What one pass through the graphs tells of each row, and the statistics that scores are made of.

Every function works on one row at a time, so that a row's numbers do not depend on its neighbours, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from service.bundle import Manifest
from service.codelength import code_length

ORDERS = (0.5, 1.0, 2.0, 4.0, np.inf)
"""Of the norms of the likelihood path: small ones see many small differences, large ones a few large ones."""
TINY = 1e-12
LEAST_GRADIENT = 1e-3  # a quarter of a grey level: below it pictures are equally flat
LEAST_CODE = 35.0  # nats


class Measured(NamedTuple):
    """N rows through encoder, decoder and density at K posterior samples.

    ``x`` and ``mean`` = E[x|z] at z = loc: float32 [N,C,H,W]. ``loc``, ``scale``: float32 [N,L]. ``log_p_x``,
    ``log_p_z``, ``log_q``: float64 [N,K], nats. ``distortion``: −log p(x|z) by place, its mean over the samples,
    float64 [N,C,H,W]. ``distortion_at_loc``: −log p(x|loc) by place, float32 [N,C,H,W].
    """

    x: np.ndarray
    mean: np.ndarray
    loc: np.ndarray
    scale: np.ndarray
    log_p_x: np.ndarray
    log_p_z: np.ndarray
    log_q: np.ndarray
    distortion: np.ndarray
    distortion_at_loc: np.ndarray

    @property
    def log_w(self) -> np.ndarray:
        """log p(x|z) + log p(z) − log q(z|x): float64 [N,K]."""
        return self.log_p_x + self.log_p_z - self.log_q

    def first(self, k: int) -> Measured:
        """The same rows at the first k of their samples (the distortion's mean stays that of all)."""
        return self._replace(log_p_x=self.log_p_x[:, :k], log_p_z=self.log_p_z[:, :k], log_q=self.log_q[:, :k])

    def row(self, index: int) -> Row:
        """One of the rows."""
        return Row(*(values[index] for values in self))


class Row(NamedTuple):
    """One row of Measured: the same arrays without their first axis."""

    x: np.ndarray
    mean: np.ndarray
    loc: np.ndarray
    scale: np.ndarray
    log_p_x: np.ndarray
    log_p_z: np.ndarray
    log_q: np.ndarray
    distortion: np.ndarray
    distortion_at_loc: np.ndarray


Statistics = Callable[[Row, Manifest], dict[str, float]]


def norms(values: np.ndarray) -> list[float]:
    """log of the power means (1/D Σ|v|^p)^(1/p) of the numbers, for each p of ORDERS; the last is the largest |v|."""
    size = np.abs(values.ravel()).astype(np.float64) + TINY
    return [float(np.log(size.max() if p == np.inf else (size**p).mean() ** (1 / p))) for p in ORDERS]


def path_statistics(row: Row, manifest: Manifest) -> dict[str, float]:
    """Norms of x − x̂, μ(x) and σ(x): the likelihood path (Huang et al. 2024, arXiv:2401.04933)."""
    parts = {"mu": row.loc}
    if manifest.likelihood.pixelwise:
        parts["residual"] = row.x - row.mean
    if manifest.posterior.moments != "point":
        parts["sigma"] = row.scale
    return {f"{name}_{p:g}": norm for name, part in parts.items() for p, norm in zip(ORDERS, norms(part), strict=True)}


def statistics(row: Row, manifest: Manifest) -> dict[str, float]:
    """What the model and the row itself tell in a few numbers, in the manner of density of states (Morningstar 2021).

    The parts of the bound in nats; logs of the residual's power means; of pictures and signals also logs of the mean
    steepness of x, x̂ and x − x̂, and of a picture's code length. Which there are depends on the manifest alone.
    """
    found: dict[str, float] = {}
    is_point = manifest.posterior.moments == "point"
    if manifest.tells_distortion:
        found["distortion"] = float(-row.log_p_x.mean())
    if manifest.evidence != "none":
        found["prior"] = float(-row.log_p_z.mean())
        found["posterior" if is_point else "rate"] = float(
            row.log_q.mean() if is_point else (row.log_q - row.log_p_z).mean()
        )
    residual = row.x - row.mean
    if manifest.likelihood.pixelwise:
        found |= {f"residual_{p:g}": norm for p, norm in zip(ORDERS[1:4], norms(residual)[1:4], strict=True)}
    if manifest.modelled.kind != "vector":
        found["steepness"] = steepness(row.x)
        if manifest.likelihood.pixelwise:
            found |= {"steepness_mean": steepness(row.mean), "steepness_residual": steepness(residual)}
    if manifest.modelled.kind == "image":
        found["code_length"] = float(np.log(code_length(row.x) + LEAST_CODE))
    return found


def statistic_names(kind: Statistics, manifest: Manifest) -> tuple[str, ...]:
    """The names, in order, that ``path_statistics`` or ``statistics`` gives to any row of such a model."""
    pixel, one = np.zeros((1, 1, 1), np.float32), np.zeros(1, np.float32)
    return tuple(kind(Row(pixel, pixel, one, one, one, one, one, pixel, pixel), manifest))


def steepness(x: np.ndarray) -> float:
    """log of the mean absolute difference of neighbours, down plus across, of one row [C,H,W]; 0 for no difference."""
    values = x.astype(np.float64)
    down, across = (np.abs(np.diff(values, axis=axis)) for axis in (1, 2))
    return float(np.log(sum(d.mean() for d in (down, across) if d.size) + LEAST_GRADIENT))
