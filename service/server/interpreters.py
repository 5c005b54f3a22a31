"""The command line of a fresh interpreter that runs one module of this package, and talks over one open descriptor."""

from __future__ import annotations

import json
import sys

# The path of modules is handed on: it imports this very package, whatever lies in the working directory.
PROGRAM = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main(int(sys.argv[3]))"
)


def fresh_interpreter(module: str, descriptor: int) -> list[str]:
    """A command that calls ``main(descriptor)`` of that module; the descriptor must be passed on to it."""
    return [sys.executable, "-P", "-c", PROGRAM, json.dumps(sys.path), module, str(descriptor)]
