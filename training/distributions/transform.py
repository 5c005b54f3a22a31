"""Maps of random numbers with tractable Jacobians."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Transform(ABC):
    """A map whose ladj, the log absolute determinant of its Jacobian, log |det ∂y/∂x|, is tractable."""

    @abstractmethod
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> y, log |det ∂y/∂x| in nats, float64: one for each row, or 0-dim where it is the same for all."""
