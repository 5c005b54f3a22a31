"""A bundle's files: opened with every hash checked, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.bundle import files as bundle_files
from service.bundle.files import next_version, npz_arrays, open_bundle
from service.bundle.manifest import MANIFEST, SEAL
from service.errors import BundleError, BundleFormatError, BundleIntegrityError, BundleNotFound
from tests.ppca_bundle import write_ppca_bundle


def test_open_gives_manifest_digest_graphs_and_arrays(ppca_path):
    bundle = open_bundle(ppca_path)
    assert (bundle.manifest.name, bundle.manifest.version) == ("ppca", "1")
    assert bundle.digest == hashlib.sha256((ppca_path / MANIFEST).read_bytes()).hexdigest()
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
    """In the manifest too, and in the file that seals it."""
    names = sorted(entry.name for entry in ppca_path.iterdir())
    name = data.draw(st.sampled_from(names))
    content = bytearray((ppca_path / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    copy = tmp_path / "flipped"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ppca_path, copy)
    (copy / name).write_bytes(content)
    with pytest.raises((BundleFormatError, BundleIntegrityError) if name == MANIFEST else BundleIntegrityError):
        open_bundle(copy)


def test_a_changed_number_of_the_manifest_is_refused(copy):
    """It is valid, and would be believed: a tolerance, a quantile, a rate."""
    text = (copy / MANIFEST).read_text()
    for old, new in (('"shape"', '"shape" '), ("1e-", "2e-"), ("0.0", "0.9")):
        assert old in text
        (copy / MANIFEST).write_text(text.replace(old, new, 1))
        with pytest.raises(BundleIntegrityError, match=r"manifest\.json has not the sha256 that manifest\.sha256 says"):
            open_bundle(copy)


def test_the_seal_is_what_sha256sum_writes(copy):
    expected = hashlib.sha256((copy / MANIFEST).read_bytes()).hexdigest() + "  manifest.json\n"
    assert (copy / SEAL).read_text() == expected
    for other in ("", expected[:-1], expected + "\n", expected.upper(), expected.replace("  ", " ")):
        (copy / SEAL).write_text(other)
        with pytest.raises(BundleIntegrityError, match=r"manifest\.sha256"):
            open_bundle(copy)
    (copy / SEAL).unlink()
    with pytest.raises(BundleIntegrityError, match=r"`sha256sum manifest\.json > manifest\.sha256`"):
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
    (copy / "joint.onnx").unlink()
    with pytest.raises(BundleIntegrityError, match=r"joint\.onnx cannot be read"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["encoder.onnx", MANIFEST, SEAL])
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
    method = zipfile.ZIP_LZMA if kind == "lzma" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(buffer, "w", method) as archive:
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
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("x.npy", _npy_bomb())
        elif kind == "wrapped":
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("x.npy", b"\x93NUMPY\x01\x00\x02\x00{}")
        files["reference.npz"] = buffer.getvalue() or b"no archive"

    path, _ = write_ppca_bundle(tmp_path, change=change)
    with pytest.raises(BundleFormatError, match=r"reference\.npz is not a readable \.npz"):
        open_bundle(path).arrays("reference.npz")


def test_a_zip_bomb_is_refused_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_files, "MAX_ARRAYS_BYTES", 2**16)

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


def test_a_bundle_that_has_changed_or_is_gone_is_named(tmp_path):
    path, _ = write_ppca_bundle(tmp_path)
    digests = bundle_files.bundle_digests(tmp_path)
    assert digests == {"ppca/1": open_bundle(path).digest}
    write_ppca_bundle(tmp_path, version="2")  # one more is no change
    bundle_files.check_digests(tmp_path, digests)
    (path / MANIFEST).write_bytes((path / MANIFEST).read_bytes() + b"\n")
    with pytest.raises(BundleIntegrityError, match=r"^ppca/1 has changed since the service was started"):
        bundle_files.check_digests(tmp_path, digests)
    shutil.rmtree(path)
    with pytest.raises(BundleIntegrityError, match=r"^ppca/1 has changed"):
        bundle_files.check_digests(tmp_path, digests)


def test_the_arrays_of_one_bundle_at_a_time_are_read(ppca_path, monkeypatch):
    """Bundles are loaded side by side; CPython 3.11 counts the depth of all threads' syntax trees together."""
    data, inside, most, load = (ppca_path / "reference.npz").read_bytes(), [], [], np.load

    def noted(*given, **options):
        inside.append(1)
        most.append(len(inside))
        archive = load(*given, **options)
        inside.pop()
        return archive

    monkeypatch.setattr(bundle_files.np, "load", noted)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            arrays = list(pool.map(lambda _: npz_arrays("reference.npz", data), range(400)))
    finally:
        sys.setswitchinterval(interval)
    assert set(most) == {1}
    assert all(found.keys() == arrays[0].keys() for found in arrays)
