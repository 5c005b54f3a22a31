"""What detectors.npz may hold: arrays of the manifest's scores, and nothing that is not plain and finite."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from service.bundle.files import open_bundle
from service.bundle.manifest import DETECTORS, FITTED
from service.errors import BundleFormatError
from service.inference.model import Model
from service.scores.detectors import CLASSES, detector_arrays, load_detectors, to_arrays
from service.scores.maps.anomaly_map import load_map, map_arrays
from tests.service.fitted_bundles import FAMILIES, fit, npz, rewrite


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> dict[str, np.ndarray]:
    """The arrays of a bundle of pictures, and its path under "path"."""
    root, family = tmp_path_factory.mktemp("fitted"), FAMILIES["pictures"]
    path = fit(family.write(root / "plain"), root, family.inliers(40, 1), family.inliers(30, 2))
    return {"path": path, **open_bundle(path).arrays(DETECTORS)}


def load(fitted: dict[str, np.ndarray], tmp_path, data: bytes) -> None:
    bundle = open_bundle(rewrite(open_bundle(fitted["path"]), tmp_path, {}, {DETECTORS: data}))
    load_detectors(bundle.manifest, detector_arrays(bundle))


def arrays_of(fitted: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in fitted.items() if name != "path"}


def test_what_was_fitted_loads(fitted, tmp_path):
    load(fitted, tmp_path, npz(arrays_of(fitted)))
    assert {name.split("/")[1] for name in arrays_of(fitted) if name.startswith("path/")} == {
        "quantiles",
        "loc",
        "scale",
        "whitening",
        "skewness",
    }


def test_what_was_read_is_written_again_key_by_key(fitted):
    bundle = open_bundle(fitted["path"])
    arrays = detector_arrays(bundle)
    detectors, anomaly_map = load_detectors(bundle.manifest, arrays), load_map(bundle.manifest, arrays)
    written = to_arrays(detectors) | map_arrays(anomaly_map.parameters)
    assert sorted(written) == sorted(arrays)
    for key, array in arrays.items():
        assert written[key].dtype == array.dtype, key
        np.testing.assert_array_equal(written[key], array, key)


@pytest.mark.parametrize("score", ["typicality", "complexity", "debiased", "path", "latent", "residual", "combined"])
def test_a_missing_array_is_refused(fitted, tmp_path, score):
    gone = {name: array for name, array in arrays_of(fitted).items() if not name.startswith(f"{score}/")}
    with pytest.raises(BundleFormatError, match=r"detectors\.npz: a .* has \[\], expected"):
        load(fitted, tmp_path, npz(gone))


@pytest.mark.parametrize("key", ["elbo/mean", "other/mean", "mean", "", "path/loc/x", "path/more"])
def test_an_array_too_many_is_refused(fitted, tmp_path, key):
    with pytest.raises(BundleFormatError, match=r"detectors\.npz"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key or "x": np.zeros(1)}))


KEYS = [
    "typicality/mean",
    "complexity/line",
    "debiased/best",
    "path/quantiles",
    "path/skewness",
    "path-copod/whitening",
    "latent/reference",
    "residual/mean",
    "residual/scale",
    "statistics/loc",
    "statistics/whitening",
    "combined/knots",
    "combined/surprisals",
    "combined/scale",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[None],
        lambda a: np.float64(1) if a.ndim else np.ones(2),
        lambda a: np.concatenate([a, a], axis=-1) if a.ndim else np.ones((1, 1)),
        lambda a: a[..., :0] if a.ndim else np.ones(0),
        lambda a: a.astype(np.int64),
        lambda a: a.astype(complex),
        lambda a: a.astype(">f8"),
        lambda a: a.astype("U"),
        lambda a: np.full_like(a, np.nan),
        lambda a: np.full_like(a, np.inf),
    ],
    ids=["axis", "scalar", "longer", "empty", "whole", "complex", "big-endian", "text", "nan", "inf"],
)
def test_a_foreign_array_is_refused(fitted, tmp_path, key, change):
    with pytest.raises(BundleFormatError, match=r"detectors\.npz"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key: change(arrays_of(fitted)[key])}))


@pytest.mark.parametrize("key", ["path/scale", "residual/scale", "statistics/scale", "combined/scale"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(fitted, tmp_path, key, value):
    array = arrays_of(fitted)[key].copy()
    array.flat[0] = value
    with pytest.raises(BundleFormatError, match="not positive"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key: array}))


@pytest.mark.parametrize(
    ("key", "words"),
    [("path/quantiles", "does not rise"), ("combined/knots", "falls"), ("combined/surprisals", "falls")],
)
def test_numbers_out_of_order_are_refused(fitted, tmp_path, key, words):
    with pytest.raises(BundleFormatError, match=f"detectors.npz: .* {words} along its last axis"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key: arrays_of(fitted)[key][:, ::-1]}))


@pytest.mark.parametrize(
    ("key", "shape"),
    [("latent/reference", (31, 5)), ("path/quantiles", (15, 258)), ("combined/knots", (3, 257))],
)
def test_more_than_is_of_use_is_refused(fitted, tmp_path, monkeypatch, key, shape):
    monkeypatch.setattr("service.scores.detectors.latent.MAX_REFERENCE_NUMBERS", 30 * 5)
    huge = np.broadcast_to(np.linspace(0, 1, shape[1], dtype=np.float32), shape)
    with pytest.raises(BundleFormatError, match=r"has shape .* expected"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {key: huge}))


def test_knots_and_surprisals_of_other_lengths_are_refused(fitted, tmp_path):
    with pytest.raises(BundleFormatError, match="other surprisals than knots"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {"combined/knots": arrays_of(fitted)["combined/knots"][:, 1:]}))


def test_knots_too_far_apart_are_refused(fitted, tmp_path):
    knots = arrays_of(fitted)["combined/knots"].copy()
    knots[:, 0], knots[:, -1] = -1e308, 1e308
    with pytest.raises(BundleFormatError, match="further apart than float64 can tell"):
        load(fitted, tmp_path, npz(arrays_of(fitted) | {"combined/knots": knots}))


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{"typicality/mean": np.array([print, 1], object)})
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def claiming(shape: str) -> bytes:
    """An .npy whose header says more than it holds."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive",
        pickled(),
        zipped({"typicality/mean.npy": b"no array"}),
        zipped({"typicality/mean": b"text"}),
        zipped({"typicality/mean.npy": claiming("(1000000000000,)")}),
        zipped({"typicality/mean.npy": claiming("(-1,)")}),
        zipped({"typicality/mean.npy": claiming("()")}),
    ],
    ids=["empty", "text", "pickle", "member", "no-npy", "claims", "negative", "truncated"],
)
def test_a_hostile_archive_is_refused(fitted, tmp_path, data):
    with pytest.raises(BundleFormatError, match=r"detectors\.npz"):
        load(fitted, tmp_path, data)


def test_a_model_does_not_load_with_foreign_arrays(fitted, tmp_path, runtime):
    data = npz(arrays_of(fitted) | {"typicality/mean": np.array(np.nan)})
    path = rewrite(open_bundle(fitted["path"]), tmp_path, {}, {DETECTORS: data})
    with pytest.raises(BundleFormatError, match="mean of a typicality"):
        Model.load(open_bundle(path), runtime)


def test_every_fitted_estimator_has_its_class():
    assert set(CLASSES) | {"combination", "peak"} == FITTED, "a peak is the map's"
