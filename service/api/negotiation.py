"""Which of the media types that a route can answer the caller's Accept header prefers (RFC 9110, 12.5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from service.errors import NotAcceptable

MOST_KNOWN = 128  # characters of an Accept that is remembered


def negotiate(accept: str, offers: tuple[str, ...]) -> str:
    """The offer with the highest quality; among equals the earliest offer. No header accepts anything.

    Raises:
        NotAcceptable: every offer has quality 0.
    """
    return _known(accept, offers) if len(accept) <= MOST_KNOWN else _negotiate(accept, offers)


def _negotiate(accept: str, offers: Sequence[str]) -> str:
    if not accept.strip():
        return offers[0]
    ranges = [_parse(part) for part in accept.split(",") if part.strip()]
    qualities = [_quality(offer, ranges) for offer in offers]
    best = max(qualities)
    if best <= 0:
        raise NotAcceptable(f"Accept {accept[:200]!r} names nothing that this route answers: {', '.join(offers)}")
    return offers[qualities.index(best)]


_known = lru_cache(maxsize=256)(_negotiate)


def _parse(part: str) -> tuple[str, float]:
    media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            return media_type, _number(value)
    return media_type, 1.0


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 <= value <= 1 else 0.0


def _quality(offer: str, ranges: Sequence[tuple[str, float]]) -> float:
    """Quality of the most specific range that covers the offer."""
    group = offer.split("/")[0] + "/*"
    for candidate in (offer, group, "*/*"):
        found = [q for media_type, q in ranges if media_type == candidate]
        if found:
            return max(found)
    return 0.0
