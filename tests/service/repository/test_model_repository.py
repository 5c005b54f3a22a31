"""ModelRepository: what it finds, what it refuses, and that a name never becomes another model or a path."""

from __future__ import annotations

import shutil

import pytest
from structlog.testing import CapturingLogger

from service.errors import BundleFormatError, BundleIntegrityError, BundleNotFound, ConfigurationError, ModelNotFound
from service.repository.model_repository import ModelRepository, load_one
from service.settings import Settings
from tests.ppca_bundle import images, write_ppca_bundle


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """a/1, a/2, a/10 and b/1."""
    root = tmp_path_factory.mktemp("source")
    for name, version in (("a", "1"), ("a", "2"), ("a", "10"), ("b", "1")):
        write_ppca_bundle(root, name, version, latent_dim=2 + int(version) % 3)
    return root


def load(root, runtime, **options):
    repository = ModelRepository(root, runtime, **options)
    repository.load()
    return repository


def test_the_latest_version_is_the_largest_number(source, runtime):
    repository = load(source, runtime)
    assert repository.ready
    assert repository.get("a").manifest.version == "10"
    assert repository.get("a", "2").manifest.version == "2"
    assert repository.versions("a") == ["1", "2", "10"]
    assert [served.manifest.name for served in repository.latest()] == ["a", "b"]
    assert len(repository.get("b").model.score(images(2)).score) == 2


@pytest.mark.parametrize("name", ["c", "", "A", "../a", "a/1", "a\0", "/etc", "%2e%2e", "a" * 10_000])
def test_an_unknown_name_is_not_found(source, runtime, name):
    repository = load(source, runtime)
    with pytest.raises(ModelNotFound) as refused:
        repository.get(name)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("version", ["3", "01", "1.0", "latest", "-1", "١"])
def test_an_unknown_version_is_not_found(source, runtime, version):
    with pytest.raises(ModelNotFound):
        load(source, runtime).get("a", version)


def test_the_default_model(source, runtime, tmp_path):
    with pytest.raises(ModelNotFound, match="set default_model"):
        load(source, runtime).get()
    assert load(source, runtime, default_model="b").get().manifest.name == "b"
    shutil.copytree(source / "b", tmp_path / "b")
    assert load(tmp_path, runtime).get().manifest.name == "b"
    with pytest.raises(ConfigurationError, match="'nobody' is not served"):
        load(source, runtime, default_model="nobody")


def test_nothing_there_is_an_error(runtime, tmp_path):
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BundleNotFound):
            load(root, runtime)


def test_a_broken_bundle_stops_the_start_unless_it_may_be_skipped(source, runtime, tmp_path):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    graph = tmp_path / "a/10/encoder.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    with pytest.raises(BundleIntegrityError, match=r"a/10.*encoder\.onnx"):
        load(tmp_path, runtime)
    repository = load(tmp_path, runtime, skip_broken=True)
    assert repository.get("a").manifest.version == "2"
    assert list(repository.skipped) == [str(tmp_path / "a/10")]


def test_a_bundle_under_another_name_is_refused(source, runtime, tmp_path):
    shutil.copytree(source / "a/1", tmp_path / "b/1")
    with pytest.raises(BundleFormatError, match="expected it under a/1"):
        load(tmp_path, runtime)


def test_only_broken_bundles_means_not_ready(source, runtime, tmp_path):
    shutil.copytree(source / "b", tmp_path / "b")
    (tmp_path / "b/1/extra").write_text("x")
    repository = load(tmp_path, runtime, skip_broken=True)
    assert not repository.ready


def test_the_log_says_how_far_the_loading_is(source, runtime, monkeypatch):
    log = CapturingLogger()  # whatever another test has configured
    monkeypatch.setattr("service.repository.model_repository.get_logger", lambda: log)
    count = len(list(load(source, runtime)))
    loaded = [call.kwargs["progress"] for call in log.calls if call.args == ("model loaded",)]
    assert loaded == [f"{number} of {count}" for number in range(1, count + 1)]


def test_one_model_is_loaded_without_reading_another(source, tmp_path):
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    for path in ("a/1", "a/2", "b/1"):
        (tmp_path / path / "manifest.json").write_text("damaged")
    assert load_one(Settings(repository=tmp_path), "a").manifest.version == "10"
    assert load_one(Settings(repository=tmp_path, default_model="a")).manifest.name == "a"
    with pytest.raises(BundleFormatError):
        load_one(Settings(repository=tmp_path, skip_broken=True), "b")


def test_one_model_that_is_not_there_or_not_said(source, tmp_path):
    for name, default in (("c", ""), ("", ""), ("../a", "a"), (None, "c")):
        with pytest.raises(ModelNotFound, match="a, b"):
            load_one(Settings(repository=source, default_model=default), name)
    with pytest.raises(ModelNotFound, match="several models are there: a, b"):
        load_one(Settings(repository=source))
    with pytest.raises(BundleNotFound):
        load_one(Settings(repository=tmp_path), "a")
    shutil.copytree(source / "b", tmp_path / "b")
    assert load_one(Settings(repository=tmp_path)).manifest.name == "b"
