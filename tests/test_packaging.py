"""The package: make's verbs, the lock, what each extra brings, the direction of imports, the image's recipe."""

from __future__ import annotations

import ast
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from service import __version__
from service.commands.environment import check_environment

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
TESTS = {"test", "test-fast", "test-slow", "test-engines"}
VERBS = TESTS | {"serve", "check", "train", "image", "image-check", "lock", "bench", "clean", "help"}
HEAVY = {"torch", "lightning", "pytorch-lightning", "onnx", "onnxscript", "scikit-learn", "matplotlib", "tensorboard"}


def run(*argv: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    # make hands its own flags on through the environment; a make under test must not see them.
    base = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(
        [str(part) for part in argv], cwd=cwd, env=base | env, text=True, capture_output=True, timeout=120, check=False
    )


# --- make ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """The files that make's install rules look at, alone in a folder."""
    (tmp_path / "deploy").mkdir()
    for name in ("Makefile", "pyproject.toml", "deploy/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def planned(verb: str, cwd: Path) -> str:
    result = run("make", "--dry-run", verb, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_help_lists_every_verb() -> None:
    listed = set(re.findall(r"^  make (\S+)", run("make", "help").stdout, flags=re.MULTILINE))
    assert listed >= VERBS


def test_every_verb_can_be_planned(sandbox: Path) -> None:
    for verb in VERBS:
        assert planned(verb, sandbox)


def test_serve_installs_the_cpu_runtime_only_and_into_its_own_environment(sandbox: Path) -> None:
    plan = planned("serve", sandbox)
    assert "'.[cpu]'" in plan
    assert not re.search(r"\btrain\b|torch", plan)
    assert "--constraint deploy/constraints.txt" in plan
    assert ".venv/" not in plan


def test_serve_on_gpu_never_shares_an_environment_with_cpu(sandbox: Path) -> None:
    plan = planned("RUNTIME=gpu", sandbox) + run("make", "-n", "serve", "RUNTIME=gpu", cwd=sandbox).stdout
    assert "'.[gpu]'" in plan
    assert ".venv-serve-cpu" not in plan


@pytest.mark.parametrize("changed", ["pyproject.toml", "deploy/constraints.txt"])
def test_install_happens_once_and_again_when_its_inputs_change(sandbox: Path, changed: str) -> None:
    stamp = sandbox / ".venv-serve-cpu/.installed"
    stamp.parent.mkdir()
    stamp.touch()
    for name in ("pyproject.toml", "deploy/constraints.txt"):
        os.utime(sandbox / name, (1e9, 1e9))
    assert "pip install" not in planned("serve", sandbox)

    os.utime(sandbox / changed, (4e9, 4e9))
    assert "pip install" in planned("serve", sandbox)


def test_ci_script_is_executable_and_ends_with_the_summary_of_make_test() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", script).returncode == 0
    assert script.read_text().rstrip().splitlines()[-1] == "make check test-engines test"


# --- the lock --------------------------------------------------------------------------------------------------------


def locked() -> dict[str, Version]:
    """name -> version of deploy/constraints.txt."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "deploy/constraints.txt").read_text().splitlines())
    return {canonicalize_name(name): Version(pin) for name, pin in (line.split("==") for line in lines if line)}


def closure(requirements: Iterable[str]) -> set[str]:
    """Names of everything that these requirements bring on this machine, read from the installed packages."""
    found: set[str] = set()
    todo = [(Requirement(text), "") for text in requirements]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen and (needs := requires(name)) is not None:
                seen.add((name, wanted))
                todo += [(Requirement(text), wanted) for text in needs]
    return found


def requires(name: str) -> list[str] | None:
    """The Requires-Dist of an installed package, None where it is not installed (the CUDA runtime on a CPU machine)."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return None


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_every_package_of_every_extra_is_locked(extra: str) -> None:
    missing = closure([*PROJECT["dependencies"], *EXTRAS[extra]]) - locked().keys()
    assert not missing, f"not in deploy/constraints.txt: {sorted(missing)}; run make lock"


def test_locked_versions_satisfy_pyproject() -> None:
    pins = locked()
    for text in [*PROJECT["dependencies"], *(item for extra in EXTRAS.values() for item in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), f"{text}; run make lock"


def test_installed_versions_are_the_locked_ones() -> None:
    pins = locked()
    wanted = closure([*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["train"], *EXTRAS["dev"], *EXTRAS["parquet"]])
    installed = {name: Version(Version(metadata.version(name)).public) for name in wanted if requires(name) is not None}
    assert {"torch", "onnxruntime", "fastapi", "pyarrow"} <= installed.keys()
    assert installed == {name: pins[name] for name in installed}


def test_the_lock_names_no_host_and_no_local_build() -> None:
    text = (ROOT / "deploy/constraints.txt").read_text()
    assert "://" not in text
    assert "--" not in text
    assert not [name for name, version in locked().items() if version.local]


# --- extras ----------------------------------------------------------------------------------------------------------


def test_what_serves_brings_no_training_package() -> None:
    brought = closure([*PROJECT["dependencies"], *EXTRAS["cpu"]])
    assert {"fastapi", "starlette", "uvloop", "onnxruntime", "protobuf"} <= brought  # the walk really walks
    assert not brought & HEAVY


def test_only_the_extras_cpu_and_gpu_bring_a_runtime_and_never_the_same() -> None:
    names = {extra: {canonicalize_name(Requirement(text).name) for text in EXTRAS[extra]} for extra in EXTRAS}
    assert names["cpu"] == {"onnxruntime"}
    assert names["gpu"] == {"onnxruntime-gpu"}
    others = [text for extra in EXTRAS if extra not in ("cpu", "gpu") for text in EXTRAS[extra]]
    assert not closure([*PROJECT["dependencies"], *others]) & {"onnxruntime", "onnxruntime-gpu"}


# --- the wheel -------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_every_file_of_both_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for package in ("service", "training"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    shutil.copy(ROOT / "LICENSE", source)
    (source / PROJECT["readme"]).write_text("# vaeserve\n")
    expected = {path.relative_to(source).as_posix() for path in source.glob("*/**/*") if path.is_file()}

    pip = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
    )
    built = run(*pip, source)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")}
        (license_file,) = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
        license_text = wheel.read(license_file).decode()
    assert held == expected
    assert license_text == (ROOT / "LICENSE").read_text()


def test_the_license_is_the_full_text_of_apache_2() -> None:
    """The hash is that of https://www.apache.org/licenses/LICENSE-2.0.txt."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert PROJECT["license"] == "Apache-2.0"


# --- the direction of imports ----------------------------------------------------------------------------------------

COLD = "import sys, service.api.app, service.commands.cli; print(*sorted({name.split('.')[0] for name in sys.modules}))"


def test_a_cold_import_of_the_service_loads_neither_torch_nor_training() -> None:
    result = run(sys.executable, "-c", COLD)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert {"service", "fastapi", "onnxruntime"} <= loaded
    assert not loaded & {"training", "torch", "lightning", "onnx", "sklearn", "matplotlib", "scipy", "tensorboard"}


@pytest.mark.parametrize(
    ("file", "line", "holds"),
    [
        ("service/bundle/extra.py", "import json\n", True),
        ("service/bundle/extra.py", "import training.data\n", False),
        ("service/bundle/extra.py", "def late() -> None:\n    import torch\n", False),
        ("service/commands/convert.py", "import onnx\n", False),
        ("service/extra.py", "import json\n", False),
        ("service/repository/extra.py", "import service.inference.model\n", True),
        ("service/repository/extra.py", "import service.api.schemas\n", False),
        ("service/calibration/extra.py", "from service.repository import resolving\n", False),
        ("service/scores/extra.py", "import service.formats.images\n", False),
        ("service/bundle/protobuf.py", "import service.bundle.operators\n", False),
        ("training/runs.py", "import service.api.app\n", False),
        ("training/runs.py", "import service.repository.resolving\n", False),
        ("training/runs.py", "from service.inference import model\n", True),
        ("training/runs.py", "import training.pipeline\n", False),
        ("training/models/base.py", "import training.fitting.objectives\n", False),
        ("training/extra.py", "import json\n", False),
    ],
)
def test_the_import_contracts_hold_and_can_fail(tmp_path: Path, file: str, line: str, holds: bool) -> None:
    for package in ("service", "training"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as module:
        module.write(line)
    program = Path(sys.executable).parent / "lint-imports"
    result = run(program, "--no-cache", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (result.returncode == 0) is holds, result.stdout
    assert ("BROKEN" in result.stdout) is not holds, result.stdout


# --- the image -------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of the Dockerfile in order, continuation lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def arguments(instruction: str) -> list[str]:
    return [rest for name, rest in instructions() if name == instruction]


def healthcheck() -> list[str]:
    (text,) = arguments("HEALTHCHECK")
    command = json.loads(text.split("CMD", maxsplit=1)[1])
    assert command[0] == "python"
    return [sys.executable, *command[1:]]


def test_the_image_has_both_targets_and_cpu_is_the_default() -> None:
    stages = [rest.split(" AS ")[1] for rest in arguments("FROM")]
    assert "gpu" in stages
    assert stages[-1] == "cpu"


def test_the_final_stages_run_nothing_as_root() -> None:
    names = [name for name, _ in instructions()]
    (user,) = arguments("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert "RUN" not in names[names.index("USER") :]
    assert arguments("STOPSIGNAL") == ["SIGTERM"]
    assert arguments("EXPOSE") == ["8000"]


def test_no_step_of_the_image_installs_torch_or_a_compiler() -> None:
    for step in arguments("RUN"):
        assert not re.search(r"torch|\btrain\b|gcc|build-essential|apt-get", step)
        assert "pip" not in step or "--no-cache-dir" in step


def test_the_environment_of_the_image_is_made_of_known_settings() -> None:
    variables = dict(pair.split("=", 1) for rest in arguments("ENV") for pair in rest.split())
    assert variables["VAESERVE_HOST"] == "0.0.0.0"
    check_environment(variables)


@pytest.mark.parametrize(
    ("build", "format_"),
    [
        ("docker build", ""),
        ("buildah bud", "--format docker"),
        ("podman build", "--format docker"),
        ("/usr/bin/podman build --layers", "--format docker"),
    ],
)
def test_an_image_is_built_in_the_format_that_has_a_healthcheck(build: str, format_: str) -> None:
    """buildah and podman write OCI images unless told otherwise."""
    made = run("make", "-n", "image", f"BUILD={build}")
    assert " ".join(made.stdout.split()) == " ".join(f"{build} {format_} --tag vaeserve:cpu --target cpu .".split())
    assert "--format docker" in (ROOT / "deploy/check_image.py").read_text()


def test_what_the_image_copies_is_let_through_by_dockerignore() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = {source for rest in arguments("COPY") if "--from" not in rest for source in rest.split()[:-1]}
    assert copied == allowed
    assert not [name for name in (".git", ".venv", "runs", "tests") if any(fnmatch(name, item) for item in allowed)]


class Ready(http.server.BaseHTTPRequestHandler):
    """Answers /readyz with the server's ``status``, anything else with 404."""

    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/readyz" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on a free port of localhost whose /readyz answers ``status``."""
    with http.server.HTTPServer(("127.0.0.1", 0), Ready) as server:
        server.status = status  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_the_health_check_follows_readiness_and_asks_no_proxy(status: int, healthy: bool) -> None:
    with answering(status) as port:
        result = run(*healthcheck(), VAESERVE_PORT=str(port), http_proxy="http://127.0.0.1:9")
    assert (result.returncode == 0) is healthy, result.stderr


def test_the_health_check_fails_where_nothing_listens() -> None:
    with answering(200) as port:
        pass
    assert run(*healthcheck(), VAESERVE_PORT=str(port)).returncode != 0


def test_the_image_check_needs_nothing_but_the_standard_library() -> None:
    tree = ast.parse((ROOT / "deploy/check_image.py").read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


def test_the_changelog_tells_of_this_version() -> None:
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
