"""Sockets of one address that several processes listen on: the kernel spreads connections over them (SO_REUSEPORT).

One socket shared by all would do otherwise: the first worker to wake takes all that wait, and a few lasting connections
may end up with one worker. What the kernel's hash leaves uneven, service/server/balance.py evens out.
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


def claim(sockets: list[socket.socket]) -> list[socket.socket]:
    """Locks on the addresses of these sockets, for as long as they are open: one service may have each.

    Two that start at the same moment find nobody listening yet, and SO_REUSEPORT lets both bind. A lock is a name in
    Linux' abstract namespace, which is as wide as that of ports and forgets the names of the dead. An address and the
    wildcard that covers it have different names. Raises OSError, in the words of ``bind_shared``.
    """
    locks: list[socket.socket] = []
    try:
        for each in sockets:
            locks.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            address = each.getsockname()
            try:
                locks[-1].bind(f"\0vaeserve {address[0]} {address[1]}")
            except OSError as error:
                raise _in_words(address, error) from None
    except OSError:
        for lock in locks:
            lock.close()
        raise
    return locks


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
        raise _in_words(address, error) from None
    return made


def _in_words(address: tuple, error: OSError) -> OSError:
    reason = os.strerror(error.errno or 0).lower()
    return OSError(error.errno, f"error while attempting to bind on address {address!r}: {reason}")
