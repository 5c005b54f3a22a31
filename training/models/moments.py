"""Moments of targets in one pass over their batches, and the decompositions that the linear models share: float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from training.errors import DataError
from training.models.likelihood import Likelihood

DITHER_VARIANCE = 1 / (12 * 256**2)
"""Of u/256 for the uniform u that dequantises 8-bit pixels."""


@dataclass(frozen=True)
class Moments:
    """Mean [D] and covariance [D,D] of ``count`` rows, divided by ``count`` as maximum likelihood has it."""

    count: int
    mean: Tensor
    covariance: Tensor


def moments_of(batches: Iterable[Tensor]) -> Moments:
    """Moments of the rows of all batches [B,D], which are merged pairwise (Chan et al. 1983), in D² memory.

    Raises DataError: no rows.
    """
    count = 0
    mean = scatter = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        rows = batch.double()
        centre = rows.mean(0)
        step = centre - mean
        size = len(rows)
        centred = rows - centre
        scatter = scatter + centred.T @ centred + torch.outer(step, step) * (count * size / (count + size))
        mean = mean + step * (size / (count + size))
        count += size
    if not count:
        raise DataError("the training split holds no rows, at least one expected")
    return Moments(count, mean, scatter / count)


def first_rows(batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The first ``count`` rows of those batches, or all where there are fewer."""
    for batch in batches:
        if count <= 0:
            return
        yield batch[:count]
        count -= len(batch)


def target_batches(
    batches: Iterable[Tensor], likelihood: Likelihood, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Flat targets, float32 [B,D], of batches of values [B,C,H,W].

    Where the likelihood dithers, the dither is drawn from ``generator``, or is at its mean ½ without one.
    """
    for x in batches:
        dither = torch.full_like(x, 0.5) if generator is None else torch.rand(x.shape, generator=generator)
        yield likelihood.target(x, dither if likelihood.dither else None).flatten(1)


def target_moments(batches: Iterable[Tensor], likelihood: Likelihood) -> Moments:
    """Moments of the targets of those values; what the dither of dequantisation adds is added as its expectation."""
    moments = moments_of(target_batches(batches, likelihood))
    if not likelihood.dither:
        return moments
    return Moments(moments.count, moments.mean, moments.covariance + DITHER_VARIANCE * torch.eye(len(moments.mean)))


@dataclass(frozen=True)
class Axes:
    """Mean [D] of ``count`` rows, the variances [D] along their principal axes, largest first, and these, [D,R] in
    columns with the largest entry of each positive. Beyond the R axes the rows do not vary but for their dither."""

    count: int
    mean: Tensor
    variances: Tensor
    axes: Tensor


def target_axes(batches: Iterable[Tensor], count: int, likelihood: Likelihood) -> Axes:
    """Principal axes of the targets of ``count`` rows; the dither enters as in ``target_moments``.

    Of N rows of more than N numbers they come from the rows themselves, in N·D memory: the covariance of a backbone's
    map is D×D, 20 GB of float64 where D is 50,000. Raises DataError: no rows.
    """
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise DataError("the training split holds no rows, at least one expected")
    batches = itertools.chain([first], batches)
    if count >= first[0].numel():
        moments = target_moments(batches, likelihood)
        return Axes(moments.count, moments.mean, *principal_axes(moments.covariance))
    rows = torch.cat(list(target_batches(batches, likelihood))).double()
    mean = rows.mean(0)
    _, lengths, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    variances = torch.zeros_like(mean)
    variances[: len(lengths)] = lengths**2 / len(rows)
    return Axes(len(rows), mean, variances + DITHER_VARIANCE * likelihood.dither, _oriented(axes.T))


def principal_axes(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Variances [D], largest first, and axes [D,D] in columns, the largest entry of each positive."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0).clamp(min=0), _oriented(vectors.flip(1))


def _oriented(vectors: Tensor) -> Tensor:
    """Columns with the largest entry of each positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
