"""What check_operators lets in, on models made by the onnx package, whole and damaged."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from service.bundle.operators import MAX_GRAPH_DEPTH, OPERATORS, check_operators
from service.bundle.protobuf import MalformedMessageError, fields
from service.errors import BundleGraphError
from tests.ppca_bundle import fit_ppca, graphs, images

GRAPHS = graphs(fit_ppca(images(100), 5))


def model(*nodes: onnx.NodeProto, initializers=(), **attributes) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9, **attributes)


def branch(*nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])


def nested(depth: int) -> onnx.NodeProto:
    """A node that is allowed by its name, with graphs in attributes, one inside the other."""
    node = helper.make_node("Identity", ["x"], ["y"])
    for _ in range(depth):
        node = helper.make_node("Identity", ["x"], ["y"], body=branch(node))
    return node


def external() -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros(1, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def only_location() -> TensorProto:
    tensor = external()
    tensor.ClearField("external_data")
    return tensor


def sparse() -> onnx.SparseTensorProto:
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
    return helper.make_sparse_tensor(external(), indices, [1])


def in_function() -> onnx.ModelProto:
    function = helper.make_function(
        "here", "F", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [helper.make_opsetid("", 18)]
    )
    return model(helper.make_node("Identity", ["x"], ["y"]), functions=[function])


@pytest.mark.parametrize("role", GRAPHS)
def test_every_node_of_a_real_graph_is_counted(role):
    assert check_operators(GRAPHS[role]) == Counter(
        node.op_type for node in onnx.load_from_string(GRAPHS[role]).graph.node
    )


def test_the_allowed_operators_are_standard_and_pure():
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert standard >= OPERATORS
    impure = {"RandomNormal", "RandomUniform", "Bernoulli", "Multinomial", "Dropout", "Loop", "If", "Scan"}
    assert not impure & OPERATORS


FOREIGN = {
    "operator": (model(helper.make_node("Loop", ["x"], ["y"])), "operator 'Loop' is not among"),
    "random numbers": (model(helper.make_node("RandomNormalLike", ["x"], ["y"])), "operator 'RandomNormalLike'"),
    "custom operator": (model(helper.make_node("Evil", ["x"], ["y"])), "operator 'Evil'"),
    "domain": (model(helper.make_node("Add", ["x", "x"], ["y"], domain="com.microsoft")), "domain 'com.microsoft'"),
    "in a branch": (
        model(helper.make_node("Identity", ["x"], ["y"], body=branch(helper.make_node("Evil", [], ["y"])))),
        "operator 'Evil'",
    ),
    "in a list of branches": (
        model(helper.make_node("Identity", ["x"], ["y"], body=[branch(helper.make_node("Evil", [], ["y"]))])),
        "operator 'Evil'",
    ),
    "external data": (model(helper.make_node("Add", ["x", "w"], ["y"]), initializers=[external()]), "outside"),
    "data location": (model(helper.make_node("Add", ["x", "w"], ["y"]), initializers=[only_location()]), "outside"),
    "external constant": (model(helper.make_node("Constant", [], ["y"], value=external())), "outside"),
    "external in a branch": (
        model(
            helper.make_node(
                "Identity", ["x"], ["y"], body=branch(helper.make_node("Constant", [], ["y"], value=external()))
            )
        ),
        "outside",
    ),
    "external in a list": (
        model(helper.make_node("Constant", [], ["y"], values=[external(), external()])),
        "outside",
    ),
    "external in a sparse constant": (
        model(helper.make_node("Constant", [], ["y"], sparse_value=sparse())),
        "outside",
    ),
    "function": (in_function(), "local functions"),
    "deep graphs": (model(nested(MAX_GRAPH_DEPTH + 1)), "nested more than"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_a_bundle_may_not_hold_is_refused_by_name(name):
    proto, message = FOREIGN[name]
    with pytest.raises(BundleGraphError, match=message):
        check_operators(proto.SerializeToString())


def test_an_opset_of_another_domain_is_refused():
    proto = model(helper.make_node("Identity", ["x"], ["y"]))
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    with pytest.raises(BundleGraphError, match=r"domain 'ai\.onnx\.ml'"):
        check_operators(proto.SerializeToString())


def test_a_second_graph_that_protobuf_would_merge_is_seen():
    """Concatenated messages merge: an operator may hide in a second copy of the field."""
    good, bad = model(helper.make_node("Identity", ["x"], ["y"])), model(helper.make_node("Evil", ["x"], ["y"]))
    with pytest.raises(BundleGraphError, match="Evil"):
        check_operators(good.SerializeToString() + bad.SerializeToString())


def test_an_unknown_field_is_refused():
    with pytest.raises(BundleGraphError, match="field 99 of ONNX's ModelProto"):
        check_operators(GRAPHS["decoder"] + b"\x9a\x06\x00")


@pytest.mark.parametrize(
    "data", [b"", b"\x08\x08", b"no model", b"\xff" * 40, b"\x00\x00", b"\x0b", b"\x3a\xff\xff\xff\xff\x7f"]
)
def test_what_is_no_model_is_refused(data):
    with pytest.raises(BundleGraphError, match="not a serialised ONNX model"):
        check_operators(data)


@settings(max_examples=300, deadline=1000)
@given(st.data())
def test_damage_is_refused_or_harmless_never_a_crash(data):
    content = bytearray(GRAPHS[data.draw(st.sampled_from(sorted(GRAPHS)))])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    try:
        assert check_operators(bytes(content)).total() >= 0
    except BundleGraphError as error:
        assert str(error)  # noqa: PT017 - either outcome is right, any other exception is not


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content):
    try:
        total = sum(len(field.payload) for field in fields(memoryview(content)))
    except MalformedMessageError:
        return
    assert total <= len(content)
