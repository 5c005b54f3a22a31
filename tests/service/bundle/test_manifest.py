from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.bundle import manifest as contract
from service.bundle.manifest import MANIFEST, next_version, open_bundle, parse_manifest, schema_text
from service.errors import BundleError, BundleFormatError, BundleIntegrityError, BundleNotFound
from tests.ppca_bundle import write_ppca_bundle
from tests.service import linear_bundles as linear

SCHEMA = Path(__file__).parents[3] / "exported" / "manifest.schema.json"


@pytest.fixture
def copy(ppca_path: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(ppca_path, tmp_path / "copy"))


def rewrite(path: Path, change) -> None:
    """Change the manifest on disk."""
    document = json.loads((path / MANIFEST).read_text())
    change(document)
    (path / MANIFEST).write_text(json.dumps(document))


def test_the_committed_schema_is_the_contract_s():
    assert SCHEMA.read_text() == schema_text(), "run: python -m service.bundle.manifest > exported/manifest.schema.json"


def test_a_written_manifest_satisfies_the_committed_schema(ppca_path):
    schema = json.loads(SCHEMA.read_text())
    found = jsonschema.validators.validator_for(schema)(schema)
    assert list(found.iter_errors(json.loads((ppca_path / MANIFEST).read_text()))) == []


def test_open_gives_manifest_digest_graphs_and_arrays(ppca_path):
    bundle = open_bundle(ppca_path)
    assert (bundle.manifest.name, bundle.manifest.version) == ("ppca", "1")
    assert bundle.digest == contract.hashlib.sha256((ppca_path / MANIFEST).read_bytes()).hexdigest()
    assert bundle.graph("encoder") == (ppca_path / "encoder.onnx").read_bytes()
    assert bundle.arrays("reference.npz")["x"].shape == (6, 1, 8, 8)


@pytest.mark.parametrize("name", ["encoder.onnx", "reference.npz", "README.md"])
def test_any_flipped_byte_is_refused(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleIntegrityError, match=rf"{name} has sha256"):
        open_bundle(copy)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_refused(ppca_path, tmp_path, data):
    """In the manifest too: there a flip breaks the JSON or the schema, or changes the digest that names the bundle."""
    names = sorted(entry.name for entry in ppca_path.iterdir())
    name = data.draw(st.sampled_from(names))
    content = bytearray((ppca_path / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    copy = tmp_path / "flipped"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ppca_path, copy)
    (copy / name).write_bytes(content)
    if name == MANIFEST:
        try:
            assert open_bundle(copy).digest != open_bundle(ppca_path).digest
        except (BundleFormatError, BundleIntegrityError):
            return
    else:
        with pytest.raises(BundleIntegrityError):
            open_bundle(copy)


def test_truncation_is_refused(copy):
    data = (copy / "decoder.onnx").read_bytes()
    (copy / "decoder.onnx").write_bytes(data[:-1])
    with pytest.raises(BundleIntegrityError, match=f"has {len(data) - 1} bytes, the manifest says {len(data)}"):
        open_bundle(copy)


def test_a_grown_file_is_refused_unread(copy):
    with (copy / "decoder.onnx").open("ab") as file:
        file.truncate(2**40)  # sparse: reading it would take a terabyte
    with pytest.raises(BundleIntegrityError, match="at most"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "figures/extra.png"])
