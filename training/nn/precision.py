"""Where rounding to bfloat16 must not happen."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(z: Tensor) -> AbstractContextManager[object]:
    """A context that turns autocast off on z's device, where it is on.

    A map rounded to bfloat16 is not the inverse of its inverse, nor the one that its Jacobian is of.
    """
    kind = z.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
