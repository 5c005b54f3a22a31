"""Several processes that serve the same bundles on the same port: gunicorn starts, watches, restarts and stops them.

The master holds the address and, if a fork can share them, the loaded bundles; it does not listen. Workers leave their
metrics, and word that they listen, in files of one folder. They never talk to each other.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker
from prometheus_client.multiprocess import mark_process_dead

from service.api.app import create_app
from service.api.metrics import Metrics
from service.bundle.files import bundle_digests
from service.calibration.drift_monitor import Drift
from service.errors import BundleIntegrityError, VaeserveError
from service.logs import configure_logs, get_logger
from service.repository.model_repository import ModelRepository, load_repository
from service.resources import freeze_gc, threads_of_process
from service.server.address import bind
from service.server.draining import DrainingServer
from service.settings import Settings

FIRST_WAIT, MAX_WAIT = 0.1, 30.0  # seconds until what could not start is tried again; doubled each time
LATE_SECONDS = 5  # that the master waits longer for a worker to end than the worker may take
ORPHAN_SECONDS = 5  # for the requests in progress of a worker whose master was killed
FAILED, FAILED_FOR_ALL = 1, 3  # exit codes of a worker; by the latter, gunicorn's WORKER_BOOT_ERROR, the master ends


class Application(BaseApplication):
    """What gunicorn asks for, and what each worker needs.

    Arguments: ``folder``, for files of all workers; ``digests`` of the bundles to serve, by NAME/VERSION;
    ``repository``, which has them loaded, None if each worker is to load them itself.
    """

    def __init__(
        self, settings: Settings, folder: Path, digests: dict[str, str], repository: ModelRepository | None
    ) -> None:
        self.settings, self.folder, self.digests, self.repository = settings, folder, digests, repository
        self.ready = folder / "ready"  # with a file for each worker that listens, named by its process id
        self.ready.mkdir(exist_ok=True)
        super().__init__()

    def load_config(self) -> None:
        stop_seconds = math.ceil(self.settings.drain_seconds + self.settings.request_timeout) + LATE_SECONDS
        options: dict[str, object] = {
            "bind": [],  # a worker listens itself, once it is ready
            "workers": self.settings.workers,
            "worker_class": UvicornWorker,
            "worker_tmp_dir": str(self.folder),
            "preload_app": True,
            "timeout": math.ceil(self.settings.hang_timeout),
            "graceful_timeout": stop_seconds,
            "control_socket_disable": True,
            "logger_class": RootLogger,
            "pre_fork": self.pre_fork,
            "child_exit": self.child_exit,
        }
        for name, value in options.items():
            self.cfg.set(name, value)

    def load(self) -> Application:
        return self  # all is loaded

    def pre_fork(self, arbiter: Arbiter, worker: UvicornWorker) -> None:
        """Number the worker; give it what is loaded, unless another thread may hold a lock that it would wait for."""
        taken = {other.number for other in arbiter.WORKERS.values()}
        worker.number = min(set(range(len(taken) + 1)) - taken)
        worker.repository = self.repository if threads_of_process() == 1 else None
        if self.repository is not None and worker.repository is None:
            get_logger().warning("workers share no memory", reason=f"{threads_of_process()} threads in the master")

    def child_exit(self, arbiter: PatientArbiter, worker: UvicornWorker) -> None:
        """Forget an ended worker; have the next one wait if this one could not start."""
        mark_process_dead(worker.pid, str(self.folder))
        ready = self.ready / str(worker.pid)
        seconds = arbiter.back_off(failed=not ready.exists())
        ready.unlink(missing_ok=True)
        get_logger().info("worker ended", worker=worker.number, pid=worker.pid, hung=worker.aborted, wait=seconds)


class PatientArbiter(Arbiter):
    """gunicorn's master, but what cannot start is tried again ever later, while the workers that serve go on."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)  # others end it, as they end any process
    retry_seconds = retry_at = 0.0

    def back_off(self, failed: bool) -> float:
        """Let the next worker wait, after a failure twice as long as the last one. Returns the seconds."""
        self.retry_seconds = min(max(FIRST_WAIT, 2 * self.retry_seconds), MAX_WAIT) if failed else 0.0
        self.retry_at = time.monotonic() + self.retry_seconds
        return self.retry_seconds

    def spawn_worker(self) -> int | None:
        """Start a worker unless that is to wait: gunicorn asks again every second."""
        if time.monotonic() < self.retry_at:
            return None
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)  # or the worker would take them as this process does
        try:
            return super().spawn_worker()
        except OSError as error:  # no process, memory or file is to be had
            get_logger().error("worker not started", reason=str(error), wait=self.back_off(failed=True))
            return None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def kill_worker(self, pid: int, sig: int) -> None:
        """Kill what hangs: SIGABRT, which gunicorn sends first, leaves a core dump and a stopped worker waiting."""
        super().kill_worker(pid, signal.SIGKILL if sig == signal.SIGABRT else sig)

    def stop(self, graceful: bool = True) -> None:
        self.WORKER_BOOT_ERROR = -1  # no exit code: a worker that cannot start is no reason to stop once more
        super().stop(graceful)


