"""Batches of pixels for the loop: seeded order, shards, and randomness that depends on the step alone.

Order and noise are functions of (seed, epoch, step, rank), never of what ran before: this is what makes a resumed run
bitwise equal to one that was never interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service.pixels import unit_levels
from training.data.dataset import Dataset


def derived_seed(*parts: int | str) -> int:
    """A 32-bit seed that is a hash of ``parts``."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def steps_per_epoch(size: int, batch_size: int, world_size: int = 1) -> int:
    """Optimiser steps an epoch: full batches only, at least one."""
    return max(1, size // (batch_size * world_size))


def epoch_batches(
    indices: np.ndarray, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """The index arrays of one epoch for one rank: a seeded permutation, dealt out in equal full batches."""
    order = np.random.RandomState(derived_seed(seed, "order", epoch)).permutation(indices)
    steps = steps_per_epoch(len(order), batch_size, world_size)
    share = order[rank::world_size]
    return [share[i * batch_size : (i + 1) * batch_size] for i in range(steps)]


def to_unit(pixels: np.ndarray) -> Tensor:
    """uint8 [B,C,H,W] -> float32 in [0,1] as the service turns levels into numbers; float32 passes unchanged."""
    return torch.from_numpy(np.ascontiguousarray(unit_levels(pixels) if pixels.dtype == np.uint8 else pixels))


def pixel_batches(dataset: Dataset, batches: list[np.ndarray]) -> Iterator[Tensor]:
    """Float32 [B,C,H,W] in [0,1] for each index array, prefetched where the data set is streamed."""
    for pixels in dataset.batches(batches):
        yield to_unit(pixels)


def image_dither(shape: tuple[int, ...], index: int, seed: int) -> np.ndarray:
    """Uniform [0,1) numbers for one image, a function of its index alone: float32 of ``shape``."""
    stream = np.random.RandomState(derived_seed(seed, "dither", index))
    return stream.random_sample(shape).astype(np.float32)


class StaticallyBinarised:
    """A data set whose pixels were binarised once, x = 1[u < pixel], u from a stream of the image's own index."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def batches(self, batches: list[np.ndarray]) -> Iterator[np.ndarray]:
        """uint8 0 or 255 [B,C,H,W] for each index array."""
        for indices, pixels in zip(batches, self._dataset.batches(batches), strict=True):
            yield np.stack([self._binarise(int(i), image) for i, image in zip(indices, pixels, strict=True)])

    def _binarise(self, index: int, image: np.ndarray) -> np.ndarray:
        u = image_dither(image.shape, index, self._seed)
        scale = 255 if image.dtype == np.uint8 else 1
        return np.where(u * scale < image, 255, 0).astype(np.uint8)


@dataclass(frozen=True)
class SplitRows:
    """The rows of a data set at ``indices``, as a model's ``finish`` reads them (training.models.base.Rows)."""

    dataset: Dataset
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Float32 [≤size,C,H,W], in the order of ``indices``."""
        return pixel_batches(self.dataset, [self.indices[i : i + size] for i in range(0, len(self.indices), size)])
