"""The command ``vaeserve serve``, which starts one process under uvicorn, or several under gunicorn."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import typer

from service.commands.console import exit_on_error
from service.commands.environment import read_settings, variables_of_kubernetes
from service.errors import ConfigurationError
from service.resources import available_cpus, available_memory, fitting_workers, freeze_gc
from service.settings import MAX_WORKERS, Settings

MADE_OF_A_SERVICE = "Kubernetes makes them of a Service of that name; enableServiceLinks: false leaves them out"
ADDRESS_TAKEN = 3  # uvicorn's exit code where it cannot listen


def serve(context: typer.Context) -> None:
    """Read settings from flags and environment, load every bundle, serve until told to stop."""
    with exit_on_error():
        settings = read_settings(context.args)
        gc.disable()  # what is imported and loaded from now on stays, and freeze_gc comes next
        from service.logs import configure_logs, get_logger

        configure_logs(settings.log_level, settings.log_format)
        if ignored := variables_of_kubernetes(os.environ):
            get_logger().warning("variables ignored", variables=ignored, reason=MADE_OF_A_SERVICE)
        settings = _choose_workers(settings).for_each_worker()
        if settings.workers == 1:
            _serve_alone(settings)
        else:
            _serve_with_workers(settings)


def _choose_workers(settings: Settings) -> Settings:
    """Replace "auto" in the settings by a number of workers, and log it."""
    if settings.workers != "auto":
        return settings
    from service.bundle.files import find_bundles
    from service.logs import get_logger

    graphs = (file for path in find_bundles(settings.repository) for file in path.glob("*.onnx"))
    fitting = fitting_workers(settings.threads or 1, sum(graph.stat().st_size for graph in graphs))
    workers = min(fitting, MAX_WORKERS) if sys.platform == "linux" else 1
    get_logger().info("workers chosen", workers=workers, cpus=available_cpus(), memory=available_memory())
    return settings.model_copy(update={"workers": workers})


def _serve_alone(settings: Settings) -> None:
    """Serve in this process until told to stop. Where it cannot listen, uvicorn logs why, and exits with code 3."""
    from service.api.app import create_app
    from service.logs import get_logger
    from service.repository.model_repository import load_repository
    from service.server.draining import DrainingServer

    server = DrainingServer(create_app(settings, load_repository(settings)), settings)
    get_logger().info("starting", host=settings.host, port=settings.port, device=settings.device)
    freeze_gc()
    with suppress(KeyboardInterrupt):
        server.run()


def _serve_with_workers(settings: Settings) -> None:
    """Serve in settings.workers processes, of which this one becomes the master, until told to stop.

    Bundles are loaded here, for all workers, if their sessions have no thread but the caller's: no other survives a
    fork. This function does not return: the master ends by SystemExit.
    """
    if sys.platform != "linux":
        raise ConfigurationError("setting workers: only Linux spreads connections over several processes; give 1")
    from service.bundle.files import bundle_digests
    from service.logs import get_logger
    from service.repository.model_repository import load_repository
    from service.server.address import claimed_address
    from service.server.workers import Application, PatientArbiter

    with ExitStack() as held:
        try:
            port = held.enter_context(claimed_address(settings.host, settings.port))
        except OSError as error:
            reason = str(error.strerror).lower()
            get_logger().error(f"cannot listen on {settings.host}, port {settings.port}: {reason}")
            raise typer.Exit(ADDRESS_TAKEN) from error
        settings = settings.model_copy(update={"port": port})
        get_logger().info("starting", host=settings.host, port=port, workers=settings.workers)
        digests, shareable = bundle_digests(settings.repository), settings.threads == 1 and settings.device == "cpu"
        repository = load_repository(settings, digests) if shareable else None
        if repository is not None:
            repository.runtime.row_threads.end_threads()
        freeze_gc()  # a collection in a worker would write to every object, and so copy all pages
        folder = held.enter_context(_shared_folder())
        PatientArbiter(Application(settings, folder, digests, repository)).run()  # its SystemExit ends workers, too


@contextmanager
def _shared_folder() -> Iterator[Path]:
    """Make a folder for files of all workers, in memory if possible, since metrics change with each request.

    The master removes it when it ends.
    """
    memory, master = Path("/dev/shm"), os.getpid()  # noqa: S108 - mkdtemp makes a folder of its own there
    try:
        folder = tempfile.mkdtemp(prefix="vaeserve-", dir=memory if os.access(memory, os.W_OK) else None)
    except OSError as error:
        raise ConfigurationError(f"several workers need a folder for files: {error}") from error
    try:
        yield Path(folder)
    finally:
        if os.getpid() == master:
            shutil.rmtree(folder, ignore_errors=True)
