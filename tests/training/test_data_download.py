"""Downloads from a real HTTP server: good, wrong, missing, truncated, oversized, interrupted and resumed."""

import contextlib
import gzip
import hashlib
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from training.config import DataConfig
from training.data.download import Archive, fetch_all, sha256_file
from training.data.named import FASHION_MNIST, MNIST, IdxSet, open_idx_set
from training.data.source import load_source
from training.errors import DataNotFound, DownloadError

from .test_data_named import idx_bytes

CONTENT = np.random.RandomState(0).bytes(200_000)


def archive_of(content: bytes, name: str = "train-images-idx3-ubyte.gz") -> Archive:
    return Archive(name, len(content), hashlib.sha256(content).hexdigest())


ARCHIVE = archive_of(CONTENT)


@dataclass
class Mirror:
    """A web server with a few manners, one a first path component; it remembers what it was asked."""

    files: dict[str, bytes]
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def asked(self, manner: str) -> list[str | None]:
        """The Range headers of the requests to ``manner``."""
        return [ranged for path, ranged in self.requests if path.startswith(f"/{manner}/")]


class Handler(BaseHTTPRequestHandler):
    mirror: Mirror

    def do_GET(self):
        manner, name = self.path.strip("/").split("/", 1)
        self.mirror.requests.append((self.path, self.headers.get("Range")))
        getattr(self, f"answer_{manner}")(self.mirror.files.get(name, b""))

    def answer_good(self, content: bytes):
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_body(content[start:])

    def answer_norange(self, content: bytes):
        self.send_response(200)
        self.send_body(content)

    def answer_missing(self, content: bytes):
        self.send_error(404)

    def answer_moved(self, content: bytes):
        self.send_response(302)
        self.send_header("Location", self.path.replace("/moved/", "/good/"))
        self.send_body(b"")

    def answer_wrong(self, content: bytes):
        self.send_response(200)
        self.send_body(b"\0" * len(content))

    def answer_page(self, content: bytes):
        self.send_response(200)
        self.send_body(b"<html>This data set has moved</html>")

    def answer_truncated(self, content: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])

    def answer_endless(self, content: bytes):
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while True:
                self.wfile.write(bytes(2**16))

    def answer_misplaced(self, content: bytes):
        self.send_response(206)
        self.send_header("Content-Range", f"bytes 0-{len(content) - 1}/{len(content)}")
        self.send_body(content)

    def answer_stalling(self, content: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:150_000])
        self.wfile.flush()
        self.mirror.stalled.set()
        self.mirror.release.wait()

    def send_body(self, body: bytes):
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    mirror = Mirror({ARCHIVE.name: CONTENT})
    handler = type("BoundHandler", (Handler,), {"mirror": mirror})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        mirror.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield mirror
        mirror.release.set()
        server.shutdown()
        thread.join()


def fetch(mirror: Mirror, folder: Path, *manners: str) -> None:
    fetch_all([ARCHIVE], [f"{mirror.address}/{manner}" for manner in manners], folder)
    assert (folder / ARCHIVE.name).read_bytes() == CONTENT
    assert not (folder / f"{ARCHIVE.name}.part").exists()


@pytest.mark.parametrize(
    "manners",
    [
        ["good"],
        ["norange"],
        ["moved"],
        ["missing", "good"],
        ["wrong", "good"],
        ["page", "good"],
        ["truncated", "good"],
        ["truncated", "norange"],
        ["truncated", "misplaced", "good"],
        ["endless", "good"],
        ["wrong", "truncated", "missing", "page", "good"],
    ],
    ids="-".join,
)
def test_the_first_mirror_that_has_it_serves(mirror, tmp_path, manners):
    fetch(mirror, tmp_path / "deep" / "folder", *manners)
    asked = dict.fromkeys(path.split("/")[1] for path, _ in mirror.requests)
    assert list(asked)[: len(manners)] == manners


def test_a_good_archive_is_not_asked_for_again(mirror, tmp_path):
    fetch(mirror, tmp_path, "good", "norange")
    fetch(mirror, tmp_path, "good", "norange")
    assert mirror.requests == [(f"/good/{ARCHIVE.name}", None)]


@pytest.mark.parametrize(
    ("manner", "says"),
    [
        ("missing", "HTTP status 404"),
        ("wrong", f"wrong checksum: sha256 [0-9a-f]+, expected {ARCHIVE.sha256}"),
        ("page", "offers 36 bytes, expected 200000"),
        ("truncated", "RemoteProtocolError"),
        ("endless", "wrong checksum"),
    ],
)
def test_what_was_tried_is_listed(mirror, tmp_path, manner, says):
    with pytest.raises(DownloadError) as caught:
        fetch_all([ARCHIVE], [f"{mirror.address}/{manner}", "http://127.0.0.1:9/nobody"], tmp_path)
    assert re.search(f"{mirror.address}/{manner}/{ARCHIVE.name}: {says}", str(caught.value))
    assert re.search(rf"http://127\.0\.0\.1:9/nobody/{ARCHIVE.name}: ConnectError", str(caught.value))
    assert not (tmp_path / ARCHIVE.name).exists()


