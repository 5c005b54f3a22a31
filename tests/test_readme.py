"""Every command of the README runs, in a copy of the repository, in the order in which it stands there.

The word after ``bash`` says how a block is run:

    (none)   to its end, exit code 0
    server   in the background, for all blocks after it
    example  its path/to/images is a folder of pictures made here, its trainings are cut to one epoch
    table    as example, with a path/to/table.csv made here; what is not a training runs as it stands
    long     cut to one epoch on a small data set of the same format
    docker   needs a container engine: make's part is expanded here, `make image-check` runs the whole elsewhere
"""

import gzip
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SHORT = " --set optimiser.epochs=1 --set evaluate.k=2 --set optimiser.batch_size=16"
OF_IMAGES = " --set corruption.epochs=1"
BLOCK = re.compile(r"^```bash ?(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    kind: str
    commands: list[str]


def blocks():
    text = (ROOT / "README.md").read_text()
    return [Block(kind, [line for line in body.splitlines() if line.strip()]) for kind, body in BLOCK.findall(text)]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """What a clone holds, with the developer's environment beside it."""
    folder = tmp_path_factory.mktemp("clone") / "vaeserve"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(os.environ.get("VIRTUAL_ENV") or ROOT / ".venv"))
    for stamp in (folder / ".venv").glob(".installed-*"):
        assert stamp.stat().st_mtime >= (folder / "pyproject.toml").stat().st_mtime, "the environment is out of date"
    pictures(folder / "path" / "to" / "images")
    table(folder / "path" / "to" / "table.csv")
    return folder


def table(path):
    mixing = np.array([[1, 0.5, 0, 0], [0, 1, 0, 2], [0, 0, 1, 0], [0, 0, 0, 1]])
    rows = np.random.RandomState(0).normal(20, 3, (300, 4)) @ mixing
    np.savetxt(path, rows, fmt="%.4f", delimiter=",", header="flow,pressure,heat,speed", comments="")


def pictures(folder):
    folder.mkdir(parents=True)
    random = np.random.RandomState(0)
    for index in range(60):
        pixels = random.randint(0, 256, (20 + index % 3, 24, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    """Small IDX archives under the official names."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.RandomState(0)
    for name in ("mnist", "fashion-mnist"):
        (root / name).mkdir()
        for part, count in (("train", 600), ("t10k", 100)):
            pixels = random.randint(0, 256, (count, 28, 28)).astype(np.uint8)
            labels = random.randint(0, 10, count).astype(np.uint8)
            images = struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes()
            (root / name / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
            (root / name / f"{part}-labels-idx1-ubyte.gz").write_bytes(
                gzip.compress(struct.pack(">II", 0x801, count) + labels.tobytes())
            )
    return root


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Shell:
    """Runs the README's lines in the copy, against a port that is free."""

    def __init__(self, folder, data):
        self.folder, self.port = folder, free_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("VAESERVE_")},
            "VAESERVE_PORT": str(self.port),
            "VAETRAIN_DATA_DIR": str(data),
            "COLUMNS": "120",
        }
        self.outputs = {}

    def run(self, command):
        line = command.replace("localhost:8000", f"localhost:{self.port}")
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        self.outputs[command] = done.stdout

    def start(self, command):
        return subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_until_ready(self, process):
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert process.poll() is None, process.stdout.read()[-3000:]
            try:
                with urllib.request.urlopen(f"http://localhost:{self.port}/readyz", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise AssertionError("the service was not ready within 240 s")


@pytest.mark.engines
@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's commands need curl, a Debian package")
@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs(copy, idx):
    shell = Shell(copy, idx)
    servers = []
    try:
        for block in blocks():
            for command in block.commands:
                if block.kind == "server":
                    servers.append(shell.start(command))
                    shell.wait_until_ready(servers[-1])
                elif block.kind in ("example", "long"):
                    shell.run(command + SHORT + OF_IMAGES + (" --fit-only" if block.kind == "long" else ""))
                elif block.kind == "table":
                    shell.run(command + (SHORT if "vaetrain fit" in command else ""))
                elif block.kind == "docker":
                    if command.startswith("make "):
                        shell.run(command.replace("make ", "make --dry-run ", 1))
                else:
                    assert block.kind == "", f"unknown kind of block: {block.kind}"
                    shell.run(command)
    finally:
        for server in servers:
            os.killpg(server.pid, signal.SIGTERM)
            server.communicate(timeout=60)
    assert_answers(shell, copy)


def assert_answers(shell, folder):
    """The commands did what the text says of them."""
    two_images = next(out for command, out in shell.outputs.items() if "score?" in command and "clothes" in command)
    assert [verdict == "true" for verdict in re.findall(r'"is_anomaly":(\w+)', two_images)] == [False, True]
    for name, form in [("digit.png", "PNG"), ("clothes.png", "PNG"), ("morph.gif", "GIF"), ("heat.png", "PNG")]:
        with Image.open(folder / name) as image:
            assert image.format == form
    assert np.load(folder / "two.npy").shape == (2, 1, 28, 28)
    assert (folder / "scores.csv").read_text().count("\n") == 3
    assert (folder / "exported" / "digits" / "1" / "manifest.json").is_file()
    assert (folder / "exported" / "widgets" / "1" / "manifest.json").is_file()
    assert (folder / "runs" / "widgets" / "report" / "report.html").is_file()
    assert (folder / "sensors.csv").read_text().count("\n") == 301
    assert (folder / "exported" / "sensors-ppca" / "1" / "manifest.json").is_file()
    assert "| ppca |" in (folder / "runs" / "compare" / "compare.md").read_text()


def test_docker_commands_are_those_of_the_image_check():
    """What no engine can run here names the image that `make image` builds and `make image-check` runs."""
    commands = [command for block in blocks() if block.kind == "docker" for command in block.commands]
    assert any(command.startswith("docker run --read-only") and "vaeserve:cpu" in command for command in commands)
    makefile = (ROOT / "Makefile").read_text()
    assert "IMAGE ?= vaeserve:$(RUNTIME)" in makefile
    assert {"make image", "make image-check"} <= set(commands)


def test_every_link_of_the_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), target
