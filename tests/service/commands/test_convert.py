"""``vaeserve convert``: bundles of formats 3 and 4 answer in format 5 what they answered before.

The bundles of bundles_of_format_4/ were written by the trainer of vaeserve 0.2.0, of 4×4 random pixels: a VAE of random
weights and a PCA with fitted scores, both calibrated, an ICA and a PPCA. answers.npz holds, by "MODEL/ANSWER", what its
service gave for the six images ``rows``: the bundle's scores, those of five samples of the seed 2, maps, latents,
reconstructions and draws; and by "probe/MODEL/GRAPH.OUTPUT" what each old graph gives where every input is 0.3.
"""

import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from typer.testing import CliRunner

from service.bundle.files import open_bundle
from service.bundle.manifest import MANIFEST, SEAL
from service.commands import conversion
from service.commands.cli import app
from service.commands.conversion import convert_bundle
from service.errors import BundleFormatError, BundleGraphError, BundleIntegrityError, BundleParityError
from service.inference.model import Model
from service.inference.sessions import Runtime
from service.pixels import unit_levels

OLD = Path(__file__).parent / "bundles_of_format_4"
MODELS = ("vae", "pca", "ica", "ppca")


def run(*arguments: object):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def repository(tmp_path):
    """A folder of the old bundles that a test may write to."""
    return Path(shutil.copytree(OLD, tmp_path / "exported", ignore=shutil.ignore_patterns("answers.npz")))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The new bundles, in a folder of their own."""
    root = tmp_path_factory.mktemp("converted")
    for name in MODELS:
        assert convert_bundle(OLD / name / "1", root, in_place=False) == (4, root / name / "1")
    return root


@pytest.fixture(scope="module")
def recorded():
    with np.load(OLD / "answers.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def rounds_as_recorded(recorded):
    """Whether this machine's arithmetic is, to the bit, that of the one that recorded the answers."""
    functions = [function(np.linspace(0.1, 3, 64)) for function in (np.log, np.exp, np.log1p, np.sqrt)]
    same = [np.array_equal(np.concatenate(functions), recorded["probe/numpy"])]
    for path in OLD.glob("*/1/*.onnx"):
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        sizes = {value.name: [n if isinstance(n, int) else 2 for n in value.shape] for value in session.get_inputs()}
        outputs = session.run(None, {name: np.full(shape, 0.3, np.float32) for name, shape in sizes.items()})
        for output, value in zip(session.get_outputs(), outputs, strict=True):
            same.append(np.array_equal(value, recorded[f"probe/{path.parts[-3]}/{path.stem}.{output.name}"]))
    return all(same)


def answers(model: Model, levels: np.ndarray) -> dict[str, np.ndarray]:
    """What answers.npz holds of a model."""
    x, scores = unit_levels(levels), model.manifest.scores
    several = next(iter(scores.values())).model_copy(update={"k": 5, "seed": 2})
    scored = model.score(x, several, also=scores)
    of_several = ("score", "elbo", "log_likelihood", "rate", "distortion", "standard_error")
    found = {f"score/{name}": values for name, values in scored.also.items()}
    found |= {name: getattr(scored, name) for name in of_several}
    for kind in ("anomaly", "distortion"):
        if not {"score.map", f"score.map.{kind}"} & model.refused.keys():
            found[f"map/{kind}"] = model.score(x, several, maps=True, map_kind=kind).map
    posterior = model.encode(x, samples=0 if "encode.samples" in model.refused else 2, seed=3)
    found |= posterior._asdict() | {"reconstruction": model.reconstruct(x), "observed": model.observe(posterior.loc, 4)}
    if "sample" not in model.refused:
        found["latents"] = model.sample_latents(3, seed=5)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_new_bundle_answers_bitwise_what_the_old_one_did(converted, recorded, rounds_as_recorded, name):
    model = Model.load(open_bundle(converted / name / "1"), Runtime("cpu"))
    found = answers(model, recorded["rows"])
    assert {f"{name}/{key}" for key in found} == {key for key in recorded if key.startswith(f"{name}/")}
    for key, value in found.items():
        np.testing.assert_allclose(value, recorded[f"{name}/{key}"], rtol=1e-5, atol=1e-5, err_msg=key)
    if not rounds_as_recorded:
        pytest.skip("this machine's processor or libraries round otherwise than those that recorded the answers")
    different = [k for k, v in found.items() if not np.array_equal(v, recorded[f"{name}/{k}"], equal_nan=True)]
    assert not different


