"""A worker: one of several processes that serve the same bundles on the same port.

service/server/supervisor.py starts and ends it, service/server/nursery.py forks it.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from pathlib import Path

import orjson

from service.api.app import create_app
from service.api.metrics import Metrics
from service.bundle.files import bundle_digests
from service.errors import BundleIntegrityError, VaeserveError
from service.inference.spare import SpareCpus
from service.logs import configure_logs, get_logger
from service.repository.model_repository import ModelRepository, load_repository
from service.server.address import bind_shared
from service.server.balance import Balance
from service.server.channel import MOST_BYTES, WorkerLine
from service.server.draining import DrainingServer, build_server, spare_collections
from service.server.nursery import name_process
from service.server.shared_drift import ToldDrift
from service.settings import Settings

ORPHAN_SECONDS = 5.0  # for the requests in progress of a worker whose supervisor was killed
FAILED = 1


def main(descriptor: int) -> None:
    """As ``serve``, with nothing loaded yet; ``descriptor`` is that of the line."""
    serve(socket.socket(fileno=descriptor), None)


def serve(end: socket.socket, repository: ModelRepository | None) -> None:
    """Serve until told to stop, or until the supervisor is gone.

    ``end`` is this end of the line; the orders come first over it: settings, number of the worker, folder of the
    metrics, digests of the bundles by NAME/VERSION. ``repository`` holds the bundles, unless they are to be loaded.
    """
    data = end.recv(MOST_BYTES)
    if not data:
        return
    worker = Worker(orjson.loads(data), end, repository)
    try:
        worker.run()
    except KeyboardInterrupt:
        pass  # uvicorn hands on the signal that has ended it
    except VaeserveError as error:
        worker.line.tell({"kind": "failed", "text": str(error)})
        sys.exit(FAILED)
    except OSError as error:
        worker.line.tell({"kind": "failed", "text": str(error)})
        raise


class Worker:
    """What its orders say, its line to the supervisor, and the server once it is built."""

    def __init__(self, orders: dict, end: socket.socket, repository: ModelRepository | None) -> None:
        self.settings = Settings(**orders["settings"])
        self.folder = Path(orders["metrics"])
        self.bundles: dict[str, str] = orders["bundles"]
        self.line = WorkerLine(end)
        self.repository = repository
        self.server: DrainingServer | None = None
        self.orphaned = False
        self.number: int = orders["worker"]
        name_process(f"worker {self.number}")
        configure_logs(self.settings.log_level, self.settings.log_format, worker=self.number)

    def run(self) -> None:
        """Load the bundles unless they are, then listen, then say so; until the end.

        Raises:
            BundleError, ConfigurationError, DeviceUnavailable: see load_repository.
            BundleIntegrityError: a bundle is another than when the service started.
            OSError: the address cannot be had.
        """
        self.line.listen(self._end_soon)
        self._check_bundles()
        metrics = Metrics(self.folder)
        settings = self.settings
        drift = ToldDrift(self.line, settings.drift_window, settings.drift_level, metrics.unwatched.inc)
        repository = self.repository or load_repository(settings, self.bundles)
        assert isinstance(settings.workers, int)
        self._share_cpus(repository.runtime.spare, settings.workers)
        app = create_app(settings, repository, metrics, drift)
        balance = Balance(self.folder, self.number, settings.workers)
        self.server = build_server(app, settings, self._ready, self._alive, balance)
        spare_collections()
        self.server.run(bind_shared(settings.host, settings.port))
        if self.orphaned:
            self._clean_up()

    def _share_cpus(self, spare: SpareCpus, workers: int) -> None:
        """Where no file is to be had, every worker keeps to its own, and the log says so."""
        try:
            spare.join(self.folder / "cpus", self.number, workers)
        except OSError as error:
            get_logger().warning("idle CPUs are not lent", reason=str(error))

    def _ready(self) -> None:
        self.line.tell({"kind": "ready"})

    def _alive(self) -> None:
        self.line.tell({"kind": "alive"})

    def _check_bundles(self) -> None:
        """All workers serve the same: one that is started later must not find other bundles than the first did."""
        found = bundle_digests(self.settings.repository)
        for place, digest in self.bundles.items():
            if found.get(place) != digest:
                raise BundleIntegrityError(f"{place} has changed since the service was started: start it anew")

    def _end_soon(self) -> None:
        """The supervisor is gone, and nobody would stop this process any more."""
        self.orphaned = True
        if self.server is not None:
            self.server.should_exit = True
            time.sleep(ORPHAN_SECONDS)  # on a daemon's thread: the process may end meanwhile
        self._clean_up()
        os._exit(FAILED)

    def _clean_up(self) -> None:
        """What the supervisor would have done."""
        shutil.rmtree(self.folder, ignore_errors=True)
