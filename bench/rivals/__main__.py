"""python -m bench.rivals install [NAME …]: make the environments of the other servers; without install: list them."""

from __future__ import annotations

import argparse

from bench.rivals.environments import FOLDER, PACKAGES, install, installed_version


def main(argv: list[str] | None = None) -> None:
    """Install, or list."""
    parser = argparse.ArgumentParser(prog="python -m bench.rivals", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["install", "list"], default="list")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PACKAGES)}; all")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in PACKAGES:
            parser.error(f"{name}: expected of {', '.join(PACKAGES)}")
    for name in arguments.names or PACKAGES:
        if arguments.command == "install":
            install(name)
        print(f"{name}: {installed_version(name) or 'not installed'} ({FOLDER / name})")


if __name__ == "__main__":
    main()
