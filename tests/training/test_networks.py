"""Parts of the trunks against what they are by definition."""

from __future__ import annotations

import pytest
import torch

from training.nn.networks import GatedUpsample, gate


@pytest.mark.parametrize("size", [(14, 14), (13, 14), (13, 13)])
def test_a_gate_before_the_rearrangement_is_the_gate_behind_it(size):
    layer = GatedUpsample(5, 3, size)
    x = torch.randn(4, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), gate(layer.upsample(x)))
    assert layer(x).shape == (4, 3, *size)
