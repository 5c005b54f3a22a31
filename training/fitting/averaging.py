"""The moving average of the weights, which is what is validated and kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]


def average_decay(decay: float, half_at: int, updates: int, taken: int = 1) -> float:
    """The average's decay for the last ``taken`` of so many ``updates`` together.

    The decay of the u-th update is u / (``half_at`` + u), at most ``decay``: short runs are not all start.
    """
    kept: float = min(decay, updates / (half_at + updates)) ** taken
    return kept


class MovingAverage:
    """An exponential moving average of a module's parameters, which are averaged once in ``every`` updates.

    The first average is a copy. ``pending``: updates since the last one, which the next takes in.
    """

    def __init__(self, module: nn.Module, decay: float, half_at: int, every: int = 1) -> None:
        self._module, self._decay, self._half_at, self._every = module, decay, half_at, every
        self._averaged = AveragedModel(module, multi_avg_fn=self._blend)
        self._updates = 0
        self.pending = 0

    @property
    def averaged(self) -> nn.Module:
        """A copy of the module with the averaged weights."""
        return self._averaged.module

    def update(self, updates: int) -> None:
        """Count an update of the module's weights, the ``updates``-th, and average them if it is due."""
        self.pending += 1
        if self.pending >= self._every:
            self.catch_up(updates)

    def catch_up(self, updates: int) -> None:
        """Average the weights as they are, after so many updates in all, if any is pending."""
        if self.pending:
            self._updates = updates
            self._averaged.update_parameters(self._module)
            self.pending = 0

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights, and how often they were averaged; ``pending`` is the caller's to keep."""
        return self._averaged.state_dict()

    def load_state_dict(self, stored: dict[str, Any], pending: int = 0) -> None:
        """Restore what ``state_dict`` gave."""
        self._averaged.load_state_dict(stored)
        self.pending = pending

    def _blend(self, averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        decay = average_decay(self._decay, self._half_at, self._updates, self.pending)
        get_ema_multi_avg_fn(decay)(averaged, current, count)
