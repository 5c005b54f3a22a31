"""Converting a bundle of format 3 or 4 to format 5, which gives the same numbers, bitwise: for ``vaeserve convert``.

The manifest, the names of reference.npz and the graphs encoder, joint and observation are rewritten (service.bundle
says what the formats differ in); every other file is carried over as it is. Before the new bundle is put in its place
it is verified as a server would, and each rewritten graph must give bitwise what the old one gives for the reference.

This is the service's only module that imports the package onnx, which the extra ``convert`` brings.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from service.bundle.files import Bundle, next_version, npz_arrays, read_files, read_manifest, write_bundle
from service.bundle.manifest import (
    CONVERTIBLE_VERSIONS,
    FORMAT_VERSION,
    MANIFEST,
    REFERENCE,
    Graph,
    Manifest,
    format_version,
    parse_manifest,
    read_document,
)
from service.bundle.operators import check_operators
from service.errors import BundleError, BundleFormatError, BundleGraphError, BundleParityError
from service.inference.sessions import Runtime
from service.inference.verification import open_verified, reference_feeds

OLD_JOINT_FILE, JOINT_FILE = "density.onnx", "joint.onnx"
NOISE = "noise"

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class OldBundle:
    """A bundle of format 3 or 4 whose files have the sizes and hashes that its manifest lists.

    ``version``: its format. ``manifest``: what is to become of its manifest, with the records of the old files.
    ``files``: the old files' contents, under their new names. ``reference``: reference.npz, under its old names.
    """

    version: int
    manifest: Manifest
    files: dict[str, bytes]
    reference: Arrays

    @property
    def is_point(self) -> bool:
        """True if the encoder is a function, and its noise only multiplied by zero."""
        return self.manifest.signature.noise_dim == 0

    @property
    def draws_nothing(self) -> bool:
        """True if draws of x are a function of z, and the observation's noise only multiplied by zero."""
        likelihood = self.manifest.likelihood
        is_function = likelihood.family == "delta" or likelihood.measure == "none"
        return is_function and "observation" in self.manifest.graphs and "observation.sample" in self.reference

    @property
    def samples(self) -> int:
        """Number of posterior samples a row in reference.npz, K. Raises BundleFormatError for noise of another rank."""
        noise = self.reference.get(NOISE)
        if noise is None or noise.ndim != 3:
            raise BundleFormatError(f"{REFERENCE} holds no noise of shape [N,K,E]")
        return noise.shape[1]

    def graph(self, role: Graph) -> bytes:
        """Return the old serialised ONNX model of one graph, by its new role."""
        return self.files[self.manifest.graphs[role]]


def convert_bundle(folder: Path, to: Path | None, in_place: bool) -> tuple[int, Path] | None:
    """Convert the bundle in ``folder``; return its old format and the new bundle's folder.

    ``to``: the folder of bundles to write to, by default the one that holds the bundle. None is returned where the
    bundle is of format 5 already.

    Raises BundleNotFound, BundleIntegrityError, BundleFormatError and BundleGraphError for a bundle that is damaged or
    of another format, BundleParityError where the new bundle's numbers are not the old one's: nothing is written then.
    """
    data = read_manifest(folder)
    if format_version(read_document(data)) == FORMAT_VERSION:
        return None
    old = read_old(folder, data)
    root = to or _repository_of(folder, old.manifest)
    manifest, files = _today(old)
    if in_place:
        return old.version, _replace(folder, root, old, manifest, files)
    if (root / old.manifest.name / old.manifest.version).exists():
        manifest["version"] = next_version(root, old.manifest.name)
    return old.version, write_bundle(root, manifest, files, verify=lambda path: _verify(path, old))


def read_old(folder: Path, manifest: bytes) -> OldBundle:
    """Read the bundle of format 3 or 4 in ``folder``, of which ``manifest`` is manifest.json.

    Raises BundleFormatError for another format, for a manifest against the schema and for arrays that cannot be read,
    BundleIntegrityError for files that are not those of the manifest, BundleGraphError for graphs that no bundle holds.
    """
    document = read_document(manifest)
    if (version := format_version(document)) not in CONVERTIBLE_VERSIONS:
        parse_manifest(manifest)  # says which formats are supported
        raise BundleFormatError(f"format_version is {version!r}: {MANIFEST} is not of format 3 or 4")
    parsed = parse_manifest(json.dumps(_document_of_today(document)).encode())
    names = dict(zip(parsed.files, document["files"], strict=True))
    contents = dict(read_files(folder, {names[name]: record for name, record in parsed.files.items()}))
    files = {name: contents[names[name]] for name in parsed.files}
    for filename in parsed.graphs.values():
        check_operators(files[filename])
    return OldBundle(document["format_version"], parsed, files, npz_arrays(REFERENCE, files[REFERENCE]))


