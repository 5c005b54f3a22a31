"""Heads of requests that were parsed once and answered by service.api.direct: the same bytes again ask for the same.

A client on a kept connection sends the same head over and over. To look its bytes up takes a tenth of the time that the
parser and its callbacks take to read them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

from service.inference.jobs import Again

MOST_KNOWN = 512
MOST_BYTES = 1024  # of a head
END = b"\r\n\r\n"
ID = b"x-request-id"  # is another with each request

P = TypeVar("P")


class Known(NamedTuple, Generic[P]):
    """What a head asks for, how many bytes its body has, and how a request with such a body goes on, if known."""

    plan: P
    size: int
    again: Again | None


class Heads(Generic[P]):
    """Heads by their bytes, those that were used last."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Known[P]] = OrderedDict()

    def find(self, data: bytes) -> tuple[Known[P], bytes] | None:
        """What is known of the head of ``data``, and its body, if it is one whole request with a known head."""
        end = data.find(END) + len(END)
        head = data[:end]
        known = self._known.get(head)
        if known is None or len(data) - end != known.size:
            return None
        self._known.move_to_end(head)
        return known, data[end:]

    def remember(self, data: bytes, plan: P, size: int, again: Again | None = None) -> None:
        """``data`` is one whole request with a body of that size; its connection stays.

        Not remembered is a head in which anything but whole line ends might end a line, or which may be told otherwise
        by the bytes before or behind it.
        """
        end = data.find(END) + len(END)
        head = data[:end]
        if len(data) - end != size or end > MOST_BYTES or not head.startswith((b"POST ", b"GET ")):
            return
        if head.count(b"\n") != head.count(b"\r\n") or ID in head.lower():
            return
        self._known[head] = Known(plan, size, again)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
