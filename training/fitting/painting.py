"""Images with noise painted over parts of them, and where: what training.fitting.corruption learns to tell apart.

No defect of any kind is drawn. Where the noise lies is a Gaussian random field above a threshold, smooth on a scale
that is drawn anew with every call in both directions: specks, streaks, large areas. What it is comes from uniform
numbers or from the images themselves: masking and salt-and-pepper noise (Vincent et al. 2010, sec. 3.3) of every size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

UNPAINTED = 0.15  # of the images
MIN_SHARE, MAX_SHARE = 0.01, 0.3  # of an image's places, of which a share is drawn log-uniformly
MIN_OPACITY = 0.4
COARSEST = 3 / 7  # of the longer side: the widest spacing of a field's nodes
GRAIN = 4  # places at most between the nodes of noise that is painted
GRAIN_DEVIATION = 0.3
VISIBLE = 1 / 16  # a change of pixels in [0, 1] that counts as one
KINDS = 5
SHIFT = 2 / 7  # of a side: how far another image's pixels are moved at most


class Painted(NamedTuple):
    """``x``: float32 [N,C,H,W] in [0, 1]; ``mask``: where it differs from what it was, float32 [N,H,W] of 0 and 1."""

    x: Tensor
    mask: Tensor


def painted(x: Tensor) -> Painted:
    """Images x, float32 [N,C,H,W] in [0, 1], with noise over parts of most of them, drawn by torch's generator."""
    alpha = _coverage(x)
    result = x + alpha * (_paint(x) - x)
    mask = ((result - x).abs() > VISIBLE).any(dim=1)
    return Painted(result, mask.to(x.dtype))


def _coverage(x: Tensor) -> Tensor:
    """How opaque the paint is at each place, [N,1,H,W]: 0 where there is none."""
    n, _, height, width = x.shape
    coarsest = max(2, int(COARSEST * max(height, width)))
    field = _field(x, *(_whole(1, coarsest) for _ in range(2)))
    share = MIN_SHARE * (MAX_SHARE / MIN_SHARE) ** _uniform(x, n)
    rank = ((1 - share.view(n, 1)) * (height * width - 1)).long()
    threshold = field.flatten(1).sort(dim=1).values.gather(1, rank).view(n, 1, 1, 1)
    softness = (0.1 + _uniform(x, n)) / 6  # from a hard edge to a blurred one
    opacity = MIN_OPACITY + (1 - MIN_OPACITY) * _uniform(x, n)
    there = (_uniform(x, n) >= UNPAINTED).to(x.dtype)
    return there * opacity * torch.sigmoid((field - threshold) / softness)


def _paint(x: Tensor) -> Tensor:
    """What is painted, [N,C,H,W] in [0, 1]; one kind an image, all equally likely.

    One level; that of one of the image's own pixels, as if a part were missing or doubled; the image lighter or darker;
    grain; and what another image has near there.
    """
    n, channels, height, width = x.shape
    level = torch.rand(n, channels, 1, 1, device=x.device)
    place = torch.randint(height * width, (n, 1, 1), device=x.device).expand(-1, channels, -1)
    own = x.flatten(2).gather(2, place).unsqueeze(-1)
    shifted = x + 2 * _uniform(x, n) - 1
    grain = level + GRAIN_DEVIATION * _field(x, *(_whole(1, GRAIN) for _ in range(2)))
    moved = tuple(_whole(-int(SHIFT * side), int(SHIFT * side)) for side in (height, width))
    other = x.roll(1, 0).roll(moved, (2, 3))
    kinds = torch.stack([each.expand_as(x) for each in (level, own, shifted, grain, other)])
    chosen = torch.randint(KINDS, (n,), device=x.device)
    return kinds[chosen, torch.arange(n, device=x.device)].clamp(0, 1)


def _field(x: Tensor, down: int, across: int) -> Tensor:
    """Gaussian random fields of deviation 1, [N,1,H,W]: independent numbers at nodes so many places apart, and lines
    between them."""
    height, width = x.shape[2:]
    rows, columns = height // down + 3, width // across + 3
    nodes = torch.randn(len(x), 1, rows, columns, device=x.device)
    fine = F.interpolate(nodes, size=(rows * down, columns * across), mode="bilinear", align_corners=False)
    top, left = down // 2 + _whole(0, down - 1), across // 2 + _whole(0, across - 1)
    field = fine[:, :, top : top + height, left : left + width]
    return field / field.std(dim=(2, 3), correction=0, keepdim=True).clamp(min=1e-3)


def _uniform(x: Tensor, n: int) -> Tensor:
    return torch.rand(n, 1, 1, 1, device=x.device)


def _whole(low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``."""
    return int(torch.randint(low, high + 1, ()))