def _document_of_today(document: dict[str, Any]) -> dict[str, Any]:
    """Return manifest.json's content as format 5 has it, but for the observation's noise and the files' records.

    Raises BundleFormatError for one against the schema.
    """
    try:
        without_likelihood = document["likelihood"]["measure"] == "none"
        is_point = document.get("posterior", {}).get("moments") == "point"
        names = {} if JOINT_FILE in document["files"] else {OLD_JOINT_FILE: JOINT_FILE}
        files = {names.get(name, name): record for name, record in document["files"].items()}
        graphs = {
            "joint" if role == "density" else role: names.get(name, name) for role, name in document["graphs"].items()
        }
        signature = document["signature"] | ({"noise_dim": 0} if is_point else {})
        reference = {
            part: {_new_name(name, without_likelihood): value for name, value in document["reference"][part].items()}
            for part in ("tolerances", "max_abs_error")
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleFormatError(f"{MANIFEST} violates the schema: {type(error).__name__}: {error}") from error
    changed = {"graphs": graphs, "files": files, "signature": signature, "reference": reference}
    return document | changed | {"format_version": FORMAT_VERSION}


def _new_name(name: str, without_likelihood: bool) -> str:
    """Rename an array of reference.npz, or ``density.OUTPUT`` and ``encoder.OUTPUT`` elsewhere."""
    role, dot, output = name.partition(".")
    if role not in ("density", "encoder") or not dot:
        return name
    return f"{'joint' if role == 'density' else role}.{_new_outputs(without_likelihood).get(output, output)}"


def _new_outputs(without_likelihood: bool) -> dict[str, str]:
    """Map the outputs of graphs that have another name in format 5 to it."""
    fit = "negative_error" if without_likelihood else "log_p_x_given_z"
    return {"log_q": "log_q_z", "log_p_x": fit, "log_p_x_map": f"{fit}_map"}


def _today(old: OldBundle) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the new bundle's manifest, without ``files``, and its files."""
    manifest, files = old.manifest.model_dump(mode="json", exclude={"files"}), dict(old.files)
    if old.draws_nothing:
        manifest["likelihood"]["observation_noise"] = "none"
    for role in ("encoder", "joint", "observation"):
        if role in old.manifest.graphs:
            files[old.manifest.graphs[role]] = _graph_of_today(old, role)
    files[REFERENCE] = _npz(_reference_of_today(old))
    return manifest, files


def _graph_of_today(old: OldBundle, role: Graph) -> bytes:
    """Return the serialised ONNX model of one graph, rewritten. Raises BundleGraphError for one that ONNX refuses."""
    try:
        model = onnx.load_from_string(old.graph(role))
        _rename(model.graph, _new_outputs(old.manifest.likelihood.measure == "none"))
        if role == "encoder" and old.is_point:
            _without_noise(model.graph, "x", samples=1)
        if role == "observation" and old.draws_nothing:
            _without_noise(model.graph, old.manifest.likelihood.parameters[0], samples=None)
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise BundleGraphError(f"{role}: the graph cannot be rewritten: {error}") from error
    rewritten: bytes = model.SerializeToString(deterministic=True)
    return rewritten


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename values everywhere in the graph, in place; a value that has one of the new names gets another."""
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    names = {new: f"{new}.before" for new in names.values() if new in taken} | dict(names)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)


def _without_noise(graph: onnx.GraphProto, like: str, samples: int | None) -> None:
    """Replace the graph's input ``noise`` by zeros, in place: of the shape of the input ``like``, or [N,samples,E]."""
    (noise,) = [value for value in graph.input if value.name == NOISE]
    last = noise.type.tensor_type.shape.dim[-1].dim_value
    graph.input.remove(noise)
    shape = f"{NOISE}.shape"
    if samples is None:
        nodes = [helper.make_node("Shape", [like], [shape])]
    else:
        first, of_row = numpy_helper.from_array(np.array([0]), f"{NOISE}.first"), np.array([samples, last])
        graph.initializer.extend([first, numpy_helper.from_array(of_row, f"{NOISE}.of_row")])
        nodes = [
            helper.make_node("Shape", [like], [f"{NOISE}.like"]),
            helper.make_node("Gather", [f"{NOISE}.like", f"{NOISE}.first"], [f"{NOISE}.rows"], axis=0),
            helper.make_node("Concat", [f"{NOISE}.rows", f"{NOISE}.of_row"], [shape], axis=0),
        ]
        for output in graph.output:
            if output.name in ("z", "log_q_z"):
                output.type.tensor_type.shape.dim[1].dim_value = samples
    nodes += [helper.make_node("ConstantOfShape", [shape], [NOISE]), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _reference_of_today(old: OldBundle) -> Arrays:
    """Return the arrays of reference.npz as format 5 has them: a point's first sample alone, no noise where none is."""
    without_likelihood = old.manifest.likelihood.measure == "none"
    arrays = {_new_name(name, without_likelihood): array for name, array in old.reference.items()}
    if old.is_point:
        arrays = {name: _first_samples(name, array, old.samples) for name, array in arrays.items() if name != NOISE}
    if old.draws_nothing:
        del arrays["observation_noise"]
    return arrays


def _first_samples(name: str, array: np.ndarray, samples: int) -> np.ndarray:
    """Keep the first of the samples of each row, of an array [N,K,…] or [N·K,…]; others have none to leave out."""
    if name.startswith("joint.") or name in ("encoder.z", "encoder.log_q_z", NOISE):
        return array[:, :1]
    return array[::samples] if name.startswith(("decoder.", "observation")) else array


def _verify(folder: Path, old: OldBundle) -> None:
    """Verify the new bundle in ``folder``. Raises what verification raises, and BundleParityError for other numbers."""
    bundle = open_verified(folder)
    feeds = reference_feeds(bundle.manifest, bundle.arrays(REFERENCE))
    noise: dict[str, Arrays] = {}
    if old.is_point:
        noise["encoder"] = {NOISE: _first_samples(NOISE, old.reference[NOISE], old.samples)}
    if old.draws_nothing:
        of_first = old.reference["observation_noise"][:: old.samples if old.is_point else 1]
        noise["observation"] = {NOISE: of_first}
    for role in ("encoder", "joint", "observation"):
        if role in feeds:
            _check_unchanged(bundle, old, role, feeds[role], feeds[role] | noise.get(role, {}))


def _check_unchanged(bundle: Bundle, old: OldBundle, role: Graph, feeds: Arrays, old_feeds: Arrays) -> None:
    """Raise BundleParityError unless the new graph gives for ``feeds`` what the old one gives for ``old_feeds``."""
    names = _new_outputs(old.manifest.likelihood.measure == "none")
    before = {names.get(name, name): value for name, value in _outputs(old.graph(role), old_feeds).items()}
    after = _outputs(bundle.graph(role), feeds)
    if different := sorted(name for name in before if not np.array_equal(before[name], after[name])):
        raise BundleParityError(
            f"{role} gives other {', '.join(different)} than before: the old graph makes something of its noise, "
            "where the manifest says that there is nothing to draw"
        )


def _outputs(graph: bytes, feeds: Arrays) -> Arrays:
    """Run a serialised ONNX model on ``feeds``: its outputs by name."""
    session = Runtime("cpu", threads=1).session(graph)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def _repository_of(folder: Path, manifest: Manifest) -> Path:
    """Return the folder of bundles that ``folder`` is one of. Raises BundleError unless it is NAME/VERSION there."""
    place = folder.resolve()
    if (place.parent.name, place.name) != (manifest.name, manifest.version):
        raise BundleError(
            f"{folder} holds {manifest.name} {manifest.version}, expected under {manifest.name}/{manifest.version}/: "
            "say --to DIR, the folder of bundles to write to"
        )
    return place.parents[1]


def _replace(folder: Path, root: Path, old: OldBundle, manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> Path:
    """Put the new bundle in the place of the old one, which goes once the new one stands; by two renames."""
    target = folder.resolve()
    with tempfile.TemporaryDirectory(prefix=".convert.", dir=root) as scratch:
        new = write_bundle(scratch, manifest, files, verify=lambda path: _verify(path, old))
        spare = new.with_name("old")
        try:
            target.rename(spare)
            new.rename(target)
        except BaseException:
            if not target.exists():
                spare.rename(target)
            raise
    return folder


def _npz(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
