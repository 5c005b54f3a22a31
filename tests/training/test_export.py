"""Export: what the bundle gives through the service is what torch gives, and nothing of this machine is in it."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from service.bundle.files import open_bundle
from service.bundle.manifest import REFERENCE
from service.bundle.operators import check_operators
from service.errors import BundleParityError
from service.inference import noise
from service.inference.batch_invariance import TWO_PATHS
from service.inference.sessions import Runtime
from tests.training.finished import finished_run
from tests.training.shared import CASES, MLP, copied, encoded
from training.data.batches import to_unit
from training.errors import DataError, ExportError
from training.evaluation.evaluate import batch_bounds
from training.export.graphs import OPSET, export_graph, export_graphs, likelihood, roles, signature
from training.export.parity import EDGE, reference_arrays, tolerances
from training.export.rewrites import with_weights_in_half, without_logs_of_exponentials
from training.export.staging import contents, open_staged, replace_bundle
from training.runs import Run

BOUNDS = [case for case in CASES if case.startswith(("vae", "ladder"))]


# Backwards: where test_families runs in another process, the two make half of the shared bundles each.
@pytest.fixture(scope="module", params=reversed(CASES), ids=str)
def exported(request, fitted_family):
    return fitted_family(request.param)


@pytest.fixture(scope="module")
def plain(exported_run, tmp_path_factory):
    """A small exported run whose folder tests may change."""
    return copied(exported_run, tmp_path_factory.mktemp("plain"))


def held_out(run, count=7):
    return to_unit(run.dataset.pixels(run.dataset.splits["test"][:count]))


def torch_encoded(run, x, k, seed):
    draws = torch.from_numpy(noise.posterior_noise(seed, k, run.model.noise_dim).copy())
    dither = torch.from_numpy(noise.dither(seed, run.model.shape).copy()).expand_as(x)
    return encoded(run.model, x, draws.expand(len(x), -1, -1), dither if run.model.likelihood.dither else None)


@torch.no_grad()
def test_the_served_verbs_give_torchs_numbers(exported):
    run, served = exported
    x = held_out(run)
    expected = torch_encoded(run, x, 3, seed=5)
    posterior = served.encode(x.numpy(), samples=0 if "encode.samples" in served.refused else 3, seed=5)
    np.testing.assert_allclose(posterior.loc, expected.loc, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(posterior.scale, expected.scale, rtol=1e-4, atol=1e-5)
    if "encode.samples" not in served.refused:
        np.testing.assert_allclose(posterior.samples, expected.z, rtol=1e-4, atol=1e-5)
    likelihood, p = run.model.likelihood, run.model.decode(expected.loc)
    mean = likelihood.mean(p)
    np.testing.assert_allclose(served.decode(expected.loc.numpy()), mean, rtol=1e-4, atol=1e-5)
    draw = ()
    if likelihood.observation_noise != "none":
        one = noise.observation_noise(2, run.model.shape, likelihood.observation_noise)
        draw = (torch.from_numpy(one.copy()).expand_as(mean),)
    sample = likelihood.sample(p, *draw)
    np.testing.assert_allclose(served.observe(expected.loc.numpy(), seed=2), sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", BOUNDS)
def test_the_served_scores_are_those_of_evaluate_at_the_same_noise(case, fitted_family, monkeypatch):
    run, served = fitted_family(case)
    x, definition = held_out(run), served.manifest.scores["iwae"].model_copy(update={"k": 6, "seed": 4})
    draws = torch.from_numpy(noise.posterior_noise(4, 6, run.model.noise_dim).copy())
    monkeypatch.setattr(torch, "randn", lambda k, n, e, device: draws.unsqueeze(1).expand(k, n, e))
    dither = torch.from_numpy(noise.dither(4, run.model.shape).copy()).expand_as(x)
    with torch.no_grad():  # not around the fixture: it may have to fit the model first
        expected = batch_bounds(run.model, x, dither if run.model.likelihood.dither else None, k=6, chunk=10_000)
    scores = served.score(x.numpy(), definition)
    np.testing.assert_allclose(scores.elbo, expected["elbo"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(scores.log_likelihood, expected["iwae"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(scores.rate, expected["rate"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(scores.distortion, expected["distortion"], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(scores.score, -scores.log_likelihood)


def test_every_output_has_a_measured_error_below_a_small_tolerance(exported):
    run, served = exported
    reference, manifest = served.bundle.arrays(REFERENCE), served.manifest
    outputs = {name for name in reference if "." in name}
    assert outputs == set(manifest.reference.tolerances) == set(manifest.reference.max_abs_error)
    assert {name.split(".")[0] for name in outputs} == set(roles(run.model)) | (
        {"corruption"} if run.corruption else set()
    )
    for name, tolerance in manifest.reference.tolerances.items():
        scale = max(1.0, float(np.abs(reference[name]).max()))
        assert tolerance.atol <= 1e-3 * scale or name == "observation.sample"
        assert manifest.reference.max_abs_error[name] <= tolerance.atol + tolerance.rtol * scale
    np.testing.assert_array_equal(reference["x"], held_out(run, len(reference["x"])))


def test_no_path_of_this_machine_is_in_the_bundle(exported):
    run, served = exported
    repository = Path(__file__).parents[2]
    needles = [str(path).encode() for path in (run.folder, run.folder.parents[1], repository, Path.home())]
    for file in [path for path in served.bundle.path.rglob("*") if path.is_file()]:
        data = file.read_bytes()
        found = [needle for needle in [*needles, b"stack_trace", b'.py"', b"site-packages"] if needle in data]
        assert not found, file.name


def test_the_graphs_hold_one_opset_and_no_remarks(exported):
    _, served = exported
    for role in served.manifest.graphs:
        proto = onnx.load_from_string(served.bundle.graph(role))
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", OPSET)]
        assert not proto.metadata_props
        assert not proto.graph.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)
        assert "Dropout" not in {node.op_type for node in proto.graph.node}
        assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in proto.graph.initializer)


def test_the_encoder_of_a_diagonal_gaussian_lets_single_rows_run_alone(fitted_family):
    """log(exp(log scale)) is not left in it: its two code paths would make four rows of each."""
    _, model = fitted_family("vae, VampPrior, threshold, dropout")
    assert not TWO_PATHS & check_operators(model.bundle.graph("encoder")).keys()


def test_only_logs_of_exponentials_are_folded_and_what_else_reads_them_stays():
    nodes = [
        onnx.helper.make_node("Exp", ["a"], ["kept"]),
        onnx.helper.make_node("Log", ["kept"], ["one"]),
        onnx.helper.make_node("Exp", ["a"], ["dropped"]),
        onnx.helper.make_node("Log", ["dropped"], ["two"]),
        onnx.helper.make_node("Log", ["kept"], ["shown"]),
        onnx.helper.make_node("Log", ["b"], ["other"]),
        onnx.helper.make_node("Exp", ["two"], ["again"]),
        onnx.helper.make_node("Log", ["again"], ["three"]),
        onnx.helper.make_node("Sum", ["one", "two", "three", "other", "kept"], ["total"]),
    ]
    tensors = [
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N"]) for name in names]
        for names in ("ab", ("total", "shown"))
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", *tensors), opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10
    )
    feeds = {name: np.linspace(0.5, 2, 5, dtype=np.float32) for name in "ab"}
    runtime = Runtime("cpu", 1)
    before = runtime.session(model.SerializeToString()).run(None, feeds)
    without_logs_of_exponentials(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Exp", "Log", "Log", "Sum"]
    for old, new in zip(before, runtime.session(model.SerializeToString()).run(None, feeds), strict=True):
        np.testing.assert_allclose(old, new, rtol=1e-6)


def test_weights_that_half_precision_holds_are_stored_in_it_and_give_the_same_numbers():
    random = np.random.RandomState(0)
    halves, others = (random.standard_normal((32, 32)).astype(np.float32) for _ in range(2))
    halves = halves.astype(np.float16).astype(np.float32)
    large = np.full((32, 32), 1e6, np.float32)  # beyond float16
    nodes = [
        onnx.helper.make_node("MatMul", [a, b], [c]) for a, b, c in zip("xyz", ("h", "o", "l"), "yzw", strict=True)
    ]
    tensors = [[onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 32])] for name in "xw"]
    weights = [onnx.numpy_helper.from_array(w, n) for w, n in ((halves, "h"), (others, "o"), (large, "l"))]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", *tensors, weights),
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=10,
    )
    feeds, runtime = {"x": random.standard_normal((3, 32)).astype(np.float32)}, Runtime("cpu", 1)
    before, size = runtime.session(model.SerializeToString()).run(None, feeds), model.ByteSize()
    with_weights_in_half(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert [weight.data_type == onnx.TensorProto.FLOAT16 for weight in model.graph.initializer] == [True, False, False]
    assert size - model.ByteSize() > 1900
    assert np.array_equal(before, runtime.session(model.SerializeToString()).run(None, feeds))


def test_float_images_are_exported_and_scored_as_they_are(fitted_family):
    run, served = fitted_family("vae, conv, float colours, scale a pixel")
    np.testing.assert_array_equal(served.bundle.arrays(REFERENCE)["x"], held_out(run, 4))
    assert served.manifest.provenance.data["dtype"] == "float32"


def test_other_weights_than_the_references_are_refused_and_the_old_bundle_stays(plain):
    before = open_bundle(plain.staged).digest
    manifest, files = contents(open_bundle(plain.staged))
    model = Run.open(plain.folder).model
    with torch.no_grad():
        list(model.decoder.parameters())[-1].mul_(1.001)
    files["decoder.onnx"] = export_graph(model, open_bundle(plain.staged).manifest, "decoder")
    with pytest.raises(BundleParityError, match=r"decoder\.logits"):
        replace_bundle(plain.folder / "bundle", manifest, files)
    assert open_bundle(plain.staged).digest == before
    assert [entry.name for entry in (plain.folder / "bundle").iterdir()] == ["tiny"]


def test_the_same_weights_give_the_same_bytes(plain, capfd):
    manifest = open_bundle(plain.staged).manifest
    again = export_graph(plain.model, manifest, "encoder")
    assert again == open_bundle(plain.staged).graph("encoder")
    assert capfd.readouterr() == ("", ""), "the exporter is to be silent"


def test_a_model_in_training_mode_is_refused(plain):
    model = Run.open(plain.folder).model.train()
    with pytest.raises(ExportError, match="training mode"):
        export_graphs(model)


def test_static_binarisation_is_served_as_dynamic(tmp_path):
    run = finished_run(tmp_path, (1, 3, 4), {"network": MLP, "likelihood": {"binarisation": "static"}})
    assert likelihood(run.model).binarisation == "dynamic"
    assert signature(run.model).dither


def test_observation_noise_of_a_reference_keeps_off_the_edge(tmp_path):
    run = finished_run(tmp_path, (1, 30, 30), {"latent_dim": 2, "network": MLP})
    arrays = reference_arrays(run.model, run.dataset)
    assert np.abs(arrays["observation_noise"] - arrays["decoder.mean"]).min() >= EDGE * 0.999
    assert arrays["observation_noise"].min() >= 0
    assert arrays["observation_noise"].max() < 1


def test_tolerances_grow_with_what_is_summed():
    arrays = {
        "x": np.zeros(1),
        "encoder.target": np.ones(1),
        "decoder.mean": np.array([100.0]),
        "joint.log_p_x_given_z": np.array([0.5]),
        "joint.log_p_x_given_z_map": np.full((1, 1, 1, 10, 10), -30.0),
        "observation.sample": np.ones(1),
    }
    found = tolerances(arrays, rounded=True)
    assert set(found) == set(arrays) - {"x"}
    assert found["decoder.mean"].atol == pytest.approx(1e-3)
    assert found["joint.log_p_x_given_z"].atol == pytest.approx(3e-3)
    assert found["encoder.target"].rtol == 0
    assert 1 / 255 < found["observation.sample"].atol < 2 / 255, "a draw may round to the next level"
    assert tolerances(arrays, rounded=False)["observation.sample"].atol < 1e-4


def test_a_bundle_of_other_weights_is_not_taken_for_the_runs(plain, tmp_path):
    other = finished_run(tmp_path, (1, 3, 4), {"latent_dim": 2, "network": MLP})
    with pytest.raises(ExportError, match="vaetrain export"):
        open_staged(other)
    plain.staged.parents[1].rename(other.folder / "bundle")
    try:
        with pytest.raises(ExportError, match="other weights"):
            open_staged(other)
    finally:
        (other.folder / "bundle").rename(plain.folder / "bundle")
    with pytest.raises(ExportError, match="not calibrated"):
        open_staged(plain, calibrated=True)


def test_changed_data_and_stale_metrics_are_named(plain, tmp_path):
    run = finished_run(tmp_path, (1, 3, 4), {"latent_dim": 2, "network": MLP})
    (run.folder / "metrics.json").write_text(json.dumps({"weights": "0" * 64}))
    with pytest.raises(Exception, match="vaetrain evaluate"):
        run.metrics()
    np.save(tmp_path / "tiny.npy", np.random.RandomState(1).randint(0, 256, (120, 1, 3, 4)).astype(np.uint8))
    with pytest.raises(DataError, match="has changed since the run was trained"):
        assert Run.open(run.folder).dataset