@pytest.mark.parametrize(
    ("name", "noise_dim", "observation_noise", "samples"),
    [
        ("vae", 2, "uniform", 3),
        ("pca", 0, "none", 1),
        ("ica", 0, "none", 1),
        ("ppca", 2, "standard_normal", 3),
    ],
)
def test_noise_stays_only_where_something_is_drawn(converted, name, noise_dim, observation_noise, samples):
    bundle = open_bundle(converted / name / "1")
    reference = bundle.arrays("reference.npz")
    assert bundle.manifest.signature.noise_dim == noise_dim
    assert bundle.manifest.likelihood.observation_noise == observation_noise
    assert ("noise" in reference, "observation_noise" in reference) == (noise_dim > 0, observation_noise != "none")
    assert reference["encoder.z"].shape[1] == samples
    assert len(reference["decoder.mean"]) == len(reference["x"]) * samples
    for role, takes_noise in (("encoder", noise_dim > 0), ("observation", observation_noise != "none")):
        inputs = {value.name for value in onnx.load_from_string(bundle.graph(role)).graph.input}
        assert ("noise" in inputs) is takes_noise


def test_what_no_format_changed_is_carried_over(converted):
    for name in MODELS:
        old, new = contents(OLD / name / "1"), contents(converted / name / "1")
        assert new.keys() - {"joint.onnx", SEAL} == old.keys() - {"density.onnx"}
        rewritten = {"joint.onnx", "encoder.onnx", "reference.npz", MANIFEST, SEAL}
        if name in ("pca", "ica"):
            rewritten.add("observation.onnx")
        assert {file for file, data in new.items() if old.get(file) != data} == rewritten
        before, after = (json.loads(files[MANIFEST]) for files in (old, new))
        changed = {"format_version", "graphs", "files", "reference"}
        if name in ("pca", "ica"):
            changed |= {"signature", "likelihood"}
        assert {key for key in after if before[key] != after[key]} == changed
        assert list(after["files"]) == ["joint.onnx" if file == "density.onnx" else file for file in before["files"]]


def test_a_negative_error_is_called_so(converted):
    outputs = {}
    for name in MODELS:
        graph = onnx.load_from_string(open_bundle(converted / name / "1").graph("joint")).graph
        outputs[name] = [value.name for value in graph.output]
    assert outputs["pca"] == ["negative_error", "negative_error_map", "log_p_z"]
    assert outputs["vae"] == outputs["ica"] == ["log_p_x_given_z", "log_p_x_given_z_map", "log_p_z"]


def test_format_3_with_its_defaults_left_out_gives_the_same(repository, converted):
    path = repository / "vae" / "1"
    document = json.loads((path / MANIFEST).read_text())
    document["format_version"] = 3
    for part in ("posterior", "prior", "backbone", "evidence"):
        del document[part]
    (path / MANIFEST).write_text(json.dumps(document))
    assert convert_bundle(path, repository / "new", in_place=False) == (3, repository / "new" / "vae" / "1")
    assert contents(repository / "new" / "vae" / "1") == contents(converted / "vae" / "1")


