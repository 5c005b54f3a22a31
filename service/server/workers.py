"""Several processes that serve the same bundles on the same port: gunicorn starts, watches, restarts and stops them.

The master holds the address and, if a fork can share them, the loaded bundles; it does not listen. Workers listen
themselves, and leave their metrics and a file that says so in one folder. They never talk to each other.
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
from service.bundle.files import Digests, check_digests
from service.calibration.drift_monitor import Drift
from service.errors import VaeserveError
from service.logs import configure_logs, get_logger
from service.repository.model_repository import ModelRepository, load_repository
from service.resources import freeze_gc, threads_of_process
from service.server.address import bind
from service.server.draining import DrainingServer
from service.settings import Settings

FIRST_WAIT, MAX_WAIT = 0.1, 30.0  # seconds until what could not start is tried again; doubled with each failure
LATE_SECONDS = 5  # that the master waits longer for a worker to end than the worker may take
ORPHAN_SECONDS = 5  # for the requests in progress of a worker whose master was killed
FAILED, FAILED_FOR_ALL = 1, 3  # exit codes of a worker; by the latter, gunicorn's WORKER_BOOT_ERROR, the master ends


class Application(BaseApplication):
    """The application that gunicorn runs, and what its workers share.

    ``folder`` is for files of all workers, ``digests`` are those of the bundles to serve; ``repository`` has these
    bundles loaded, or is None if each worker is to load them itself.
    """

    def __init__(self, settings: Settings, folder: Path, digests: Digests, repository: ModelRepository | None) -> None:
        self.settings, self.folder, self.digests, self.repository = settings, folder, digests, repository
        self.ready = folder / "ready"  # with a file for each worker that listens, named by its process id
        self.ready.mkdir(exist_ok=True)
        super().__init__()
        self.callable = self  # what gunicorn would load; the bundles are loaded already

    def load_config(self) -> None:
        settings, cfg = self.settings, self.cfg
        cfg.set("bind", [])  # a worker listens itself, once it is ready
        cfg.set("workers", settings.workers)
        cfg.set("worker_class", UvicornWorker)
        cfg.set("worker_tmp_dir", str(self.folder))
        cfg.set("preload_app", True)
        cfg.set("timeout", math.ceil(settings.hang_timeout))
        cfg.set("graceful_timeout", math.ceil(settings.drain_seconds + settings.request_timeout) + LATE_SECONDS)
        cfg.set("control_socket_disable", True)
        cfg.set("logger_class", RootLogger)
        cfg.set("pre_fork", self.pre_fork)
        cfg.set("child_exit", self.child_exit)

    def pre_fork(self, arbiter: Arbiter, worker: UvicornWorker) -> None:
        """Number the worker; give it the loaded bundles unless another thread may hold a lock as the process forks."""
        taken = {other.number for other in arbiter.WORKERS.values()}
        worker.number = min(set(range(len(taken) + 1)) - taken)
        threads = 1 if self.repository is None else threads_of_process()
        worker.repository = self.repository if threads == 1 else None
        if threads > 1:
            get_logger().warning("workers share no memory", reason=f"{threads} threads in the master")

    def child_exit(self, arbiter: PatientArbiter, worker: UvicornWorker) -> None:
        """Take an ended worker out of the metrics; have the next one wait if this one has never listened."""
        mark_process_dead(worker.pid, str(self.folder))
        ready = self.ready / str(worker.pid)
        seconds = arbiter.back_off(failed=not ready.exists())
        ready.unlink(missing_ok=True)
        get_logger().info("worker ended", worker=worker.number, pid=worker.pid, hung=worker.aborted, wait=seconds)


class PatientArbiter(Arbiter):
    """gunicorn's master; it tries again ever later to start what cannot start, while the workers that serve go on."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)  # others end it, as they end any process
    retry_seconds = retry_at = 0.0

    def back_off(self, failed: bool) -> float:
        """Set, and return, the seconds that the next worker waits: twice the last ones after a failure, else 0."""
        self.retry_seconds = min(max(FIRST_WAIT, 2 * self.retry_seconds), MAX_WAIT) if failed else 0.0
        self.retry_at = time.monotonic() + self.retry_seconds
        return self.retry_seconds

    def spawn_worker(self) -> None:
        """Start a worker unless it has to wait; gunicorn calls this again every second."""
        if time.monotonic() < self.retry_at:
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)  # or the worker would take them as this process does
        try:
            super().spawn_worker()
        except OSError as error:  # no process, memory or file is to be had
            get_logger().error("worker not started", reason=str(error), wait=self.back_off(failed=True))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)

    def kill_worker(self, pid: int, sig: int) -> None:
        """Kill a worker that hangs: gunicorn's SIGABRT would dump core, and a stopped process would not heed it."""
        super().kill_worker(pid, signal.SIGKILL if sig == signal.SIGABRT else sig)

    def stop(self, graceful: bool = True) -> None:
        self.WORKER_BOOT_ERROR = -1  # no exit code: a worker that cannot start is no reason to stop once more
        super().stop(graceful)


