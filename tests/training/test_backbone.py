"""A user's ONNX file as a backbone: what is cut out of it, what it says of itself, and what is refused, in words."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from service.bundle.input_rules import ArrayPreprocessing, Preprocessing
from service.bundle.operators import check_operators
from service.errors import InvalidInput
from service.inference.backbone import FeatureExtractor
from service.inference.sessions import Runtime
from training.config import IMAGENET, BackboneConfig, load_config
from training.data.backbone import import_backbone, settled
from training.errors import BackboneError

RGB = Preprocessing(mode="RGB", height=8, width=8)
GREY = Preprocessing(mode="L", height=8, width=8)
HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
POOLED = f"{HEAD} g (float[N,3,8,8] x) => (float[N,3] features) {{ features = ReduceMean<axes=[2,3],keepdims=0>(x) }}"
TWO_HEADS = f"""{HEAD} g (float[N,3,8,8] images) => (float[N,3,1,1] pooled, float[N,3,4,4] map)
    {{ map = AveragePool<kernel_shape=[2,2],strides=[2,2]>(images)
       quiet, mask = Dropout(map)
       pooled = GlobalAveragePool(map) }}"""
EVIL = {
    "a loop": (
        f"{HEAD} g (float[N,3,8,8] x, bool c) => (float[N,3,8,8] y) {{ y = If <then_branch = t () => (float a) {{ a = "
        "Identity(x) }, else_branch = e () => (float b) { b = Identity(x) }>(c) }",
        "2 inputs",
    ),
    "randomness": (
        f"{HEAD} g (float[N,3,8,8] x) => (float[N,3,8,8] y) {{ r = RandomNormalLike(x) y = Add(x, r) }}",
        "'RandomNormalLike' is not among the allowed",
    ),
    "another domain": (
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> g (float[N,3,8,8] x) => (float[N,3,8,8] y) '
        "{ y = com.microsoft.Gelu(x) }",
        "'com.microsoft' is not ai.onnx",
    ),
    "a loop inside": (
        f"{HEAD} g (float[N,3,8,8] x) => (float[N,3,8,8] y) {{ c = Constant<value = bool {{1}}>() y = If <then_branch "
        "= t () => (float[N,3,8,8] a) { a = Identity(x) }, else_branch = e () => (float[N,3,8,8] b) { b = Neg(x) }>(c)"
        " }",
        "'If' is not among the allowed",
    ),
    "integers": (
        f"{HEAD} g (uint8[N,3,8,8] x) => (float[N,3,8,8] y) {{ y = Cast<to=1>(x) }}",
        "is uint8, float32 expected",
    ),
    "channels last": (
        f"{HEAD} g (float[N,8,8,3] x) => (float[N,8,8,3] y) {{ y = Relu(x) }}",
        "transpose N×H×W×C to N×C×H×W",
    ),
    "a batch of 4": (f"{HEAD} g (float[4,3,8,8] x) => (float[4,3,8,8] y) {{ y = Relu(x) }}", "with a batch of 1"),
    "vectors": (f"{HEAD} g (float[N,192] x) => (float[N,192] y) {{ y = Relu(x) }}", "is N×192, N×C×H×W expected"),
    "another size": (f"{HEAD} g (float[N,3,9,8] x) => (float[N,3,9,8] y) {{ y = Relu(x) }}", "takes images of 3×9×8"),
    "grey": (f"{HEAD} g (float[N,1,8,8] x) => (float[N,1,8,8] y) {{ y = Relu(x) }}", "takes images of 1×8×8"),
    "tokens": (
        f"{HEAD} g (float[N,3,8,8] x) => (float[N,3,64] y) {{ s = Constant<value = int64[3] {{0,3,64}}>() "
        "y = Reshape(x, s) }",
        "is 1×3×64 of one image: 1×F (pooled) or 1×F×h×w",
    ),
    "double": (f"{HEAD} g (float[N,3,8,8] x) => (double[N,3,8,8] y) {{ y = Cast<to=11>(x) }}", "float32 expected"),
    "infinities": (f"{HEAD} g (float[N,3,8,8] x) => (float[N,3,8,8] y) {{ d = Sub(x,x) y = Div(x, d) }}", "not finite"),
    "rows lost": (
        f"{HEAD} g (float[N,3,8,8] x) => (float[3,8,8] y) {{ y = ReduceMean<axes=[0],keepdims=0>(x) }}",
        "the rows first expected",
    ),
    "no images in it": (
        f"{HEAD} g (float[N,3,8,8] x) => (float[1,2] y) {{ y = Constant<value = float[1,2] {{1,2}}>() }}",
        "does not depend on the images",
    ),
    "a step that cannot be": (
        f"{HEAD} g (float[N,3,8,8] x) => (float[N,5] y) {{ s = Constant<value = int64[2] {{1,5}}>() "
        "y = Reshape(x, s) }",
        "ONNX Runtime cannot run it",
    ),
    "an old opset": (
        '<ir_version: 3, opset_import: ["" : 6]> g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }',
        "opset 7 to ",
    ),
    "an opset to come": (
        '<ir_version: 8, opset_import: ["" : 99]> g (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu(x) }',
        "is of opset 99, IR version 8: opset 7 to ",
    ),
    "a format to come": (HEAD.replace("8", "99", 1) + " g (float[N,3,8,8] x) => (float[N,3] y) { y = Relu(x) }", "99"),
    "two outputs": (TWO_HEADS, "say which with --backbone-output"),
}


def written(tmp_path, model):
    path = tmp_path / "net.onnx"
    model = parser.parse_model(model) if isinstance(model, str) else model
    path.write_bytes(model.SerializeToString())
    return path


def imported(tmp_path, model, rule=RGB, **options):
    return import_backbone(BackboneConfig(path=str(written(tmp_path, model)), **options), rule)


def features(found, x):
    return FeatureExtractor.load(found.graph, found.backbone, found.image, Runtime("cpu", threads=1)).run(x)


def pixels(n=5, channels=3):
    return np.random.RandomState(0).random_sample((n, channels, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("name", EVIL)
def test_what_cannot_be_a_backbone_is_refused_in_words(tmp_path, name):
    model, words = EVIL[name]
    with pytest.raises(BackboneError, match=r"net\.onnx") as caught:
        imported(tmp_path, model)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "no ONNX model"), (b"\x89PNG", "no ONNX model"), (None, "cannot be read")]
)
def test_what_is_no_onnx_file_is_refused(tmp_path, data, words):
    path = tmp_path / "net.onnx"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BackboneError, match=words):
        import_backbone(BackboneConfig(path=str(path)), RGB)


def test_data_outside_the_file_are_refused_and_never_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(np.ones(3, np.float32).tobytes())
    weight = numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret")
    source, target = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3, 8, 8]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [source], [target], [weight])
    with pytest.raises(BackboneError, match="data lies outside"):
        imported(tmp_path, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


def test_pooled_features_are_the_users_networks(tmp_path):
    found = imported(tmp_path, POOLED)
    assert (found.backbone.kind, found.backbone.natural, found.backbone.batch) == ("vector", (3,), "any")
    np.testing.assert_allclose(features(found, pixels())[:, 0, 0], pixels().mean((2, 3)), rtol=1e-6)
    check_operators(found.graph)


@pytest.mark.parametrize(("output", "kind", "natural"), [("pooled", "vector", (3,)), ("map", "map", (3, 4, 4)),
                                                         ("quiet", "map", (3, 4, 4))])  # fmt: skip
def test_any_tensor_may_be_the_features_and_the_rest_is_cut_off(tmp_path, output, kind, natural):
    found = imported(tmp_path, TWO_HEADS, output=output)
    assert (found.backbone.kind, found.backbone.natural, found.backbone.output) == (kind, natural, output)
    wanted = pixels().reshape(5, 3, 4, 2, 4, 2).mean((3, 5))
    wanted = wanted.mean((2, 3))[:, None, None] if output == "pooled" else wanted
    np.testing.assert_allclose(features(found, pixels()), wanted, rtol=1e-5)
    assert ("GlobalAveragePool" in check_operators(found.graph)) == (output == "pooled")
    with pytest.raises(BackboneError, match="has no tensor 'logits'; its outputs are pooled, map"):
        imported(tmp_path, TWO_HEADS, output="logits")


def test_normalisation_stands_in_the_graph(tmp_path):
    found = imported(tmp_path, POOLED, **IMAGENET)
    mean, std = (np.array(IMAGENET[key], np.float32) for key in ("mean", "std"))
    np.testing.assert_allclose(features(found, pixels())[:, 0, 0], (pixels().mean((2, 3)) - mean) / std, rtol=1e-4)
    assert found.backbone.mean == IMAGENET["mean"]
    levels = imported(tmp_path, POOLED, std=[1 / 255])
    np.testing.assert_allclose(features(levels, pixels())[:, 0, 0], 255 * pixels().mean((2, 3)), rtol=1e-5)
    with pytest.raises(BackboneError, match="mean has 2 numbers"):
        imported(tmp_path, POOLED, mean=[0.5, 0.5])


@pytest.mark.parametrize(
    "model",
    [
        f"{HEAD} g (float[1,3,8,8] x) => (float[1,192] y) {{ s = Constant<value = int64[2] {{1,192}}>() "
        "y = Reshape(x, s) }",
        f"{HEAD} g (float[N,3,8,8] x) => (float[N,192] y) {{ s = Constant<value = int64[2] {{1,192}}>() "
        "y = Reshape(x, s) }",
    ],
    ids=["said", "hidden"],
)
def test_a_batch_of_one_is_run_row_by_row(tmp_path, model):
    found = imported(tmp_path, model)
    assert found.backbone.batch == "one"
    np.testing.assert_array_equal(features(found, pixels())[:, 0, 0], pixels().reshape(5, -1))
    assert ort.InferenceSession(found.graph).get_inputs()[0].shape[0] == 1


def test_rows_do_not_depend_on_their_neighbours(tmp_path):
    """A network that mixes its batch gives each row what it gives it alone."""
    mixing = f"{HEAD} g (float[N,3,8,8] x) => (float[N,3,8,8] y) {{ m = ReduceMean<axes=[0]>(x) y = Add(x, m) }}"
    found = features(imported(tmp_path, mixing), pixels())
    np.testing.assert_array_equal(found, 2 * pixels())


def test_names_functions_and_weights_of_the_users_own_do_not_matter(tmp_path):
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> g (float[N,3,8,8] features, float[1] mean) => '
        "(float[N,3,8,8] x) <float[1] mean = {2}> { x = own.Twice(features, mean) } "
        '<domain: "own", opset_import: ["" : 17]> Twice (a, b) => (c) { c = Mul(a, b) }'
    )
    np.testing.assert_array_equal(features(imported(tmp_path, model, mean=[0.5]), pixels()), 2 * (pixels() - 0.5))


def test_open_sizes_take_those_of_the_data(tmp_path):
    model = f"{HEAD} g (float[N,C,H,W] x) => (float[N,C,1,1] y) {{ y = GlobalAveragePool(x) }}"
    assert imported(tmp_path, model, GREY).backbone.natural == (1,)
    assert imported(tmp_path, model, RGB).backbone.natural == (3,)
    with pytest.raises(BackboneError, match="a backbone is for images, these rows are vectors"):
        imported(tmp_path, model, ArrayPreprocessing(kind="vector", natural=(4,)))


def test_the_file_decides_size_and_mode_of_the_images(tmp_path):
    path = written(tmp_path, POOLED)
    tree = {"backbone": {"path": str(path)}}
    config = settled(load_config(None, [], tree))
    assert (config.data.shape, config.data.mode) == ((8, 8), "RGB")
    assert settled(load_config(None, ["data.size=8"], tree)).data.shape == (8, 8)
    with pytest.raises(BackboneError, match=r"takes images of 8×8 pixels, data\.size asks for 9×9"):
        settled(load_config(None, ["data.size=9"], tree))
    with pytest.raises(BackboneError, match="3 channels"):
        settled(load_config(None, ["data.mode=L"], tree))


def test_a_file_that_changed_is_refused(tmp_path):
    sha256 = settled(load_config(None, [], {"backbone": {"path": str(written(tmp_path, POOLED))}})).backbone.sha256
    model = parser.parse_model(POOLED)
    model.graph.node[0].attribute[0].ints[:] = [3, 2]
    with pytest.raises(BackboneError, match="has changed"):
        imported(tmp_path, model, sha256=sha256)


def test_an_image_whose_features_are_not_finite_is_refused_by_its_place_and_the_others_are_not(tmp_path):
    """As where a normalisation divides an image by its own size: that of a black one is 0."""
    own_size = f"{HEAD} g (float[N,3,8,8] x) => (float[N,3,8,8] y) {{ s = ReduceMax<axes=[1,2,3]>(x) y = Div(x, s) }}"
    found, x = imported(tmp_path, own_size), pixels(3)
    assert np.isfinite(features(found, x)).all()
    x[1] = 0
    with pytest.raises(InvalidInput, match="row 1: the backbone's features"):
        features(found, x)
