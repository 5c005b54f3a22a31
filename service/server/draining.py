"""uvicorn around the app: connections with limits, and a drain window on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.deferred import flush_all
from service.server.limits import LimitedProtocol
from service.settings import Settings

CLOSE = (b"connection", b"close")
LINGER_SECONDS = 0.2
TICK_SECONDS = 0.5


class DrainingServer(uvicorn.Server):
    """Serves ``app`` on settings.host:port; ``run()`` it, or ``serve()`` it in a loop of yours.

    On SIGTERM readiness goes false first and requests are served on for the drain window; then it stops. uvicorn alone
    closes its socket at once, and a load balancer that has not noticed yet loses requests. It also closes kept
    connections on which a request may be on its way: so every answer in the drain window says that its connection
    closes. The function ``tick`` is called ten times a second, at first as soon as the server listens.
    """

    def __init__(self, app: FastAPI, settings: Settings, tick: Callable[[], None] = lambda: None) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            http=partial(LimitedProtocol, settings, app.state.budget),  # type: ignore[arg-type]
            ws="none",
            lifespan="on",
            log_config=None,  # service.logs has configured the root logger
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(settings.request_timeout) + 1,
        )
        super().__init__(config)
        self._state, self._drain_seconds, self._tick = app.state, settings.drain_seconds, tick
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain on the first SIGTERM; everything else stops at once."""
        if sig == signal.SIGTERM and self._stop_at is None:
            self._stop_at = time.monotonic() + self._drain_seconds
            if hasattr(self._state, "context"):  # the app has started
                self._state.context.draining = True
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Return True when the server should stop."""
        self._tick()
        ends = await super().on_tick(counter)
        if self._stop_at is None:
            return ends
        headers = self.server_state.default_headers
        self.server_state.default_headers = headers if CLOSE in headers else [*headers, CLOSE]
        return ends or time.monotonic() >= self._stop_at

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, let requests arrive on what was accepted, end, and write what waits to be written."""
        for server in self.servers:
            server.close()
        ticking = asyncio.create_task(self._keep_ticking())
        await asyncio.sleep(LINGER_SECONDS)
        try:
            await super().shutdown(sockets)
        finally:
            ticking.cancel()
            flush_all()

    async def _keep_ticking(self) -> None:
        while True:
            self._tick()
            await asyncio.sleep(TICK_SECONDS)
