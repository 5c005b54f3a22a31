"""A bundle's files: open them with their hashes checked, write a version whole or not at all, find bundles."""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from service.bundle.manifest import FORMAT_VERSION, MANIFEST, SEAL, FileRecord, Graph, Manifest, parse_manifest
from service.errors import BundleError, BundleFormatError, BundleIntegrityError, BundleNotFound
from service.literals import PARSING

MAX_MANIFEST_BYTES = 8 * 2**20
MAX_ARRAYS_BYTES = 2**30  # of one .npz, unpacked: a bound on what a hostile archive can make us allocate
NPZ_ERRORS = (
    *(ValueError, OSError, EOFError, SyntaxError, OverflowError, MemoryError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
"""What NumPy and zipfile raise for damaged archives (RuntimeError: encrypted members, unknown compression)."""


Digests = dict[str, str]
"""Digests of bundles by "NAME/VERSION"."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files have the sizes and hashes that its manifest lists. Made by ``open_bundle``.

    ``digest`` is the sha256 of manifest.json in hex: it names the content of the whole bundle, since the manifest
    holds every other file's hash.
    """

    path: Path
    manifest: Manifest
    digest: str

    def read(self, filename: str) -> bytes:
        """Read one listed file and check its hash again. Raises BundleIntegrityError."""
        if filename not in self.manifest.files:
            raise BundleIntegrityError(f"{filename} is not in the manifest's files {sorted(self.manifest.files)}")
        return _read_checked(self.path, filename, self.manifest.files[filename])

    def graph(self, role: Graph) -> bytes:
        """Read the serialised ONNX model of one graph. Raises BundleIntegrityError."""
        return self.read(self.manifest.graphs[role])

    def arrays(self, filename: str) -> dict[str, np.ndarray]:
        """Read the arrays of one .npz file by name.

        Raises BundleIntegrityError for a changed file, BundleFormatError as ``npz_arrays``.
        """
        return npz_arrays(filename, self.read(filename))


def npz_arrays(filename: str, data: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of the .npz file ``data`` by name; nothing is unpickled.

    Raises BundleFormatError, which names ``filename``, for one that is no .npz of plain arrays or unpacks to more than
    MAX_ARRAYS_BYTES.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > MAX_ARRAYS_BYTES:
            raise BundleFormatError(f"{filename} unpacks to {size} bytes, more than {MAX_ARRAYS_BYTES}")
        with PARSING, np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except NPZ_ERRORS as error:
        raise BundleFormatError(f"{filename} is not a readable .npz of plain arrays: {error}") from error


def find_bundles(root: Path) -> list[Path]:
    """List the folders NAME/VERSION below ``root`` that hold a manifest, in no particular order."""
    return [manifest.parent for manifest in root.glob("*/*/manifest.json")]


def bundle_digests(root: Path) -> Digests:
    """Compute the digest of every bundle below ``root``, without verifying any file."""
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        for path in find_bundles(root)
    }


def check_digests(root: Path, digests: Digests) -> None:
    """Raise BundleIntegrityError if a bundle below ``root`` has another digest than in ``digests``, or is gone."""
    present = bundle_digests(root)
    for bundle, digest in digests.items():
        if present.get(bundle) != digest:
            raise BundleIntegrityError(f"{bundle} has changed since the service was started: start it anew")


def open_bundle(path: Path | str) -> Bundle:
    """Open the bundle in that folder, after checking its manifest, the seal of it, and every file's size and sha256.

    Raises BundleNotFound (no folder, or no manifest.json in it), BundleFormatError (manifest unreadable, of another
    format_version, or against the schema) and BundleIntegrityError (a file missing, extra, a link, or changed).
    """
    folder = Path(path)
    data = read_manifest(folder)
    manifest = parse_manifest(data)
    _check_seal(folder, data)
    for _ in read_files(folder, manifest.files):
        pass  # each was checked as it was read
    return Bundle(folder, manifest, hashlib.sha256(data).hexdigest())


def read_manifest(folder: Path) -> bytes:
    """Read the bytes of the bundle's manifest.json, of any format. Raises BundleNotFound, BundleIntegrityError."""
    if not folder.is_dir():
        raise BundleNotFound(f"{folder} is not a folder; a bundle is a folder NAME/VERSION with a {MANIFEST}")
    if not (folder / MANIFEST).exists():
        raise BundleNotFound(f"{folder} holds no {MANIFEST}")
    return _read_regular(folder, MANIFEST, MAX_MANIFEST_BYTES)


def read_files(folder: Path, records: Mapping[str, FileRecord]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of every file that ``records`` lists, each of the listed size and hash.

    Raises BundleIntegrityError (a file missing, extra, a link, or changed).
    """
    if extra := sorted(set(_walk(folder)) - set(records) - {MANIFEST, SEAL}):
        raise BundleIntegrityError(f"files that the manifest does not list: {extra[:10]}; remove them")
    for name, record in records.items():
        yield name, _read_checked(folder, name, record)


def write_bundle(
    root: Path | str,
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes],
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Write root/NAME/VERSION whole or not at all, and return it.

    ``manifest``: manifest.json's content without ``files``, which is computed here from ``files`` (name -> bytes).
    Everything goes to a hidden folder beside the target first; ``verify`` gets that folder and raises to refuse it;
    the folder is renamed only then. Raises BundleError when the version exists, BundleFormatError when the manifest
    violates the schema, and whatever ``verify`` raises.
    """
    records = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    content = parse_manifest(_to_json({"format_version": FORMAT_VERSION, **manifest, "files": records}))
    target = Path(root) / content.name / content.version
    _refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{content.version}.", dir=target.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would hide the bundle from the server's user
        for name, data in files.items():
            _write_synced(folder / name, data)
        data = _to_json(content.model_dump(mode="json"))
        _write_synced(folder / MANIFEST, data)
        _write_synced(folder / SEAL, seal(data))
        open_bundle(folder)
        if verify is not None:
            verify(folder)
        _refuse_existing(target)
        _rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return target


def seal(manifest: bytes) -> bytes:
    """Return manifest.sha256 for a manifest.json of these bytes, as ``sha256sum`` writes and checks it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def next_version(root: Path | str, name: str) -> str:
    """Return the smallest version above every existing one of root/name: "1" where there is none."""
    folder = Path(root) / name
    versions = [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()] if folder.is_dir() else []
    return str(max(versions, default=0) + 1)


def _check_seal(folder: Path, manifest: bytes) -> None:
    """Raise BundleIntegrityError if manifest.sha256 is missing, or is not that of the manifest's bytes.

    The manifest guards every other file, and this guards the manifest: a changed tolerance or quantile is valid JSON.
    """
    if not (folder / SEAL).exists():
        raise BundleIntegrityError(
            f"{SEAL} is missing, so that nothing tells whether {MANIFEST} was changed; where you trust it, make it by "
            f"`sha256sum {MANIFEST} > {SEAL}` in that folder"
        )
    expected = seal(manifest)
    if _read_regular(folder, SEAL, len(expected)) != expected:
        raise BundleIntegrityError(f"{MANIFEST} has not the sha256 that {SEAL} says: one of the two was changed")


def _walk(folder: Path) -> Iterator[str]:
    """Yield the relative names of all files below ``folder``.

    Raises BundleIntegrityError for a link or a special file.
    """
    for parent, folders, names in os.walk(folder, followlinks=False):
        for name in [*folders, *names]:
            entry = Path(parent, name)
            mode = entry.lstat().st_mode
            relative = entry.relative_to(folder).as_posix()
            if stat.S_ISREG(mode):
                yield relative
            elif not stat.S_ISDIR(mode):
                raise BundleIntegrityError(f"{relative} is a link or a special file; a bundle holds plain files only")


def _read_checked(folder: Path, name: str, record: FileRecord) -> bytes:
    """Read a file that must have the record's size and hash. Raises BundleIntegrityError."""
    data = _read_regular(folder, name, record.bytes)
    if len(data) != record.bytes:
        raise BundleIntegrityError(f"{name} has {len(data)} bytes, the manifest says {record.bytes}")
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.sha256:
        raise BundleIntegrityError(f"{name} has sha256 {digest}, the manifest says {record.sha256}")
    return data


def _read_regular(folder: Path, name: str, limit: int) -> bytes:
    """Read a plain file of at most ``limit`` bytes.

    Raises BundleIntegrityError for a link at or above the file inside the folder, and for a larger file.
    """
    path = folder / name
    if any((folder / parent).is_symlink() for parent in [name, *map(str, Path(name).parents)] if parent != "."):
        raise BundleIntegrityError(f"{name} is a link or lies behind one; a bundle holds plain files only")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise BundleIntegrityError(f"{name} has {size} bytes, at most {limit} are expected")
            return file.read(limit + 1)
    except OSError as error:
        raise BundleIntegrityError(f"{name} cannot be read: {error.strerror}") from error


def _write_synced(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on the disk; its folder is made if it is missing."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _rename(folder: Path, target: Path) -> None:
    """Rename the folder. Raises BundleError where the target exists by now."""
    try:
        folder.rename(target)
    except OSError:
        _refuse_existing(target)  # which another process wrote just now
        raise


def _refuse_existing(target: Path) -> None:
    """Raise BundleError where the target exists, if only as a dangling link."""
    if os.path.lexists(target):
        raise BundleError(f"{target} exists; versions are never overwritten, take the next one")


def _to_json(document: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise BundleFormatError(f"the manifest cannot be written as JSON: {error}") from error
