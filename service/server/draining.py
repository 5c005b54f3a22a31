"""The process around the app: uvicorn with guarded headers, and a drain window on SIGTERM."""

from __future__ import annotations

import gc
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from service.deferred import flush_all
from service.server.balance import Balance, balanced_protocol
from service.server.limits import LimitedProtocol
from service.settings import Settings

TICKS = 10  # of uvicorn a second


YOUNG_OBJECTS = 5_000  # between collections of the youngest; by default 700


class DrainingServer(uvicorn.Server):
    """On SIGTERM readiness goes false first and requests are served on for the drain window; then it stops.

    uvicorn alone closes its socket at once, and a load balancer that has not noticed yet loses requests.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        drain_seconds: float,
        on_listening: Callable[[], None] | None = None,
        on_second: Callable[[], None] | None = None,
        balance: Balance | None = None,
    ) -> None:
        super().__init__(config)
        self._house_app = app
        self._drain_seconds = drain_seconds
        self._stop_at: float | None = None
        self._on_listening, self._on_second = on_listening, on_second
        self._balance = balance

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, then listen, then say so."""
        await super().startup(sockets)
        if self._balance is not None:
            self._balance.open(self.server_state.connections, self._protocol)
        if self._on_listening is not None:
            self._on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which ends the connections that there are: more must not be handed over to it."""
        if self._balance is not None:
            self._balance.close()
        try:
            await super().shutdown(sockets)
        finally:
            flush_all()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain on the first SIGTERM; everything else stops at once."""
        if sig == signal.SIGTERM and self._stop_at is None:
            self.drain()
        else:
            super().handle_exit(sig, frame)

    def drain(self) -> None:
        """Say "not ready" from now on, and stop after the drain window."""
        context = getattr(self._house_app.state, "context", None)
        if context is not None:  # it has started
            context.draining = True
        if self._balance is not None:
            self._balance.leave()
        self._stop_at = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """True when the server should stop (asked by uvicorn TICKS times a second)."""
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        if counter % TICKS == 0 and self._on_second is not None:
            self._on_second()
        return await super().on_tick(counter)

    def _protocol(self) -> Any:
        """What uvicorn makes for each connection that it accepts."""
        protocol: Any = self.config.http_protocol_class
        return protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def spare_collections() -> None:
    """Leave what stands by now out of garbage collections, and have fewer of them.

    It lives as long as the process, and looking all of it over takes 50 ms with two models, in which no request is
    answered. Requests under way hold more objects than the interpreter expects between two collections.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def build_server(
    app: FastAPI,
    settings: Settings,
    on_listening: Callable[[], None] | None = None,
    on_second: Callable[[], None] | None = None,
    balance: Balance | None = None,
) -> DrainingServer:
    """A server for ``app`` on settings.host:port; ``run()`` it, or ``serve()`` it in a loop of yours.

    ``on_listening`` is called once it listens, ``on_second`` from its event loop every second from then on;
    ``balance`` evens out the connections of several such servers.
    """
    protocol = partial(LimitedProtocol, settings, app.state.budget)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol if balance is None else balanced_protocol(protocol, balance),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,  # service.logs has configured the root logger
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(settings.request_timeout) + 1,
    )
    return DrainingServer(config, app, settings.drain_seconds, on_listening, on_second, balance)
