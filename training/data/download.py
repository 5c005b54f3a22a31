"""Archives from public mirrors: resumed where they broke off, checked by size and SHA-256, put in place at once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock

from training.errors import DownloadError
from training.progress import Advance, Track, untracked

TIMEOUT = httpx.Timeout(30.0)  # seconds without a byte, not for the whole archive


@dataclass(frozen=True)
class Archive:
    """A file as its authors published it."""

    name: str
    bytes: int
    sha256: str


class _AttemptError(Exception):
    """One attempt at one mirror; the text says why."""


def fetch_all(archives: Sequence[Archive], mirrors: Sequence[str], folder: Path, track: Track = untracked) -> None:
    """Bring every archive into ``folder``, each from the first of ``mirrors`` (base addresses) that has it.

    An archive that is there already is left alone. Several processes may call this at once: one downloads, the others
    wait. Raises DownloadError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            for archive in archives:
                if not (folder / archive.name).exists():
                    with track(f"download {archive.name}", archive.bytes, "bytes") as advance:
                        _fetch(archive, mirrors, folder, advance)
    except OSError as error:
        raise DownloadError(
            f"cannot write to {folder} ({error.strerror}): give another data directory, or put {_names(archives)} there"
        ) from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(archive: Archive, mirrors: Sequence[str], folder: Path, advance: Advance) -> None:
    """Try each mirror in turn, going on with what a broken attempt left in NAME.part."""
    tried = []
    part = folder / f"{archive.name}.part"
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{archive.name}"
        try:
            _attempt(archive, url, part, advance)
        except _AttemptError as error:
            tried.append(f"  {url}: {error}")
        else:
            part.replace(folder / archive.name)
            return
    raise DownloadError(
        f"{archive.name} could not be downloaded. Tried:\n"
        + "\n".join(tried)
        + f"\nPut the file into {folder} by hand, "
        "or name a data directory that has it."
    )


def _attempt(archive: Archive, url: str, part: Path, advance: Advance) -> None:
    """Complete ``part`` from ``url`` and verify it; a continued file that proves wrong is fetched again from zero."""
    continued = _complete(archive, url, part, advance)
    found = sha256_file(part)
    if found == archive.sha256:
        return
    part.unlink()
    if not continued:
        raise _AttemptError(f"wrong checksum: sha256 {found}, expected {archive.sha256}")
    _attempt(archive, url, part, advance)


def _complete(archive: Archive, url: str, part: Path, advance: Advance) -> bool:
    """Bring ``part`` to full length; True if it began with bytes of an earlier attempt."""
    offset = part.stat().st_size if part.exists() else 0
    if offset >= archive.bytes:
        return True
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        with httpx.stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
            offset = _start(archive, response, offset)
            _write(archive, response, part, offset, advance)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _AttemptError(f"{type(error).__name__}: {error}") from error
    return offset > 0


def _start(archive: Archive, response: httpx.Response, offset: int) -> int:
    """The byte at which the answer begins: ``offset`` if the server went along with it, else 0."""
    if response.status_code == httpx.codes.PARTIAL_CONTENT:
        match = re.fullmatch(rf"bytes {offset}-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if offset and match and match[1] in ("*", str(archive.bytes)):
            return offset
        raise _AttemptError(f"answered with another range, {response.headers.get('Content-Range')!r}")
    if response.status_code != httpx.codes.OK:
        raise _AttemptError(f"HTTP status {response.status_code}")
    length = response.headers.get("Content-Length", str(archive.bytes))
    if length != str(archive.bytes):
        raise _AttemptError(f"offers {length} bytes, expected {archive.bytes}")
    return 0


def _write(archive: Archive, response: httpx.Response, part: Path, offset: int, advance: Advance) -> None:
    """Append the body to the first ``offset`` bytes of ``part``; what came before a break stays for a next attempt."""
    written = offset
    with part.open("r+b" if offset else "wb") as file:
        file.seek(offset)
        for chunk in response.iter_raw():  # no chunk size: that would hold back, and lose, the bytes before a break
            more = file.write(chunk[: archive.bytes - written])
            written += more
            advance(more)
            if written == archive.bytes:
                break  # more than expected is not read; the checksum judges
    if written < archive.bytes:
        raise _AttemptError(f"broke off after {written} of {archive.bytes} bytes")


def _names(archives: Sequence[Archive]) -> str:
    return ", ".join(archive.name for archive in archives)