class RootLogger(Logger):
    """Hands gunicorn's warnings and errors to the root logger, which service.logs has configured."""

    def setup(self, cfg: object) -> None:
        self.cfg, self.error_log.propagate = cfg, True
        self.error_log.setLevel("WARNING")  # the rest our own lines say


class UvicornWorker(Worker):
    """A process that serves by uvicorn, and listens itself once its app has started; no other has its ``number``."""

    def init_process(self) -> None:
        """Notify the master before anything else: a worker that has never done so may hang for ever."""
        self.notify()
        self._note_boot()
        os.setpgid(0, 0)  # a terminal's Ctrl-C is for the master
        with suppress(OSError):  # where /proc is read-only
            Path("/proc/self/comm").write_text(f"worker {self.number}")  # what lists of processes call it
        self.settings, self.listens = self.app.settings, False
        configure_logs(self.settings.log_level, self.settings.log_format, worker=self.number)
        get_logger().info("worker started", pid=self.pid)
        super().init_process()

    def init_signals(self) -> None:
        """End at once on a signal, until uvicorn handles those that it knows."""
        for signum in self.SIGNALS:
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGQUIT, lambda *_: os._exit(0))  # the default leaves a core dump
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PatientArbiter.SIGNALS)

    def run(self) -> None:
        """Serve until told to stop. A worker that cannot start ends the whole service only if no other listens."""
        settings = self.settings
        self._note_boot()
        try:
            check_digests(settings.repository, self.app.digests)  # all workers serve the same bundles
            drift = Drift(settings.drift_window, settings.drift_level, settings.workers, self.number)
            app = create_app(settings, self.repository or self._load(), Metrics(self.app.folder), drift)
            self.server = DrainingServer(app, settings, self._tick)
            freeze_gc()
            signal.signal(signal.SIGQUIT, self.server.handle_exit)
            self.server.run(bind(settings.host, settings.port, shared=True))
        except (VaeserveError, OSError, SystemExit) as error:  # the last is uvicorn's
            get_logger().error(
                "worker failed" if self.listens else "worker not started", pid=self.pid, reason=str(error)
            )
            sys.exit(FAILED if os.listdir(self.app.ready) else FAILED_FOR_ALL)

    def _note_boot(self) -> None:
        """Have gunicorn take an error for that of all workers, and end, only where no other worker listens.

        Its own ``init_process`` calls a worker booted before ``run``; then workers that all fail would start for ever.
        """
        self.booted = bool(os.listdir(self.app.ready))

    def _load(self) -> ModelRepository:
        """Load the bundles on a thread, since that may take longer than a worker may hang."""
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load_repository, self.settings, self.app.digests)
            while wait([loading], timeout=0.5).not_done:
                self.notify()
        return loading.result()

    def _tick(self) -> None:
        """Notify the master; at first announce that this worker listens; end if the master is gone."""
        settings = self.settings
        self.notify()
        if not self.listens:
            self.listens = self.booted = True
            (self.app.ready / str(self.pid)).touch()
            if self.age > settings.workers:
                get_logger().info("worker serves again", pid=self.pid)
            if len(os.listdir(self.app.ready)) == settings.workers:
                get_logger().info("serving", host=settings.host, port=settings.port, workers=settings.workers)
        if os.getppid() != self.ppid:  # nobody would stop this process any more
            shutil.rmtree(self.app.folder, ignore_errors=True)
            self.server.should_exit = True
            if not signal.getitimer(signal.ITIMER_REAL)[0]:  # ticks go on until all requests are answered
                signal.alarm(ORPHAN_SECONDS)  # ends the process, whatever it is at
