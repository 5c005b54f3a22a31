"""Entry point of ``vaeserve`` and of ``python -m service``."""

import gc
import os
import sys
from collections.abc import Mapping, Sequence


def main() -> None:
    """Run the command line, beside which the nursery of several workers imports already what they need."""
    # Before numpy is imported, whose BLAS starts a thread a core: they wait spinning, which beside requests doubles the
    # CPU time of a score, and share out a row's work as they happen to be free.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()  # what is imported stays
    first = None
    if seems_to_want_workers(sys.argv[1:], os.environ):
        from service.server.forker import fork_nursery

        first = fork_nursery()
        if first is None:  # this is the nursery or a worker, and ends
            return
    from service.commands import cli

    gc.freeze()
    gc.enable()
    cli.main(first)


def seems_to_want_workers(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether that is to be several processes that serve, by a look from afar: the settings are not read yet.

    Where this is wrong a process is started for nothing, or a little later.
    """
    if sys.platform != "linux" or arguments[:1] != ["serve"]:
        return False
    wanted = environment.get("VAESERVE_WORKERS", "1")
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, said = flag.partition("=")
        if name == "--workers":
            wanted = said or value
    return wanted != "1"


if __name__ == "__main__":
    main()
