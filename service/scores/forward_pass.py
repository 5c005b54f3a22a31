"""Per-row outputs of a forward pass through encoder, decoder and joint, and statistics of them.

Sums run along a row's own axes alone, so that its numbers do not depend on the rows beside it, bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from service.bundle.manifest import Manifest
from service.scores.chunks import apply_in_chunks, in_chunks
from service.scores.code_length import code_lengths

ORDERS = (0.5, 1.0, 2.0, 4.0, np.inf)
"""Orders p of the norms: small ones are sensitive to many small differences, large ones to a few large ones."""
TINY = 1e-12
MIN_GRADIENT = 1e-3
"""A quarter of a grey level, added to a mean gradient before its logarithm: below it images are equally flat."""
MIN_CODE = 35.0
"""Nats added to a code length before its logarithm."""


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """Outputs of encoder, decoder and joint for N rows at K posterior samples.

    ``x`` and ``mean`` = E[x|z] at z = loc: float32 [N,C,H,W]. ``loc``, ``scale``: float32 [N,L]. ``log_p_x_given_z``,
    ``log_p_z``, ``log_q_z``: float64 [N,K], nats. ``distortion``: −log p(x|z) by place, its mean over the samples,
    float64 [N,C,H,W]. ``distortion_at_loc``: −log p(x|loc) by place, float32 [N,C,H,W].
    """

    x: np.ndarray
    mean: np.ndarray
    loc: np.ndarray
    scale: np.ndarray
    log_p_x_given_z: np.ndarray
    log_p_z: np.ndarray
    log_q_z: np.ndarray
    distortion: np.ndarray
    distortion_at_loc: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All fields, in their order: [N,…] each."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def log_w(self) -> np.ndarray:
        """Log importance weights log p(x|z) + log p(z) − log q(z|x), nats: float64 [N,K]."""
        return self.log_p_x_given_z + self.log_p_z - self.log_q_z

    @cached_property
    def code_lengths(self) -> np.ndarray:
        """Code lengths of the images x (service.scores.code_length), nats: float64 [N]."""
        return code_lengths(self.x)

    def first(self, k: int) -> ForwardPass:
        """The same rows at the first k of their samples; the distortion stays the mean over all samples."""
        if k == self.log_p_x_given_z.shape[1]:
            return self
        names = ("log_p_x_given_z", "log_p_z", "log_q_z")
        return replace(self, **{name: getattr(self, name)[:, :k] for name in names})

    def rows(self, at: slice) -> ForwardPass:
        """The rows in that slice."""
        return ForwardPass(*(array[at] for array in self.arrays))


StatisticsFunction = Callable[[ForwardPass, Manifest], dict[str, np.ndarray]]
"""Function that gives named statistics, float64 [N] each, of N rows of a model with that manifest."""


def norms(values: np.ndarray, orders: Sequence[float] = ORDERS) -> np.ndarray:
    """Logs of the power means (1/D Σ|v|^p)^(1/p) of rows [N,…], for each p of ``orders``: float64 [N,orders].

    The power mean of order ∞ is the largest |v|.
    """
    logs: np.ndarray = np.log(apply_in_chunks(lambda rows: _power_means(rows, orders), values))
    return logs


def _power_means(values: np.ndarray, orders: Sequence[float]) -> np.ndarray:
    size = np.abs(values.reshape(len(values), -1), dtype=np.float64)
    size += TINY
    return np.stack([_power_mean(size, p) for p in orders], axis=1)


def _power_mean(size: np.ndarray, p: float) -> np.ndarray:
    if p == np.inf:
        return np.asarray(size.max(axis=1))
    powers = (size * size) ** 2 if p == 4 else size**p  # numpy has fast paths for squares and roots, not for p = 4
    return np.asarray(powers.mean(axis=1) ** (1 / p))


def path_statistics(rows: ForwardPass, manifest: Manifest) -> dict[str, np.ndarray]:
    """Norms of x − x̂, μ(x) and σ(x), [N] each: the likelihood path (Huang et al. 2024, arXiv:2401.04933)."""
    parts = {"mu": rows.loc}
    if manifest.likelihood.pixelwise:
        parts["residual"] = rows.x - rows.mean
    if manifest.posterior.moments != "point":
        parts["sigma"] = rows.scale
    return {
        f"{name}_{p:g}": norm for name, part in parts.items() for p, norm in zip(ORDERS, norms(part).T, strict=True)
    }


def statistics(rows: ForwardPass, manifest: Manifest) -> dict[str, np.ndarray]:
    """Statistics of a row and of its forward pass, for a density of states (Morningstar et al. 2021), float64 [N] each.

    They are the parts of the bound in nats; logs of the residual's power means; for images and signals also logs of the
    mean steepness of x, x̂ and x − x̂, and for images of the code length. The manifest alone decides which there are.
    """
    values: dict[str, np.ndarray] = {}
    is_point = manifest.posterior.moments == "point"
    if manifest.has_distortion:
        values["distortion"] = -rows.log_p_x_given_z.mean(axis=1)
    if manifest.evidence != "none":
        values["prior"] = -rows.log_p_z.mean(axis=1)
        log_q_z = rows.log_q_z if is_point else rows.log_q_z - rows.log_p_z
        values["posterior" if is_point else "rate"] = log_q_z.mean(axis=1)
    residual = rows.x - rows.mean
    if manifest.likelihood.pixelwise:
        values |= {f"residual_{p:g}": norm for p, norm in zip(ORDERS[1:4], norms(residual, ORDERS[1:4]).T, strict=True)}
    if manifest.modelled.kind != "vector":
        values["steepness"] = steepness(rows.x)
        if manifest.likelihood.pixelwise:
            values |= {"steepness_mean": steepness(rows.mean), "steepness_residual": steepness(residual)}
    if manifest.modelled.kind == "image":
        values["code_length"] = np.log(rows.code_lengths + MIN_CODE)
    return values


def table(kind: StatisticsFunction, rows: ForwardPass, manifest: Manifest) -> np.ndarray:
    """Statistics of that kind as a table, float64 [N,S]: a line for each row, a column for each statistic."""
    return np.stack(list(kind(rows, manifest).values()), axis=1)


def statistic_names(kind: StatisticsFunction, manifest: Manifest) -> tuple[str, ...]:
    """Names of the statistics that ``path_statistics`` or ``statistics`` computes for such a model, in their order."""
    pixel, number = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    blank = ForwardPass(pixel, pixel, number, number, number, number, number, pixel, pixel)
    return tuple(kind(blank, manifest))


@in_chunks
def steepness(x: np.ndarray) -> np.ndarray:
    """Log of the mean absolute difference of neighbours, down plus across, of rows [N,C,H,W]: float64 [N].

    A row without differences has log MIN_GRADIENT.
    """
    values = x.astype(np.float64)
    total = np.zeros(len(x))
    for before, after in ((values[:, :, :-1], values[:, :, 1:]), (values[..., :-1], values[..., 1:])):
        steps = after - before
        if steps.size:
            total += np.abs(steps, out=steps).reshape(len(x), -1).mean(axis=1)
    logs: np.ndarray = np.log(total + MIN_GRADIENT)
    return logs
