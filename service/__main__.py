"""Entry point of ``vaeserve`` and of ``python -m service``."""

import gc
import os


def main() -> None:
    """Run the command line."""
    # Before numpy is imported, whose BLAS starts a thread a core: they wait spinning, which beside requests doubles the
    # CPU time of a score, and share out a row's work as they happen to be free.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.disable()  # what is imported stays
    from service.commands.cli import app

    gc.freeze()
    gc.enable()
    app()


if __name__ == "__main__":
    main()
