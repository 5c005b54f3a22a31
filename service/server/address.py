"""One address for several processes (SO_REUSEPORT): each listens for itself, and the kernel spreads connections."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def claimed_address(host: str, port: int) -> Iterator[int]:
    """Hold an address for this service, without listening, and yield its port; port 0 stands for a free one.

    Of two services that start at one moment neither finds the other listening, and both can bind. So there is a lock, a
    name in Linux' abstract namespace, which ends with its process. Raises OSError if the address cannot be had.
    """
    for unshared in bind(host, port, shared=False):  # fails if somebody listens
        unshared.close()
    with ExitStack() as held:
        for claim in [held.enter_context(claim) for claim in bind(host, port, shared=True)]:
            address, port, *_ = claim.getsockname()
            held.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0vaeserve {address} {port}")
        yield port


def bind(host: str, port: int, shared: bool) -> list[socket.socket]:
    """Return bound sockets, not listening, one for each address of ``host``; port 0 is one for all. Raises OSError."""
    family = socket.AF_UNSPEC if socket.has_dualstack_ipv6() else socket.AF_INET
    resolved = socket.getaddrinfo(host or None, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets = []
    with ExitStack() as opened:
        for family, address in dict.fromkeys((family, address) for family, *_, address in resolved):
            sockets.append(opened.enter_context(socket.socket(family)))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ended connections are no obstacle
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind((address[0], port, *address[2:]))
            port = sockets[-1].getsockname()[1]
        opened.pop_all()  # they stay open
    return sockets
