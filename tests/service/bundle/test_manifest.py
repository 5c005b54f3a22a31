from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest

from service.bundle.files import open_bundle
from service.bundle.manifest import MANIFEST, parse_manifest, schema_text
from service.errors import BundleFormatError
from tests.service import linear_bundles as linear

SCHEMA = Path(__file__).parents[3] / "exported" / "manifest.schema.json"


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


@pytest.mark.parametrize("version", [0, 1, 2, 6, "5", 5.0, True, None])
def test_a_format_that_is_not_supported_is_refused_with_an_instruction(copy, version):
    rewrite(copy, lambda document: document.update(format_version=version))
    words = f"format_version is {version!r}, this vaeserve reads 5 and converts 3 and 4, no other: export the bundle"
    with pytest.raises(BundleFormatError, match=re.escape(words)):
        open_bundle(copy)


@pytest.mark.parametrize("version", [3, 4])
def test_a_format_that_can_be_converted_is_refused_with_the_command(copy, version):
    rewrite(copy, lambda document: document.update(format_version=version))
    words = f"format_version is {version}, this vaeserve reads 5: rewrite the bundle by `vaeserve convert BUNDLE`"
    with pytest.raises(BundleFormatError, match=re.escape(words)):
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
        (lambda d: d["graphs"].pop("joint"), "graphs lacks"),
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
        (linear.write_table, {"posterior": {"moments": "point"}}, "noise_dim is 2 with posterior.moments 'point'"),
        (linear.write_whitening, {"posterior": {"moments": "exact"}}, "noise_dim is 0 with posterior.moments 'exact'"),
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


@pytest.mark.parametrize("name", ["table", "mixture", "pca", "whitening"])
def test_every_kind_satisfies_the_committed_schema_and_survives_its_own_json(tmp_path, name):
    path = getattr(linear, f"write_{name}")(tmp_path)
    jsonschema.validate(json.loads((path / MANIFEST).read_text()), json.loads(SCHEMA.read_text()))
    manifest = open_bundle(path).manifest
    assert parse_manifest(manifest.model_dump_json().encode()) == manifest


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


def test_a_manifest_survives_its_own_json(ppca_path):
    manifest = open_bundle(ppca_path).manifest
    assert parse_manifest(manifest.model_dump_json().encode()) == manifest
