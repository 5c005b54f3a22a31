"""Where rounding to bfloat16 must not happen."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(z: Tensor) -> AbstractContextManager[object]:
    """Where autocast is on, a context that turns it off on z's device.

    A map rounded to bfloat16 is not the inverse of its inverse, nor the one that its Jacobian is of.
    """
    kind = z.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
