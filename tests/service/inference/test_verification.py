from __future__ import annotations

import io
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from service.bundle.files import open_bundle, write_bundle
from service.errors import (
    BundleFormatError,
    BundleGraphError,
    BundleIntegrityError,
    BundleNotFound,
    BundleParityError,
)
from service.inference.verification import BATCH_SIZES, open_verified, replay, verify_bundle
from tests.ppca_bundle import fit_ppca, graphs, images, write_ppca_bundle
from tests.service import linear_bundles as linear


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def in_arrays(filename: str, edit):
    """A change to one .npz file."""

    def change(_manifest, files):
        with np.load(io.BytesIO(files[filename])) as archive:
            arrays = dict(archive)
        edit(arrays)
        files[filename] = npz(arrays)

    return change


def in_graph(role: str, edit):
    """A change to one graph."""

    def change(_manifest, files):
        proto = onnx.load_from_string(files[f"{role}.onnx"])
        edit(proto)
        files[f"{role}.onnx"] = proto.SerializeToString()

    return change


def in_manifest(edit):
    return lambda manifest, _files: edit(manifest)


def nudge(name: str, delta: float):
    def edit(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name].flat[-1] += delta

    return edit


def test_a_sound_bundle_passes_every_check(ppca_path, runtime):
    report = verify_bundle(ppca_path, runtime)
    assert report.ok
    assert [check.name for check in report.checks] == ["files", "operators", "signature", "parity", "calibration"]
    assert all(check.ok and check.outcome for check in report.checks)
    assert report.model is not None
    assert report.model.runtime is runtime
    assert report.summary() == "5 checks passed"
    assert re.search(r"max .Δ. \S+ \(\w+\.\w+; allowed atol \S+ \+ rtol \S+\)", str(report))
    assert str(report).count("ok ") == 5


def test_replay_measures_every_output(model):
    errors = replay(model)
    outputs = {name for name in model.bundle.arrays("reference.npz") if "." in name}
    assert set(errors) == outputs == set(model.manifest.reference.tolerances)
    assert all(0 <= error < 1e-5 for error in errors.values())


def test_verified_is_a_gate_for_write_bundle(tmp_path):
    with pytest.raises(BundleParityError):
        write_ppca_bundle(
            tmp_path, change=in_arrays("reference.npz", nudge("decoder.mean", 1e-3)), verify=open_verified
        )
    assert list((tmp_path / "ppca").iterdir()) == []
    path, _ = write_ppca_bundle(tmp_path, verify=open_verified)
    assert open_verified(path).path == path


def other_weights(_manifest, files):
    files["decoder.onnx"] = graphs(fit_ppca(images(400, seed=8), 5))["decoder"]


