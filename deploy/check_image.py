"""Check a built image by running it as its users would: read-only root, no capabilities, its own numeric user.

    python deploy/check_image.py vaeserve:cpu                      # docker; --engine podman works alike
    python deploy/check_image.py vaeserve:cpu --engine buildah     # as root, where no container engine runs

It looks for what must not be in the image (torch, compilers, pip's cache, files of its user), starts the service, waits
for the HEALTHCHECK, scores a picture, or a row of numbers, with every model over HTTP, and stops it with SIGTERM. The
buildah engine has no container to run: it enters the image's file system, remounted read-only, in a mount namespace of
its own and shares the host's network. Standard library only; exit code 1 if any check fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

LIMIT_MB = 450
START_SECONDS = 120
STOP_SECONDS = 30
Body = tuple[bytes, str]
"""What is posted, and its Content-Type."""
NO_HEALTHCHECK = "none: the OCI format has no HEALTHCHECK, so build by `make image`, or with --format docker"
FORBIDDEN_MODULES = ("torch", "lightning", "onnx", "sklearn", "matplotlib", "pip")
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "make", "ld")

# Runs inside the image and prints what it finds as JSON.
PROBE = """
import importlib.util, json, os, shutil, sys
modules, compilers = json.loads(sys.argv[1]), json.loads(sys.argv[2])
own, writable, caches, read_only = [], [], [], False
for folder, folders, files in os.walk("/", onerror=None):
    if folder in ("/proc", "/sys", "/dev"):
        folders[:] = []
        continue
    if os.lstat(folder).st_mode & 0o1002 == 0o0002:  # by everyone, and not sticky as /tmp is
        writable.append(folder)
    if os.path.basename(folder) == ".cache":
        caches.append(folder)
    own += [p for p in (os.path.join(folder, f) for f in files) if os.lstat(p).st_uid == os.getuid()]
try:
    open("/tmp/probe", "w").close()
except OSError:
    read_only = True
found = {"modules": [m for m in modules if importlib.util.find_spec(m)],
         "compilers": [c for c in compilers if shutil.which(c)], "uid": os.getuid(), "gid": os.getgid(),
         "own": own, "writable": writable, "caches": caches, "read_only": read_only}
print(json.dumps(found))
"""


class Config(NamedTuple):
    """What the image declares."""

    user: str
    env: dict[str, str]
    command: list[str]
    workdir: str
    healthcheck: list[str]


class Running(NamedTuple):
    """A started service: address, whether it runs, how to run a command beside it, how to stop it (-> exit code)."""

    url: str
    alive: Callable[[], bool]
    execute: Callable[[list[str]], subprocess.CompletedProcess[str]]
    stop: Callable[[], int]
    logs: Callable[[], str]


def call(*argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command, capture its output as text."""
    return subprocess.run(argv, check=check, text=True, capture_output=True)


def parse_config(config: dict[str, Any]) -> Config:
    """The fields of a Docker image configuration that matter here."""
    env = dict(item.split("=", 1) for item in config.get("Env") or [])
    command = [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])]
    test = (config.get("Healthcheck") or {}).get("Test") or []
    return Config(config.get("User", ""), env, command, config.get("WorkingDir") or "/", test[1:])


