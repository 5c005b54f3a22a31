"""Parts of the trunks against what they are by definition."""

from __future__ import annotations

import pytest
import torch

from training.nn.ladder_blocks import ResidualBlock
from training.nn.networks import GatedResidual, GatedUpsample, gate


@pytest.mark.parametrize("size", [(14, 14), (13, 14), (13, 13)])
def test_a_gate_before_the_rearrangement_is_the_gate_behind_it(size):
    layer = GatedUpsample(5, 3, size)
    x = torch.randn(4, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), gate(layer.upsample(x)))
    assert layer(x).shape == (4, 3, *size)


def test_a_gate_is_one_half_times_the_sigmoid_of_the_other():
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(gate(torch.cat([a, b], 1)), a * torch.sigmoid(b))
    torch.testing.assert_close(gate(torch.cat([a, b], -1), dim=-1), a * torch.sigmoid(b))


@pytest.mark.parametrize("block", [GatedResidual(4), ResidualBlock(4, dropout=0.0, depth=2)])
def test_a_residual_block_adds_to_what_it_is_given(block):
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x + block.outer(block.inner(x)))
    assert not torch.allclose(block(x), x)
