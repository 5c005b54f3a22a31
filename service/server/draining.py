"""uvicorn around the app: connections with limits, and a drain window on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.deferred import flush_all
from service.server.limits import LimitedProtocol
from service.settings import Settings

CLOSE = (b"connection", b"close")
LAST_REQUESTS_SECONDS = 0.2  # in which requests may still arrive on connections that were accepted before the end
TICK_SECONDS = 0.5
OPTIONS: dict[str, Any] = {"ws": "none", "lifespan": "on", "server_header": False, "proxy_headers": False}
OPTIONS |= {"log_config": None, "access_log": False}  # service.logs has configured the root logger


class DrainingServer(uvicorn.Server):
    """Serves ``app`` on settings.host:port, and calls ``tick`` ten times a second, at first as soon as it listens.

    On SIGTERM readiness goes false first and requests are served on for the drain window; uvicorn alone would close its
    socket at once, before a load balancer has noticed. It would also close kept connections on which a request may be
    on its way: so every answer in the drain window says that its connection closes.
    """

    def __init__(self, app: FastAPI, settings: Settings, tick: Callable[[], None] = lambda: None) -> None:
        options = {**OPTIONS, "timeout_graceful_shutdown": int(settings.request_timeout) + 1}
        options["timeout_keep_alive"] = settings.keep_alive_timeout
        if settings.trusted_proxies:
            options |= {"proxy_headers": True, "forwarded_allow_ips": settings.trusted_proxies}
        options["http"] = partial(LimitedProtocol, settings, app.state.budget)
        super().__init__(uvicorn.Config(app, settings.host, settings.port, **options))
        self._app_state, self._drain_seconds, self._tick = app.state, settings.drain_seconds, tick
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Begin to drain on the first SIGTERM; stop at once on any other signal, and on the second SIGTERM."""
        if sig == signal.SIGTERM and self._stop_at is None:
            self._stop_at = time.monotonic() + self._drain_seconds
            self._app_state.draining = True
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Return True if the server is to stop."""
        self._tick()
        ends = await super().on_tick(counter)
        if self._stop_at is None:
            return ends
        headers = self.server_state.default_headers
        self.server_state.default_headers = headers if CLOSE in headers else [*headers, CLOSE]
        return ends or time.monotonic() >= self._stop_at

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, let requests arrive on accepted connections, end these, and write what is deferred."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(LAST_REQUESTS_SECONDS)
        ending = asyncio.create_task(super().shutdown(sockets))
        while not ending.done():
            self._tick()
            await asyncio.wait([ending], timeout=TICK_SECONDS)
        flush_all()
        ending.result()  # raises what the task has raised
