"""The shape of service/ in numbers that anyone can check: lines, files a package, layers of the contract, circles.

    python -m bench.structure [CHECKOUT …]

Lines are those of all Python files, blank ones and comments among them. The layers are those of import-linter's
contract in pyproject.toml; ``lint-imports`` says whether it is kept. A circle is a chain of imports that comes back to
the module it began at, wherever in a file the imports stand; of packages, likewise, their modules taken as one.
"""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "service"
IMPORTS = f"""
import sys
sys.path.insert(0, ".")
import grimp
graph = grimp.build_graph({PACKAGE!r}, cache_dir=None)
for importer in sorted(graph.modules):
    for imported in sorted(graph.find_modules_directly_imported_by(importer)):
        print(importer, imported)
"""
"""Run in a process of its own in the checkout, since Python finds a package of one name in one place only."""


def files(checkout: Path) -> list[Path]:
    """Every Python file of the service."""
    return sorted((checkout / PACKAGE).rglob("*.py"))


def lines(paths: Iterable[Path]) -> int:
    """Of all of them."""
    return sum(len(path.read_text().splitlines()) for path in paths)


def files_a_package(checkout: Path) -> Counter[str]:
    """Python files directly in each folder, by its path."""
    return Counter(str(path.parent.relative_to(checkout)) for path in files(checkout))


def function_lines(paths: Iterable[Path]) -> list[int]:
    """Lines of every function and method, from its ``def`` to its end, rising."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions))
    return sorted((node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes)


def layers(checkout: Path) -> int | None:
    """Of the layers contract; None if there is none."""
    tool = tomllib.loads((checkout / "pyproject.toml").read_text())["tool"]
    contracts = tool.get("importlinter", {}).get("contracts", [])
    return next((len(contract["layers"]) for contract in contracts if contract["type"] == "layers"), None)


def imports(checkout: Path) -> dict[str, set[str]]:
    """The modules that each module of the service imports."""
    command = [sys.executable, "-c", IMPORTS]
    found: dict[str, set[str]] = {}
    for line in subprocess.check_output(command, cwd=checkout, text=True).splitlines():
        importer, imported = line.split()
        found.setdefault(importer, set()).add(imported)
    return found


def of_packages(found: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The packages right below the service, or modules there, that each imports."""
    merged: dict[str, set[str]] = {}
    for importer, imported in found.items():
        own = _package(importer)
        merged.setdefault(own, set()).update({_package(name) for name in imported} - {own})
    return merged


def _package(module: str) -> str:
    return ".".join(module.split(".")[:2])


def circles(found: Mapping[str, set[str]]) -> list[list[str]]:
    """Chains of imports that come back to where they began: one after the other, each broken once it is told."""
    left = {name: sorted(imported) for name, imported in sorted(found.items())}
    told = []
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            *chain, _ = error.args[1][::-1]  # each imports the next, and the last the first
            first = chain.index(min(chain))
            chain = [*chain[first:], *chain[: first + 1]]
            told.append(chain)
            left[chain[0]].remove(chain[1])
        else:
            return told


def report(checkout: Path) -> list[str]:
    """In lines."""
    paths, found = files(checkout), imports(checkout)
    sizes, longest = function_lines(paths), max(paths, key=lambda path: lines([path]))
    number = layers(checkout)
    text = [
        f"lines of {PACKAGE}/: {lines(paths):,} in {len(paths)} files",
        f"longest file: {longest.relative_to(checkout)}, {lines([longest])} lines",
        f"functions: median {statistics.median(sizes):.0f} lines, longest {sizes[-1]}",
        f"layers of the import contract: {'no contract' if number is None else number}",
        "files a package: " + ", ".join(f"{name} {count}" for name, count in files_a_package(checkout).items()),
    ]
    for name, graph in (("modules", found), ("packages", of_packages(found))):
        told = circles(graph)
        text.append(f"circles among {name}: {len(told) or 'none'}")
        text += ["  " + " → ".join(chain) for chain in told]
    return text


def main(argv: list[str] | None = None) -> None:
    """Print it for each checkout, this one by default."""
    for checkout in map(Path, (sys.argv[1:] if argv is None else argv) or [ROOT]):
        print(f"{checkout}\n" + "\n".join(f"  {line}" for line in report(checkout.resolve())))


if __name__ == "__main__":
    main()