def test_the_next_free_version_is_written_and_the_old_one_stays(repository):
    before = contents(repository)
    done = run(repository / "vae" / "1", repository / "ica" / "1")
    assert done.exit_code == 0
    assert f"{repository / 'vae' / '2'}: converted from format 4, verified" in done.stdout
    assert f"no server takes {repository / 'vae' / '1'}: remove it" in done.stdout
    assert open_bundle(repository / "vae" / "2").manifest.version == "2"
    assert open_bundle(repository / "ica" / "2").manifest.version == "2"
    assert {name: data for name, data in contents(repository).items() if "/2/" not in name} == before


def test_in_another_folder_a_bundle_keeps_its_version_where_that_is_free(repository, tmp_path):
    for version in ("1", "2"):
        assert run(repository / "vae" / "1", "--to", tmp_path / "new").exit_code == 0
        assert open_bundle(tmp_path / "new" / "vae" / version).manifest.version == version


def test_in_place_the_new_bundle_stands_where_the_old_one_stood(repository, converted):
    done = run(repository / "pca" / "1", "--in-place")
    assert done.exit_code == 0, done.stderr
    assert contents(repository / "pca") == contents(converted / "pca")
    assert sorted(entry.name for entry in repository.iterdir()) == sorted(MODELS)


def test_a_bundle_of_the_present_format_is_left_alone(repository):
    assert run(repository / "vae" / "1", "--in-place").exit_code == 0
    before = contents(repository)
    done = run(repository / "vae" / "1", "--in-place")
    assert done.exit_code == 0
    assert done.stdout == f"{repository / 'vae' / '1'} is of the present format already\n"
    assert contents(repository) == before


def truncated(path: Path) -> None:
    (path / "density.onnx").write_bytes((path / "density.onnx").read_bytes()[:-1])


def unlisted(path: Path) -> None:
    (path / "extra").write_text("")


def in_manifest(change):
    def edit(path: Path) -> None:
        document = json.loads((path / MANIFEST).read_text())
        change(document)
        (path / MANIFEST).write_text(json.dumps(document))

    return edit


def rehash(path: Path, file: str) -> None:
    """Tell the manifest of the file's new content."""
    data = (path / file).read_bytes()
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    in_manifest(lambda document: document["files"].update({file: record}))(path)


def in_graph(file: str, change):
    """A change to one graph, whose new hash the manifest tells."""

    def edit(path: Path) -> None:
        model = onnx.load_from_string((path / file).read_bytes())
        change(model.graph)
        (path / file).write_bytes(model.SerializeToString())
        rehash(path, file)

    return edit


def in_reference(change):
    """A change to reference.npz, whose new hash the manifest tells."""

    def edit(path: Path) -> None:
        with np.load(path / "reference.npz") as archive:
            arrays = dict(archive)
        change(arrays)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        (path / "reference.npz").write_bytes(buffer.getvalue())
        rehash(path, "reference.npz")

    return edit


def use_noise(graph) -> None:
    """z becomes loc + noise, in an encoder of which the manifest says that it is a function."""
    node = next(node for node in graph.node if "z" in node.output)
    node.output[0] = "still"
    graph.node.append(helper.make_node("Add", ["still", "noise"], ["z"]))


def draw_noise(graph) -> None:
    """The sample becomes noise added to what it was."""
    node = next(node for node in graph.node if "sample" in node.output)
    node.output[0] = "still"
    graph.node.append(helper.make_node("Add", ["still", "noise"], ["sample"]))


def evil(graph) -> None:
    graph.node[0].op_type = "Evil"