class ContainerEngine:
    """docker or podman."""

    def __init__(self, program: str, image: str, options: list[str]) -> None:
        self.program, self.image = program, image
        self.options = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", *options]
        (self.facts,) = json.loads(call(program, "image", "inspect", image).stdout)
        self.config = parse_config(self.facts["Config"] | {"Healthcheck": self._healthcheck()})

    def _healthcheck(self) -> dict[str, Any]:
        return self.facts["Config"].get("Healthcheck") or self.facts.get("Healthcheck") or {}

    def size(self) -> int:
        """Bytes of the image's layers, uncompressed."""
        return int(self.facts["Size"])

    def run(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command in a fresh container."""
        return call(
            self.program, "run", "--rm", *self.options, "--entrypoint", argv[0], self.image, *argv[1:], check=False
        )

    @contextmanager
    def serve(self) -> Iterator[Running]:
        """The image's own command, its port published on a free one of the loopback interface."""
        port = self.config.env["VAESERVE_PORT"]
        started = call(self.program, "run", "--detach", *self.options, "--publish", f"127.0.0.1::{port}", self.image)
        container = started.stdout.strip()

        def alive() -> bool:
            return call(self.program, "inspect", "--format", "{{.State.Running}}", container).stdout.strip() == "true"

        def stop() -> int:
            call(self.program, "stop", f"--time={STOP_SECONDS}", container)
            return int(call(self.program, "inspect", "--format", "{{.State.ExitCode}}", container).stdout)

        def execute(argv: list[str]) -> subprocess.CompletedProcess[str]:
            return call(self.program, "exec", container, *argv, check=False)

        def logs() -> str:
            done = call(self.program, "logs", container, check=False)
            return done.stdout + done.stderr

        try:
            address = call(self.program, "port", container, port).stdout.splitlines()[0]
            yield Running(f"http://{address}", alive, execute, stop, logs)
        finally:
            call(self.program, "rm", "--force", container, check=False)


class BuildahEngine:
    """The file system of an image in buildah's storage, entered by chroot (needs root and util-linux)."""

    def __init__(self, stack: ExitStack, image: str) -> None:
        self.container = call("buildah", "from", "--pull-never", image).stdout.strip()
        stack.callback(call, "buildah", "rm", self.container)
        self.root = call("buildah", "mount", self.container).stdout.strip()
        facts = json.loads(call("buildah", "inspect", "--type", "image", image).stdout)
        self.config = parse_config(facts["Docker"]["config"])
        self.enter = stack.enter_context(tempfile.TemporaryDirectory(prefix="check-image-"))

    def size(self) -> int:
        """Bytes that the files take, as du counts them."""
        return int(call("du", "--summarize", "--block-size=1", "--one-file-system", self.root).stdout.split()[0])

    def argv(self, argv: list[str], env: dict[str, str]) -> list[str]:
        """A command line that runs ``argv`` as the image's user on its read-only root."""
        root, inside = shlex.quote(self.enter), shlex.join(f"{name}={value}" for name, value in env.items())
        chdir = f"--chdir={shlex.quote(self.config.workdir)}"
        script = (
            f"mount --bind {shlex.quote(self.root)} {root} && mount -o remount,bind,ro {root} && "
            f"mount -t proc proc {root}/proc && mount --bind /dev {root}/dev && "
            f"exec chroot --userspec={self.config.user} --groups='' {root} "
            f"/usr/bin/env --ignore-environment {chdir} {inside} {shlex.join(argv)}"
        )
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]

    def run(self, argv: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command on the image's file system."""
        return call(*self.argv(argv, self.config.env), check=False)

    @contextmanager
    def serve(self) -> Iterator[Running]:
        """The image's own command on a free port of this machine."""
        env = self.config.env | {"VAESERVE_PORT": str(free_port())}
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(self.argv(self.config.command, env), stdout=log, stderr=subprocess.STDOUT)

            def alive() -> bool:
                return process.poll() is None

            def stop() -> int:
                process.terminate()
                return process.wait(STOP_SECONDS)

            def execute(argv: list[str]) -> subprocess.CompletedProcess[str]:
                return call(*self.argv(argv, env), check=False)

            def logs() -> str:
                log.seek(0)
                return log.read()

            try:
                yield Running(f"http://127.0.0.1:{env['VAESERVE_PORT']}", alive, execute, stop, logs)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def png(height: int, width: int, seed: int = 0) -> bytes:
    """A greyscale PNG of uniform noise: it does not compress, so its size is about height × width bytes."""
    pixels = random.Random(seed)
    rows = b"".join(b"\0" + pixels.randbytes(width) for _ in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def multipart(image: bytes) -> Body:
    """A form with one file in the field ``images``, and its Content-Type."""
    head = (
        b'--edge\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    return head + image + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge"


def fetch(url: str, body: bytes | None = None, content_type: str = "image/png") -> Any:
    """GET, or POST ``body``; the JSON of the answer."""
    headers = {"Content-Type": content_type} if body is not None else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body, headers), timeout=60) as answer:
        return json.load(answer)


def wait_healthy(service: Running, healthcheck: list[str]) -> bool:
    """Run the image's HEALTHCHECK until it succeeds, the service ends, or START_SECONDS have passed."""
    deadline = time.monotonic() + START_SECONDS
    while service.alive() and time.monotonic() < deadline:
        if service.execute(healthcheck).returncode == 0:
            return True
        time.sleep(0.5)
    return False


class Checks:
    """Prints each check as it is made and remembers whether all held."""

    def __init__(self) -> None:
        self.ok = True

    def __call__(self, name: str, ok: bool, found: object) -> None:
        self.ok = self.ok and ok
        print(f"{'ok  ' if ok else 'FAIL'}  {name}: {found}", flush=True)


def check_contents(engine: ContainerEngine | BuildahEngine, check: Checks, limit_mb: float) -> None:
    """What the image holds and declares."""
    config, size = engine.config, engine.size() / 1e6
    check("size", size < limit_mb, f"{size:.0f} MB, limit {limit_mb:.0f}")
    probe = engine.run(["python", "-c", PROBE, json.dumps(FORBIDDEN_MODULES), json.dumps(COMPILERS)])
    if probe.returncode:
        check("python runs", False, probe.stderr)
        return
    found = json.loads(probe.stdout)
    user = f"{found['uid']}:{found['gid']}"
    check("user", found["uid"] != 0 and user == config.user, f"{user}, declared {config.user!r}")
    check("modules that only training needs", not found["modules"], found["modules"] or "none")
    check("compilers", not found["compilers"], found["compilers"] or "none")
    check("files of the user", not found["own"], found["own"][:5] or "none")
    check("folders that anyone can write", not found["writable"], found["writable"][:5] or "none")
    check("runs on a read-only root", found["read_only"], "yes" if found["read_only"] else "no, /tmp took a file")
    check("caches", not found["caches"], found["caches"] or "none")
    check("health check declared", bool(config.healthcheck), config.healthcheck[:1] or NO_HEALTHCHECK)


def check_service(engine: ContainerEngine | BuildahEngine, check: Checks) -> None:
    """Start it, score with it, stop it."""
    with engine.serve() as service:
        healthy = wait_healthy(service, engine.config.healthcheck)
        check("health check", healthy, "healthy" if healthy else service.logs()[-2000:])
        if not healthy:
            return
        ready = fetch(f"{service.url}/readyz")
        check("models", bool(ready["models"]), ready["models"])
        for name in sorted({model.split("/")[0] for model in ready["models"]}):
            try:
                check_scores(service.url, name, check)
            except urllib.error.HTTPError as error:
                check(f"{name} scores", False, f"{error}\n{error.read().decode()}\n{service.logs()[-2000:]}")
        code = service.stop()
        check("stops on SIGTERM", code == 0, f"exit code {code}")


def check_scores(url: str, model: str, check: Checks) -> None:
    """One row in two forms, of what the model is of: a finite score, the same both times."""
    facts = fetch(f"{url}/v1/models/{model}")
    for what, bodies in pictures() if facts["kind"] == "image" else rows(facts["shape"]):
        answers = [fetch(f"{url}/v1/models/{model}/score", body, media_type) for body, media_type in bodies]
        scores = [answer["results"][0]["score"] for answer in answers]
        check(f"{model} scores {what}", math.isfinite(scores[0]) and scores[0] == scores[1], scores)


def pictures() -> Iterator[tuple[str, list[Body]]]:
    """Pictures, raw and as a form; the second is larger than the megabyte that a form keeps in memory."""
    for side in (28, 1500):
        image = png(side, side)
        yield (
            f"a picture {side}x{side}, {len(image)} bytes, raw and as a form",
            [(image, "image/png"), multipart(image)],
        )


def rows(shape: list[int]) -> Iterator[tuple[str, list[Body]]]:
    """A vector [D] or a signal [C,T] of standard normal numbers, as JSON and as CSV, channel after channel."""
    draw, width = random.Random(0), shape[-1]
    numbers = [round(draw.gauss(0, 1), 3) for _ in range(math.prod(shape))]
    row = numbers if len(shape) == 1 else [numbers[i : i + width] for i in range(0, len(numbers), width)]
    line, document = ",".join(map(str, numbers)), json.dumps({"rows": [row]})
    bodies = [(document.encode(), "application/json"), (line.encode(), "text/csv")]
    yield f"{'x'.join(map(str, shape))} numbers, as JSON and as CSV", bodies


def main() -> int:
    """Parse arguments, check, return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", help="name of the built image")
    parser.add_argument("--engine", choices=["docker", "podman", "buildah"], default="docker")
    parser.add_argument(
        "--limit-mb", type=float, default=LIMIT_MB, help=f"largest size, 10^6 bytes (default {LIMIT_MB})"
    )
    parser.add_argument("--run-options", default="", help='more options of docker run, e.g. "--gpus all"')
    asked = parser.parse_args()
    if asked.engine == "buildah" and os.geteuid() != 0:
        parser.error("--engine buildah enters the image by chroot, which needs root")
    check = Checks()
    with ExitStack() as stack:
        if asked.engine == "buildah":
            engine: ContainerEngine | BuildahEngine = BuildahEngine(stack, asked.image)
        else:
            engine = ContainerEngine(asked.engine, asked.image, shlex.split(asked.run_options))
        check_contents(engine, check, asked.limit_mb)
        check_service(engine, check)
    return 0 if check.ok else 1


if __name__ == "__main__":
    sys.exit(main())
