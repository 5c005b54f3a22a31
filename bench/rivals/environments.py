"""Environments of the other servers: a virtual one each, of the exact versions in requirements-NAME.txt.

Every package of an environment is listed there, and pip resolves nothing: a release whose own requirements the index
cannot meet on the day still installs with the versions that it was measured with.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Final

FOLDER: Final = Path("runs/bench/rivals").resolve()
PACKAGES: Final[Mapping[str, str]] = {
    "litserve": "litserve",
    "bentoml": "bentoml",
    "mlserver": "mlserver",
    "pytriton": "nvidia-pytriton",
}
"""The package that each environment is for."""


def interpreter(name: str) -> Path:
    """Python of that environment."""
    return FOLDER / name / "bin" / "python"


def requirements(name: str) -> Path:
    """What it holds."""
    return Path(__file__).parent / f"requirements-{name}.txt"


def installed_version(name: str) -> str | None:
    """Version of the environment's package; None if it is not there."""
    places = [str(place) for place in (FOLDER / name).glob("lib/python*/site-packages")]
    found = {each.name.lower(): each.version for each in distributions(path=places)} if places else {}
    return found.get(PACKAGES[name])


def install(name: str) -> None:
    """Make the environment anew. Raises CalledProcessError where pip fails."""
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", FOLDER / name], check=True)
    pip = [str(interpreter(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--requirement", requirements(name)], check=True)