FAULTS = {
    "a file that was cut": (truncated, BundleIntegrityError, "density.onnx has"),
    "a file that is not listed": (unlisted, BundleIntegrityError, "files that the manifest does not list: ['extra']"),
    "format 2": (in_manifest(lambda m: m.update(format_version=2)), BundleFormatError, "reads 5 and converts 3 and 4"),
    "a manifest without graphs": (in_manifest(lambda m: m.pop("graphs")), BundleFormatError, "KeyError: 'graphs'"),
    "no density": (in_manifest(lambda m: m["graphs"].pop("density")), BundleFormatError, "graphs lacks ['joint']"),
    "a file elsewhere": (
        in_manifest(lambda m: m["files"].update({"../up": m["files"]["encoder.onnx"]})),
        BundleFormatError,
        "String should match pattern",
    ),
    "an operator": (in_graph("density.onnx", evil), BundleGraphError, "operator 'Evil'"),
    "an encoder that uses its noise": (
        in_graph("encoder.onnx", use_noise),
        BundleParityError,
        "encoder gives other z than before",
    ),
    "draws that use their noise": (
        in_graph("observation.onnx", draw_noise),
        BundleParityError,
        "observation gives other sample than before",
    ),
    "a reference of other outputs": (
        in_reference(lambda arrays: arrays.update({"encoder.log_q": arrays["encoder.log_q"] + 1})),
        BundleParityError,
        "encoder.log_q_z differs by 1",
    ),
    "a reference without noise": (
        in_reference(lambda arrays: arrays.pop("noise")),
        BundleFormatError,
        "reference.npz holds no noise of shape [N,K,E]",
    ),
}


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in place"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_bundle_is_refused_and_nothing_is_written(repository, fault, in_place):
    damage, error, words = FAULTS[fault]
    path = repository / "ica" / "1"
    damage(path)
    before = contents(repository)
    with pytest.raises(error) as caught:
        convert_bundle(path, None, in_place)
    assert words in str(caught.value)
    done = run(path, *(["--in-place"] if in_place else []))
    assert done.exit_code == 1
    assert f"vaeserve: {path} is not converted: " in done.stderr
    assert contents(repository) == before
    assert sorted(entry.name for entry in repository.iterdir()) == sorted(MODELS)


def test_a_bundle_that_cannot_be_moved_away_stays(repository, monkeypatch):
    """The second of the two renames fails: the old bundle is put back."""
    path, before, rename = repository / "vae" / "1", contents(repository), Path.rename

    def refused(self: Path, target: Path) -> Path:
        if Path(target) == path and self.name == "1":
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OSError, match="no space left"):
        convert_bundle(path, None, in_place=True)
    assert contents(repository) == before


def test_a_bundle_outside_a_folder_of_bundles_needs_one_to_be_written_to(repository, tmp_path):
    path = Path(shutil.copytree(repository / "vae" / "1", tmp_path / "alone"))
    done = run(path)
    assert done.exit_code == 1
    assert "expected under vae/1/: say --to DIR" in done.stderr
    assert run(path, "--to", tmp_path / "new").exit_code == 0


def test_a_value_that_has_a_new_name_already_makes_room(repository, converted):
    """In the old graph a value inside was called as an output is now."""

    def rename(graph) -> None:
        inside = graph.node[0].output[0]
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = ["log_p_x_given_z" if name == inside else name for name in names]

    path = repository / "vae" / "1"
    in_graph("density.onnx", rename)(path)
    (_, new) = convert_bundle(path, repository / "new", in_place=False)
    assert (
        open_bundle(new).arrays("reference.npz").keys()
        == open_bundle(converted / "vae" / "1").arrays("reference.npz").keys()
    )


def test_both_places_at_once_are_refused(repository, tmp_path):
    done = run(repository / "vae" / "1", "--to", tmp_path, "--in-place")
    assert done.exit_code == 1
    assert "--to and --in-place: expected one of them" in done.stderr


def test_without_onnx_the_command_says_what_to_install(repository, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, conversion.__name__)
    monkeypatch.delattr("service.commands.conversion")
    before = contents(repository)
    done = run(repository / "vae" / "1")
    assert done.exit_code == 1
    assert done.stderr == (
        "vaeserve: vaeserve convert needs the package onnx, which nothing else here does: "
        "pip install 'vaeserve[convert]'\n"
    )
    assert contents(repository) == before