def test_an_extra_file_is_refused(copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("")
    with pytest.raises(BundleIntegrityError, match="does not list"):
        open_bundle(copy)


def test_a_missing_file_is_refused(copy):
    (copy / "density.onnx").unlink()
    with pytest.raises(BundleIntegrityError, match=r"density\.onnx cannot be read"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["encoder.onnx", MANIFEST])
def test_a_link_is_refused_even_to_the_same_bytes(copy, tmp_path, name):
    outside = tmp_path / "outside"
    shutil.move(copy / name, outside)
    (copy / name).symlink_to(outside)
    with pytest.raises(BundleIntegrityError, match="link"):
        open_bundle(copy)


def test_a_linked_subfolder_is_refused(copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (copy / "figures").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleIntegrityError, match="link"):
        open_bundle(copy)


def test_a_pipe_is_refused_without_hanging(copy):
    (copy / "README.md").unlink()
    os.mkfifo(copy / "README.md")
    with pytest.raises(BundleIntegrityError, match="special file"):
        open_bundle(copy)


def test_a_file_that_changes_after_opening_is_refused_on_reading(copy):
    bundle = open_bundle(copy)
    data = (copy / "encoder.onnx").read_bytes()
    (copy / "encoder.onnx").write_bytes(data[:-1] + b"x")
    with pytest.raises(BundleIntegrityError):
        bundle.graph("encoder")


@pytest.mark.parametrize("version", [0, 5, "1", 1.0, True, None])
def test_another_format_version_is_refused_with_an_instruction(copy, version):
    rewrite(copy, lambda document: document.update(format_version=version))
    with pytest.raises(BundleFormatError, match="this vaeserve reads 1 to 4: export the bundle again"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(surprise=1), "surprise: Extra inputs"),
        (lambda d: d.update(name="../up"), "name: String should match"),
        (lambda d: d.update(version="01"), "version: String should match"),
        (lambda d: d["signature"].update(latent_dim="5"), r"signature\.latent_dim: Input should be a valid integer"),
        (lambda d: d["signature"].update(shape=[3, 8, 8]), "is not preprocessing's"),
        (lambda d: d.update(default_score="none"), "default_score 'none' is not among scores"),
        (lambda d: d["graphs"].pop("density"), "graphs lacks"),
        (lambda d: d["graphs"].update(encoder="../encoder.onnx"), "String should match"),
        (lambda d: d["graphs"].update(encoder="other.onnx"), r"files lacks \['other\.onnx'\]"),
        (lambda d: d["files"].pop("reference.npz"), "files lacks"),
        (lambda d: d["files"].pop("calibration.npz"), "files lacks"),
        (lambda d: d["files"].update({MANIFEST: d["files"]["README.md"]}), "cannot hold its own hash"),
        (lambda d: d["files"].update({"/etc/passwd": d["files"]["README.md"]}), "String should match"),
        (lambda d: d["files"].update({"a/../../b": d["files"]["README.md"]}), "String should match"),
        (lambda d: d["scores"]["elbo"].update(k=0), "greater than or equal to 1"),
        (lambda d: d["scores"]["elbo"].update(seed=2**32), "less than 4294967296"),
    ],
)
def test_a_manifest_against_the_schema_is_refused_in_words(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(BundleFormatError, match=message):
        open_bundle(copy)


VECTOR = {"kind": "vector", "natural": [4], "features": linear.FEATURES}
BY_RECONSTRUCTION = {"elbo": {"estimator": "reconstruction", "k": 1, "seed": 0}}


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (linear.write_table, {"preprocessing": VECTOR | {"natural": [5]}}, "4 features of a vector of shape"),
        (linear.write_table, {"preprocessing": VECTOR | {"natural": [2, 2]}}, r"expected \(D,\) for a vector"),
        (linear.write_table, {"preprocessing": {"kind": "vector", "natural": [5]}}, "is not preprocessing's"),
        (linear.write_table, {"preprocessing": VECTOR | {"kind": "image"}}, "preprocessing.image.mode: Field required"),
        (linear.write_table, {"preprocessing": VECTOR | {"kind": "text"}}, "Input should be 'vector' or 'signal'"),
        (linear.write_table, {"preprocessing": VECTOR | {"features": ["a", "b", "c", "a"]}}, "the same name twice"),
        (linear.write_table, {"preprocessing": VECTOR | {"features": ["a", "b", "c", "1e3"]}}, "reads as a number"),
        (linear.write_table, {"preprocessing": VECTOR | {"features": ["a", "b", "c", " d"]}}, "should match pattern"),
        (linear.write_table, {"preprocessing": VECTOR | {"mode": "L"}}, "mode: Extra inputs"),
        (linear.write_table, {"prior": {"family": "mixture"}}, "prior.noise_dim is null"),
        (linear.write_table, {"prior": {"family": "mixture", "noise_dim": 2}}, r"graphs lacks \['prior'\]"),
        (linear.write_table, {"prior": {"family": "none"}}, "evidence 'exact' needs a p"),
        (linear.write_mixture, {"prior": {"choice": True}}, "family 'standard_normal' has none"),
        (linear.write_mixture, {"prior": {"noise_dim": 3}}, "family 'standard_normal' has none"),
        (linear.write_mixture, {"prior": {}}, "graphs has a prior, family 'standard_normal' needs none"),
        (linear.write_table, {"evidence": "none"}, "both none, or neither"),
        (linear.write_pca, {"evidence": "bound"}, "both none, or neither"),
        (linear.write_pca, {"scores": {"error": {"estimator": "elbo", "k": 1, "seed": 0}}}, "reconstruction expected"),
        (linear.write_whitening, {"scores": BY_RECONSTRUCTION}, "does without loss"),
        (
            linear.write_table,
            {"scores": {"elbo": {"estimator": "elbo", "k": 1, "seed": 0, "unit": "bits"}}},
            "with a likelihood nats expected",
        ),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_in_words(tmp_path, write, changes, message):
    with pytest.raises(BundleFormatError, match=message):
        write(tmp_path, **changes)


def test_a_manifest_of_format_1_is_one_of_today_with_the_defaults(copy):
    """What later formats brought is struck out: the rest is as format 1 had it."""
    before = open_bundle(copy).manifest
    assert before.format_version == 4

    def strike(document):
        document["format_version"] = 1
        del document["evidence"], document["posterior"], document["preprocessing"]["kind"]
        del document["prior"]["noise_dim"], document["prior"]["choice"], document["likelihood"]["pixelwise"]
        for score in document["scores"].values():
            del score["unit"], score["of"], score["method"]

    rewrite(copy, strike)
    assert open_bundle(copy).manifest == before.model_copy(update={"format_version": 1})
    jsonschema.validate(json.loads((copy / MANIFEST).read_text()), json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("version", [2, 3])
def test_a_manifest_of_formats_2_and_3_is_one_of_today(copy, version):
    before = open_bundle(copy).manifest
    rewrite(copy, lambda document: document.update(format_version=version))
    assert open_bundle(copy).manifest == before.model_copy(update={"format_version": version})


@pytest.mark.parametrize("name", ["table", "mixture", "pca", "whitening"])
def test_every_kind_satisfies_the_committed_schema_and_survives_its_own_json(tmp_path, name):
    path = getattr(linear, f"write_{name}")(tmp_path)
    jsonschema.validate(json.loads((path / MANIFEST).read_text()), json.loads(SCHEMA.read_text()))
    manifest = open_bundle(path).manifest
    assert parse_manifest(manifest.model_dump_json().encode()) == manifest


def test_only_a_prior_that_is_drawn_by_a_graph_has_inputs_and_outputs(ppca_path, tmp_path):
    spec = contract.graph_spec(open_bundle(linear.write_mixture(tmp_path)).manifest, "prior")
    assert [tensor[::2] for tensor in spec.inputs] == [("noise", ("M", 3)), ("choice", ("M",))]
    assert [tensor[::2] for tensor in spec.outputs] == [("z", ("M", 3))]
    with pytest.raises(BundleFormatError, match="not drawn by a graph"):
        contract.graph_spec(open_bundle(ppca_path).manifest, "prior")


def test_duplicate_keys_are_refused(copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"name": "ppca"', '"name": "ppca", "name": "ppca"', 1))
    with pytest.raises(BundleFormatError, match=r"duplicate keys \['name'\]"):
        open_bundle(copy)


@pytest.mark.parametrize("text", ["", "[]", "nul", "{", '{"format_version": NaN}', "[" * 100_000, "\xff", '"\\ud800"'])
def test_a_manifest_that_is_no_json_object_is_refused(copy, text):
    (copy / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleFormatError):
        open_bundle(copy)


def test_nothing_there_is_not_found(tmp_path):
    with pytest.raises(BundleNotFound, match="is not a folder"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(BundleNotFound, match=r"holds no manifest\.json"):
        open_bundle(tmp_path)


def _npy_bomb() -> bytes:
    """A .npz member whose header claims 4 TB."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    return buffer.getvalue()


def _damaged(kind: str) -> bytes:
    """An archive whose entries are sound, and whose one member cannot be unpacked."""
    buffer = io.BytesIO()
    method = contract.zipfile.ZIP_LZMA if kind == "lzma" else contract.zipfile.ZIP_DEFLATED
    with contract.zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("x.npy", _npy_bomb() + bytes(range(256)) * 4)
    data = bytearray(buffer.getvalue())
    if kind == "encrypted":
        for head, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            data[data.index(head) + flags] |= 1
    else:
        start = data.index(b"x.npy") + len("x.npy") + (9 if kind == "lzma" else 0)
        data[start : start + 8] = b"\xff" * 8
    return bytes(data)


@pytest.mark.parametrize("kind", ["text", "pickle", "huge", "wrapped", "deflate", "lzma", "encrypted"])
def test_arrays_that_are_not_plain_are_refused(tmp_path, kind):
    def change(_manifest, files):
        buffer = io.BytesIO()
        if kind in ("deflate", "lzma", "encrypted"):
            buffer.write(_damaged(kind))
        elif kind == "pickle":
            np.savez(buffer, x=np.array([{}], dtype=object))
        elif kind == "huge":
            with contract.zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("x.npy", _npy_bomb())
        elif kind == "wrapped":
            with contract.zipfile.ZipFile(buffer, "w", contract.zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("x.npy", b"\x93NUMPY\x01\x00\x02\x00{}")
        files["reference.npz"] = buffer.getvalue() or b"no archive"

    path, _ = write_ppca_bundle(tmp_path, change=change)
    with pytest.raises(BundleFormatError, match=r"reference\.npz is not a readable \.npz"):
        open_bundle(path).arrays("reference.npz")


def test_a_zip_bomb_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "MAX_ARRAYS_BYTES", 2**16)

    def change(_manifest, files):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, x=np.zeros(2**20))
        files["reference.npz"] = buffer.getvalue()

    path, _ = write_ppca_bundle(tmp_path, change=change)
    with pytest.raises(BundleFormatError, match="unpacks to"):
        open_bundle(path).arrays("reference.npz")


def test_a_version_is_never_overwritten(tmp_path):
    path, _ = write_ppca_bundle(tmp_path)
    before = (path / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match="never overwritten"):
        write_ppca_bundle(tmp_path, change=lambda manifest, _: manifest.update(description="another"))
    assert (path / MANIFEST).read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["1"]


def test_a_refused_bundle_leaves_nothing_behind(tmp_path):
    def refuse(folder: Path) -> None:
        assert open_bundle(folder).manifest.name == "ppca"
        assert not (tmp_path / "ppca" / "1").exists()
        raise RuntimeError("parity")

    with pytest.raises(RuntimeError, match="parity"):
        write_ppca_bundle(tmp_path, verify=refuse)
    assert list((tmp_path / "ppca").iterdir()) == []


def test_a_bundle_is_readable_by_other_users(tmp_path):
    path, _ = write_ppca_bundle(tmp_path)
    assert path.stat().st_mode & 0o055 == 0o055


def test_next_version_counts_up_and_ignores_what_is_no_version(tmp_path):
    assert next_version(tmp_path, "ppca") == "1"
    for name in ("1", "9", "10", "notes", ".11.tmp"):
        (tmp_path / "ppca" / name).mkdir(parents=True)
    assert next_version(tmp_path, "ppca") == "11"


def test_the_digest_names_the_content(tmp_path):
    first, _ = write_ppca_bundle(tmp_path / "a")
    same, _ = write_ppca_bundle(tmp_path / "b")
    other, _ = write_ppca_bundle(tmp_path / "c", change=lambda _, files: files.update({"README.md": b"other"}))
    assert open_bundle(first).digest == open_bundle(same).digest != open_bundle(other).digest


def test_a_manifest_survives_its_own_json(ppca_path):
    manifest = open_bundle(ppca_path).manifest
    assert parse_manifest(manifest.model_dump_json().encode()) == manifest
