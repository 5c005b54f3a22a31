"""A U-Net: one number for each position of an image, from its neighbourhood."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.nn.networks import Shape

PATCH = 2  # pixels a side of a patch, which is one position at the network's finest level
LEVELS = 3
GROUPS = 8


class UNet(nn.Module):
    """x, float32 [N,C,H,W] -> a number for each position, float32 [N,H,W].

    Ronneberger et al. 2015, of three levels, the finest at half the image's size, where positions are patches of
    2×2 pixels. Images are padded at the bottom and the right, by their last pixels, to a multiple of 8. ``width``:
    channels of the finest level.
    """

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.size = shape[1:]
        self.stem = _convolution(shape[0] * PATCH**2, width)
        self.fine = Residual(width, width)
        self.middle = Residual(width, 2 * width)
        self.coarse = Residual(2 * width, 2 * width)
        self.middle_up = Residual(4 * width, 2 * width)
        self.fine_up = Residual(3 * width, width)
        self.head = nn.Conv2d(width, PATCH**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.size
        multiple = PATCH * 2 ** (LEVELS - 1)
        x = F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")
        fine = self.fine(self.stem(F.pixel_unshuffle(x, PATCH)))
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.middle_up(torch.cat([middle, F.interpolate(coarse, scale_factor=2.0)], dim=1))
        fine = self.fine_up(torch.cat([fine, F.interpolate(middle, scale_factor=2.0)], dim=1))
        by_position: Tensor = F.pixel_shuffle(self.head(fine), PATCH)[:, 0, :height, :width]
        return by_position


class Residual(nn.Module):
    """Two normalised 3×3 convolutions, the second added to what it is given: [N,inputs,h,w] -> [N,outputs,h,w]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(inputs, outputs), _convolution(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.second(x)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(GROUPS, outputs), nn.SiLU())
