"""One address for several processes (SO_REUSEPORT): each listens for itself, and the kernel spreads connections."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def claimed_address(host: str, port: int) -> Iterator[int]:
    """Hold that address for this service and yield its port; 0 stands for one that is free. Nothing listens yet.

    Of two services that start at one moment neither finds the other listening, and both can bind. So there is a lock: a
    name in Linux' abstract namespace, which is as wide as that of ports and forgets the names of the dead.
    Raises OSError where the address cannot be had.
    """
    for each in bind(host, port, shared=False):  # fails where somebody listens
        each.close()
    with ExitStack() as held:
        sockets = [held.enter_context(each) for each in bind(host, port, shared=True)]
        for each in sockets:
            address, port, *_ = each.getsockname()
            held.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0vaeserve {address} {port}")
        yield port


def bind(host: str, port: int, shared: bool) -> list[socket.socket]:
    """Return bound sockets, not listening, one for each address of ``host``; port 0 is one for all. Raises OSError."""
    resolved = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    with ExitStack() as opened:
        sockets = []
        for family, address in dict.fromkeys((family, address) for family, *_, address in resolved):
            if family == socket.AF_INET6 and not socket.has_dualstack_ipv6():
                continue
            sockets.append(opened.enter_context(socket.socket(family)))
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ended connections are no obstacle
            sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
            if family == socket.AF_INET6:
                sockets[-1].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sockets[-1].bind((address[0], port, *address[2:]))
            port = sockets[-1].getsockname()[1]
        opened.pop_all()  # they stay open
    return sockets
