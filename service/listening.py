"""Sockets of one address that several processes listen on: the kernel spreads connections over them (SO_REUSEPORT).

One socket shared by all would do otherwise: the first worker to wake takes all that wait, and a few lasting connections
may end up with one worker.
"""

from __future__ import annotations

import os
import socket


def bind_shared(host: str, port: int) -> list[socket.socket]:
    """Bound sockets, not listening yet, one for each address that ``host`` stands for; 0 is one free port for all.

    Raises OSError, in the words that asyncio has for it, where an address cannot be had.
    """
    sockets: list[socket.socket] = []
    try:
        for family, address in _addresses(host, port):
            chosen = sockets[0].getsockname()[1] if sockets else port
            sockets.append(_bind(family, (address[0], chosen, *address[2:]), shared=True))
    except OSError:
        for each in sockets:
            each.close()
        raise
    return sockets


def refuse_taken(host: str, port: int) -> None:
    """Raise OSError where somebody listens there. Shared sockets alone would quietly join another service's."""
    for family, address in _addresses(host, port):
        _bind(family, address, shared=False).close()


def _addresses(host: str, port: int) -> list[tuple[int, tuple]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    unique = dict.fromkeys((family, address) for family, _, _, _, address in found)
    return [(family, address) for family, address in unique if family != socket.AF_INET6 or _has_ipv6()]


def _has_ipv6() -> bool:
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True


def _bind(family: int, address: tuple, shared: bool) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended are no obstacle
        if shared:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        reason = os.strerror(error.errno or 0).lower()
        raise OSError(error.errno, f"error while attempting to bind on address {address!r}: {reason}") from None
    return made