def test_a_broken_download_is_continued(mirror, tmp_path):
    with pytest.raises(DownloadError):
        fetch_all([ARCHIVE], [f"{mirror.address}/truncated"], tmp_path)
    fetch(mirror, tmp_path, "good")
    assert mirror.asked("good") == ["bytes=100000-"]


def test_a_continued_archive_that_proves_wrong_is_fetched_anew(mirror, tmp_path):
    (tmp_path / f"{ARCHIVE.name}.part").write_bytes(b"of another edition")
    fetch(mirror, tmp_path, "good")
    assert mirror.asked("good") == ["bytes=18-", None]


def test_a_whole_part_is_only_verified(mirror, tmp_path):
    (tmp_path / f"{ARCHIVE.name}.part").write_bytes(CONTENT)
    fetch(mirror, tmp_path, "good")
    assert mirror.requests == []


def test_a_killed_download_leaves_nothing_under_the_name_and_is_continued(mirror, tmp_path):
    program = (
        "import sys; from pathlib import Path; from training.data.download import Archive, fetch_all\n"
        "name, size, digest, mirror, folder = sys.argv[1:]\n"
        "fetch_all([Archive(name, int(size), digest)], [mirror], Path(folder))"
    )
    arguments = [ARCHIVE.name, str(ARCHIVE.bytes), ARCHIVE.sha256, f"{mirror.address}/stalling", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments])
    assert mirror.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / ARCHIVE.name).exists()
    fetch(mirror, tmp_path, "good")


def test_two_processes_download_once(mirror, tmp_path):
    threads = [threading.Thread(target=fetch, args=(mirror, tmp_path, "good")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mirror.requests) == 1


def test_a_folder_that_cannot_be_written_is_named(mirror, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match=r"cannot write to .*file/mnist .*another data directory"):
        fetch_all([ARCHIVE], [mirror.address], tmp_path / "file" / "mnist")


def small_set(mirror: Mirror) -> IdxSet:
    """A data set in MNIST's format on the mirror: 60 train and 12 test images of 5×4 pixels."""
    random = np.random.RandomState(1)
    contents = [random.randint(0, 256, size=(60, 5, 4)), np.arange(60) % 3]
    contents += [random.randint(0, 256, size=(12, 5, 4)), np.arange(12) % 3]
    packed = [gzip.compress(idx_bytes(array), mtime=0) for array in contents]
    names = [archive.name for archive in MNIST.archives]
    mirror.files = dict(zip(names, packed, strict=True))
    archives = [archive_of(content, name) for name, content in mirror.files.items()]
    return IdxSet("small", [f"{mirror.address}/missing", f"{mirror.address}/good"], archives, ["a", "b", "c"])


def test_a_data_set_is_downloaded_once_and_loaded(mirror, tmp_path):
    idx_set = small_set(mirror)
    config = DataConfig(source="mnist", directory=tmp_path)
    dataset = load_source(open_idx_set(idx_set, config), config)
    assert dataset.preprocessing.shape == (1, 5, 4)
    assert {name: len(indices) for name, indices in dataset.splits.items()} == {
        "train": 54,
        "validation": 3,
        "calibration": 3,
        "test": 12,
    }
    asked = len(mirror.requests)
    again = load_source(open_idx_set(idx_set, config), config)
    assert (again.fingerprint, len(mirror.requests)) == (dataset.fingerprint, asked)
    assert dataset.describe()["files"][MNIST.archives[0].name] == idx_set.archives[0].sha256


def test_an_official_part_is_completed(mirror, tmp_path):
    idx_set = small_set(mirror)
    (tmp_path / "small").mkdir()
    first = idx_set.archives[0].name
    (tmp_path / "small" / first).write_bytes(mirror.files[first])
    open_idx_set(idx_set, DataConfig(directory=tmp_path))
    assert f"/good/{first}" not in [path for path, _ in mirror.requests]


def test_another_edition_is_never_mixed_with_downloads(mirror, tmp_path):
    idx_set = small_set(mirror)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / idx_set.archives[0].name).write_bytes(gzip.compress(idx_bytes(np.zeros((60, 5, 4)))))
    with pytest.raises(DataNotFound, match=r"train-images-idx3-ubyte\.gz there is not the official one"):
        open_idx_set(idx_set, DataConfig(directory=tmp_path))
    assert mirror.requests == []


@pytest.mark.parametrize("idx_set", [MNIST, FASHION_MNIST], ids=lambda idx_set: idx_set.name)
def test_the_tables_of_archives_are_well_formed(idx_set):
    assert [archive.name for archive in idx_set.archives] == [
        f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", archive.sha256) for archive in idx_set.archives)
    assert len({archive.sha256 for archive in idx_set.archives}) == 4
    assert all(re.fullmatch(r"https?://[^ ]+[^/]", mirror) for mirror in idx_set.mirrors)


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
