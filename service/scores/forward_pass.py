"""What one pass through the graphs tells of each row, and the statistics that scores are made of.

Functions of many rows sum along a row's own axes alone, so that its numbers do not depend on its neighbours, bitwise.
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
"""Of the norms of the likelihood path: small ones see many small differences, large ones a few large ones."""
TINY = 1e-12
LEAST_GRADIENT = 1e-3  # a quarter of a grey level: below it pictures are equally flat
LEAST_CODE = 35.0  # nats


@dataclass(frozen=True, eq=False)
class ForwardPass:
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
    def arrays(self) -> tuple[np.ndarray, ...]:
        """All of them, in their order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def log_w(self) -> np.ndarray:
        """log p(x|z) + log p(z) − log q(z|x): float64 [N,K]."""
        return self.log_p_x + self.log_p_z - self.log_q

    @cached_property
    def code_lengths(self) -> np.ndarray:
        """Of the images x, nats: float64 [N]."""
        return code_lengths(self.x)

    def first(self, k: int) -> ForwardPass:
        """The same rows at the first k of their samples (the distortion's mean stays that of all)."""
        if k == self.log_p_x.shape[1]:
            return self
        return replace(self, log_p_x=self.log_p_x[:, :k], log_p_z=self.log_p_z[:, :k], log_q=self.log_q[:, :k])

    def rows(self, at: slice) -> ForwardPass:
        """Some of the rows."""
        return ForwardPass(*(array[at] for array in self.arrays))


StatisticsFunction = Callable[[ForwardPass, Manifest], dict[str, np.ndarray]]


def norms(values: np.ndarray, orders: Sequence[float] = ORDERS) -> np.ndarray:
    """Of rows [N,…], log of the power means (1/D Σ|v|^p)^(1/p) for each p of ``orders``: float64 [N,orders].

    That of p = ∞ is the largest |v|.
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
    powers = (size * size) ** 2 if p == 4 else size**p  # numpy knows squares and roots by themselves, no fourth power
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
    """What the model and a row itself tell in a few numbers, in the manner of density of states (Morningstar 2021).

    The parts of the bound in nats; logs of the residual's power means; of pictures and signals also logs of the mean
    steepness of x, x̂ and x − x̂, and of a picture's code length; float64 [N] each. Which there are depends on the
    manifest alone.
    """
    found: dict[str, np.ndarray] = {}
    is_point = manifest.posterior.moments == "point"
    if manifest.has_distortion:
        found["distortion"] = -rows.log_p_x.mean(axis=1)
    if manifest.evidence != "none":
        found["prior"] = -rows.log_p_z.mean(axis=1)
        log_q = rows.log_q if is_point else rows.log_q - rows.log_p_z
        found["posterior" if is_point else "rate"] = log_q.mean(axis=1)
    residual = rows.x - rows.mean
    if manifest.likelihood.pixelwise:
        found |= {f"residual_{p:g}": norm for p, norm in zip(ORDERS[1:4], norms(residual, ORDERS[1:4]).T, strict=True)}
    if manifest.modelled.kind != "vector":
        found["steepness"] = steepness(rows.x)
        if manifest.likelihood.pixelwise:
            found |= {"steepness_mean": steepness(rows.mean), "steepness_residual": steepness(residual)}
    if manifest.modelled.kind == "image":
        found["code_length"] = np.log(rows.code_lengths + LEAST_CODE)
    return found


def table(kind: StatisticsFunction, rows: ForwardPass, manifest: Manifest) -> np.ndarray:
    """A line for each row, a column for each of its statistics of that kind: float64 [N,S]."""
    return np.stack(list(kind(rows, manifest).values()), axis=1)


def statistic_names(kind: StatisticsFunction, manifest: Manifest) -> tuple[str, ...]:
    """The names, in order, that ``path_statistics`` or ``statistics`` gives to any row of such a model."""
    pixel, one = np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    return tuple(kind(ForwardPass(pixel, pixel, one, one, one, one, one, pixel, pixel), manifest))


@in_chunks
def steepness(x: np.ndarray) -> np.ndarray:
    """log of the mean absolute difference of neighbours, down plus across, of rows [N,C,H,W]: float64 [N].

    Of a row without differences log LEAST_GRADIENT.
    """
    values = x.astype(np.float64)
    total = np.zeros(len(x))
    for before, after in ((values[:, :, :-1], values[:, :, 1:]), (values[..., :-1], values[..., 1:])):
        steps = after - before
        if steps.size:
            total += np.abs(steps, out=steps).reshape(len(x), -1).mean(axis=1)
    logs: np.ndarray = np.log(total + LEAST_GRADIENT)
    return logs