def batch_dependent(proto):
    """scale becomes wrong in batches of two and more: only a replay at several sizes can see it."""
    node = next(node for node in proto.graph.node if "scale" in node.output)
    node.output[0] = "right"
    constant = helper.make_tensor("one", TensorProto.INT64, [], [1])
    zero = helper.make_tensor("zero", TensorProto.INT64, [], [0])
    proto.graph.initializer.extend([constant, zero])
    proto.graph.node.extend(
        [
            helper.make_node("Shape", ["z"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["rows"]),
            helper.make_node("Sub", ["rows", "one"], ["more"]),
            helper.make_node("Cast", ["more"], ["error"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["right", "error"], ["scale"]),
        ]
    )


def rename_input(proto):
    for node in proto.graph.node:
        node.input[:] = ["image" if name == "x" else name for name in node.input]
    proto.graph.input[0].name = "image"


def drop_output(proto):
    del proto.graph.output[-1]


def fix_batch(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def other_pixels(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 9


def extra_input(proto):
    proto.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["N"]))


def half_precision(proto):
    node = next(node for node in proto.graph.node if "log_q_z" in node.output)
    node.output[0] = "exact"
    proto.graph.node.append(helper.make_node("Cast", ["exact"], ["log_q_z"], to=TensorProto.FLOAT))
    next(
        output for output in proto.graph.output if output.name == "log_q_z"
    ).type.tensor_type.elem_type = TensorProto.FLOAT


def evil(proto):
    proto.graph.node[0].op_type = "Evil"


FAULTS = {
    "another model's weights": (other_weights, BundleParityError, "decoder.mean differs by"),
    "one number of the reference": (
        in_arrays("reference.npz", nudge("encoder.log_q_z", 1e-3)),
        BundleParityError,
        "encoder.log_q_z differs by 0.001, allowed are atol 2e-05",
    ),
    "an output that depends on the batch": (in_graph("decoder", batch_dependent), BundleParityError, "decoder.scale"),
    "an operator": (in_graph("joint", evil), BundleGraphError, "operator 'Evil'"),
    "an input's name": (in_graph("encoder", rename_input), BundleGraphError, "encoder has inputs ['image', 'noise']"),
    "a missing output": (in_graph("encoder", drop_output), BundleGraphError, "encoder has outputs"),
    "an extra input": (in_graph("encoder", extra_input), BundleGraphError, "'more'"),
    "a fixed batch": (in_graph("encoder", fix_batch), BundleGraphError, "x is tensor(float) [1, 1, 8, 8]"),
    "another image size": (in_graph("encoder", other_pixels), BundleGraphError, "['N', 1, 8, 9]"),
    "nats in float32": (in_graph("encoder", half_precision), BundleGraphError, "log_q_z is tensor(float)"),
    "another latent_dim": (
        in_manifest(lambda m: m["signature"].update(latent_dim=6)),
        BundleGraphError,
        "the manifest's signature wants",
    ),
    "another parameter": (
        in_manifest(lambda m: m["likelihood"].update(parameters=["logits"])),
        BundleGraphError,
        "decoder has outputs ['loc', 'mean', 'scale']",
    ),
    "a reference without an output": (
        in_arrays("reference.npz", lambda arrays: arrays.pop("joint.log_p_z")),
        BundleFormatError,
        "reference.npz lacks ['joint.log_p_z']",
    ),
    "a reference of another dtype": (
        in_arrays("reference.npz", lambda a: a.update({"encoder.log_q_z": a["encoder.log_q_z"].astype(np.float32)})),
        BundleFormatError,
        "encoder.log_q_z is float32 (6, 3), expected float64 (6, 3)",
    ),
    "a reference of another shape": (
        in_arrays("reference.npz", lambda a: a.update(x=a["x"][:5])),
        BundleFormatError,
        "x is float32 (5, 1, 8, 8), expected float32 (6, 1, 8, 8)",
    ),
    "a reference with NaN": (
        in_arrays("reference.npz", nudge("decoder.loc", np.nan)),
        BundleFormatError,
        "decoder.loc is empty or holds numbers that are not finite",
    ),
    "an empty reference": (
        in_arrays("reference.npz", lambda a: a.update({name: a[name][:0] for name in a})),
        BundleFormatError,
        "is empty",
    ),
    "a missing tolerance": (
        in_manifest(lambda m: m["reference"]["tolerances"].pop("encoder.z")),
        BundleFormatError,
        "reference.tolerances lacks ['encoder.z']",
    ),
    "an absolute tolerance for anything": (
        in_manifest(lambda m: m["reference"]["tolerances"].update({"decoder.mean": {"atol": 1e9, "rtol": 0.0}})),
        BundleFormatError,
        "decoder.mean may differ by atol 1e+09 + rtol 0, which is 1e+09 where it is",
    ),
    "a relative tolerance for anything": (
        in_manifest(
            lambda m: m["reference"]["tolerances"].update({"joint.log_p_x_given_z": {"atol": 0.0, "rtol": 0.02}})
        ),
        BundleFormatError,
        "joint.log_p_x_given_z may differ by atol 0 + rtol 0.02",
    ),
    "unsorted calibration": (
        in_arrays("calibration.npz", lambda a: a.update(elbo=a["elbo"][::-1])),
        BundleFormatError,
        "ascending order",
    ),
    "calibration of another n": (
        in_arrays("calibration.npz", lambda a: a.update(elbo=a["elbo"][1:])),
        BundleFormatError,
        "calibration.n is 199, calibration.npz has 198 of elbo",
    ),
    "calibration of an unknown score": (
        in_arrays("calibration.npz", lambda a: a.update(other=a["elbo"])),
        BundleFormatError,
        "does not define: ['other']",
    ),
    "a quantile of other scores": (
        in_manifest(lambda m: m["calibration"]["quantiles"]["elbo"].update({"0.9": 1e6})),
        BundleFormatError,
        "calibration.quantiles of elbo: 0.9 is 1000000.0, outside",
    ),
    "a quantile that is none": (
        in_manifest(lambda m: m["calibration"]["quantiles"]["elbo"].update(median=0.0)),
        BundleFormatError,
        "'median' is no number of [0, 1]",
    ),
    "quantiles of a score that is not there": (
        in_manifest(lambda m: m["calibration"]["quantiles"].pop("iwae")),
        BundleFormatError,
        "calibration.quantiles tells of ['elbo']",
    ),
    "calibration that the manifest denies": (
        in_manifest(lambda m: m.update(calibration=None)),
        BundleFormatError,
        "the manifest's calibration is null",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_told_in_words(tmp_path, runtime, name):
    change, error, words = FAULTS[name]
    path, _ = write_ppca_bundle(tmp_path, change=change)
    report = verify_bundle(path, runtime)
    assert not report.ok
    assert type(report.error) is error
    assert words in report.summary()
    assert report.model is None
    assert not report.checks[-1].ok
    assert str(report).splitlines()[-1].startswith("FAIL ")
    with pytest.raises(error):
        report.raise_if_failed()


@pytest.mark.parametrize("name", ["table", "mixture", "pca", "whitening"])
def test_every_kind_of_bundle_passes(tmp_path, runtime, name):
    report = verify_bundle(getattr(linear, f"write_{name}")(tmp_path), runtime)
    assert report.ok, report


def with_reference(path, root, edit):
    """The bundle at ``path`` again below ``root``, with a change to its reference."""
    written = open_bundle(path)
    files = {name: written.read(name) for name in written.manifest.files}
    in_arrays("reference.npz", edit)({}, files)
    return write_bundle(root, written.manifest.model_dump(mode="json", exclude={"files"}), files)


def test_evidence_that_the_reference_belies_is_refused(tmp_path, runtime):
    report = verify_bundle(linear.write_mixture(tmp_path, evidence="exact"), runtime)
    assert isinstance(report.error, BundleFormatError)
    assert "evidence is 'exact', but log w spreads over" in report.summary()


@pytest.mark.parametrize("output", ["encoder.scale", "encoder.z"])
def test_a_point_that_the_reference_belies_is_refused(tmp_path, runtime, output):
    path = with_reference(linear.write_whitening(tmp_path / "sound"), tmp_path, nudge(output, 1e-3))
    report = verify_bundle(path, runtime)
    assert isinstance(report.error, BundleFormatError)
    assert "posterior.moments is 'point', but scale is not 0 or z not loc" in report.summary()


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (nudge("prior.z", 1e-2), BundleParityError, "prior.z differs by"),
        (lambda arrays: arrays.pop("prior.z"), BundleFormatError, "lacks ['prior.z']"),
        (lambda arrays: arrays.pop("prior_choice"), BundleFormatError, "lacks ['prior_choice']"),
        (
            lambda arrays: arrays.update(prior_choice=arrays["prior_choice"][1:]),
            BundleFormatError,
            "prior_choice is float32 (6,), expected float32 (7,)",
        ),
        (
            lambda arrays: arrays.update(prior_noise=np.float32(0)),
            BundleFormatError,
            "prior_noise is float32 (), expected float32 (1, 3)",
        ),
    ],
)
def test_a_prior_s_graph_is_replayed(tmp_path, runtime, edit, error, words):
    path = with_reference(linear.write_mixture(tmp_path / "sound"), tmp_path, edit)
    report = verify_bundle(path, runtime)
    assert type(report.error) is error
    assert words in report.summary()


def test_a_failed_check_has_a_name_in_words(tmp_path, runtime):
    names = {}
    for case, (change, error, _) in FAULTS.items():
        path, _ = write_ppca_bundle(tmp_path / case, change=change)
        names[error] = verify_bundle(path, runtime).checks[-1].name
    assert names == {BundleFormatError: "format", BundleGraphError: "graphs", BundleParityError: "parity"}
    assert verify_bundle(tmp_path / "nothing").checks[-1].name == "files"


def test_faults_of_files_are_reported_too(tmp_path):
    assert isinstance(verify_bundle(tmp_path / "nothing").error, BundleNotFound)
    path, _ = write_ppca_bundle(tmp_path)
    (path / "extra").write_text("")
    assert isinstance(verify_bundle(path).error, BundleIntegrityError)


def test_a_bundle_without_calibration_says_so(tmp_path, runtime):
    def change(manifest, files):
        manifest["calibration"] = None
        del files["calibration.npz"]

    path, _ = write_ppca_bundle(tmp_path, change=change)
    assert verify_bundle(path, runtime).checks[-1].outcome == "none: scores come without p-values"


def test_parity_is_replayed_at_several_sizes():
    assert {1, 2} <= set(BATCH_SIZES)


def test_verification_needs_neither_onnx_nor_torch(ppca_path):
    code = (
        "import sys; from service.inference.verification import verify_bundle;"
        "assert verify_bundle(sys.argv[1]).ok;"
        "print(sorted({'onnx', 'torch', 'training', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(ppca_path)], capture_output=True, check=True, text=True)
    assert run.stdout == "[]\n"


def test_a_tolerance_is_measured_by_what_log_p_x_sums(tmp_path, runtime):
    """Terms of either sign may cancel: rounding, and so the tolerance, is relative to the terms, not to their sum."""

    def generous(manifest, files):
        with np.load(io.BytesIO(files["reference.npz"])) as arrays:
            terms = np.abs(arrays["joint.log_p_x_given_z_map"]).sum(axis=(-3, -2, -1)).max()
            atol = 0.00999 * float(terms)
            assert atol > 0.01 * np.abs(arrays["joint.log_p_x_given_z"]).max()
        manifest["reference"]["tolerances"]["joint.log_p_x_given_z"] = {"atol": atol, "rtol": 0.0}

    path, _ = write_ppca_bundle(tmp_path, change=generous)
    assert verify_bundle(path, runtime).ok