class RootLogger(Logger):
    """Hands gunicorn's warnings and errors to the root logger, and so to service.logs."""

    def setup(self, cfg: object) -> None:
        self.cfg, self.error_log.propagate = cfg, True
        self.error_log.setLevel("WARNING")  # the rest our own lines say


class UvicornWorker(Worker):
    """Serves by uvicorn, and listens itself once the app has started.

    Of the living workers it alone has its ``number``. ``repository`` is what the master has loaded, or None.
    """

    number: int
    repository: ModelRepository | None
    server: DrainingServer
    listens = False

    def init_process(self) -> None:
        """Say that this process lives before anything else: one that hangs before that is never missed."""
        self.notify()
        self.booted = bool(os.listdir(self.app.ready))  # else gunicorn takes a failure here for that of all workers
        os.setpgid(0, 0)  # a terminal's Ctrl-C is for the master
        with suppress(OSError):  # where /proc is read-only
            Path("/proc/self/comm").write_text(f"worker {self.number}")  # what lists of processes call it
        self.settings = self.app.settings
        configure_logs(self.settings.log_level, self.settings.log_format, worker=self.number)
        get_logger().info("worker started", pid=self.pid)
        super().init_process()

    def init_signals(self) -> None:
        """End at once on a signal, until uvicorn takes over those that it knows."""
        for signum in self.SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGQUIT, lambda *_: os._exit(0))  # the default leaves a core dump
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PatientArbiter.SIGNALS)

    def run(self) -> None:
        """Serve until told to stop. A worker that cannot start ends the whole service only if no other listens."""
        try:
            self._serve()
        except (VaeserveError, OSError, SystemExit) as error:  # the last is uvicorn's
            event = "worker failed" if self.listens else "worker not started"
            get_logger().error(event, pid=self.pid, reason=str(error))
            sys.exit(FAILED if os.listdir(self.app.ready) else FAILED_FOR_ALL)

    def _serve(self) -> None:
        settings, present = self.settings, bundle_digests(self.settings.repository)
        for bundle, digest in self.app.digests.items():  # all workers serve the same
            if present.get(bundle) != digest:
                raise BundleIntegrityError(f"{bundle} has changed since the service was started: start it anew")
        drift = Drift(settings.drift_window, settings.drift_level, settings.workers, self.number)
        app = create_app(settings, self.repository or self._load(), Metrics(self.app.folder), drift)
        self.server = DrainingServer(app, settings, self._tick)
        freeze_gc()
        signal.signal(signal.SIGQUIT, self._stop)
        self.server.run(bind(settings.host, settings.port, shared=True))

    def _load(self) -> ModelRepository:
        """Load the bundles, which may take longer than a worker may hang."""
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load_repository, self.settings, self.app.digests)
            while wait([loading], timeout=0.5).not_done:
                self.notify()
        return loading.result()

    def _tick(self) -> None:
        self.notify()
        if not self.listens:
            self._announce(self.settings)
        if os.getppid() != self.ppid:  # the master is gone, and nobody would stop this process any more
            shutil.rmtree(self.app.folder, ignore_errors=True)
            self._stop()
            signal.alarm(ORPHAN_SECONDS)  # ends the process, whatever it is at

    def _announce(self, settings: Settings) -> None:
        """Note that this worker listens; log it if it takes the place of another, and when all do."""
        self.listens = self.booted = True
        (self.app.ready / str(self.pid)).touch()
        if self.age > settings.workers:
            get_logger().info("worker serves again", pid=self.pid)
        if len(os.listdir(self.app.ready)) == settings.workers:
            get_logger().info("serving", host=settings.host, port=settings.port, workers=settings.workers)

    def _stop(self, *_signal: object) -> None:
        self.server.should_exit = True
