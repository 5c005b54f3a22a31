"""The protocol of the distributions: a tuple of parameters with a density, a mean, and draws as functions of noise."""

from __future__ import annotations

from typing import Protocol, TypeVar, cast

from torch import Tensor

D = TypeVar("D", bound="Distribution")


class Distribution(Protocol):
    """A NamedTuple of parameters (tensors of one shape that broadcasts against values).

    Everything is plain tensor algebra, so that it exports to ONNX as it stands, and randomness is an input.
    """

    @property
    def mean(self) -> Tensor:
        """E[x]."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), element by element, in nats."""

    def sample(self, noise: Tensor) -> Tensor:
        """A draw of x, as a function of noise whose distribution the class names."""


def unflattened(distribution: D, sizes: tuple[int, ...]) -> D:
    """Give parameters [M,...] of M = N·K rows the first two axes [N,K,...]."""
    parameters = cast("tuple[Tensor, ...]", distribution)
    return type(distribution)(*(value.unflatten(0, sizes) for value in parameters))
