"""The inputs and outputs that the contract wants of each graph."""

from __future__ import annotations

import pytest

from service.bundle.files import open_bundle
from service.bundle.graph_specs import graph_spec
from service.errors import BundleFormatError
from tests.service import linear_bundles as linear


def test_only_a_prior_that_is_drawn_by_a_graph_has_inputs_and_outputs(ppca_path, tmp_path):
    spec = graph_spec(open_bundle(linear.write_mixture(tmp_path)).manifest, "prior")
    assert [tensor[::2] for tensor in spec.inputs] == [("noise", ("M", 3)), ("choice", ("M",))]
    assert [tensor[::2] for tensor in spec.outputs] == [("z", ("M", 3))]
    with pytest.raises(BundleFormatError, match="not drawn by a graph"):
        graph_spec(open_bundle(ppca_path).manifest, "prior")
