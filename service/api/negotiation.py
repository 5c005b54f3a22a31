"""Content negotiation: choose the media type of an answer by the Accept header of its request (RFC 9110, 12.5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from service.errors import NotAcceptable

MAX_CACHED_CHARACTERS = 128  # of an Accept header, so that long ones do not fill the cache


def negotiate(accept: str, offers: tuple[str, ...]) -> str:
    """Return the media type among ``offers`` with the highest quality in an Accept header; the first of equal ones.

    An empty header accepts anything.

    Raises:
        NotAcceptable: every offer has quality 0.
    """
    choose = _negotiate_cached if len(accept) <= MAX_CACHED_CHARACTERS else _negotiate
    return choose(accept, offers)


def _negotiate(accept: str, offers: Sequence[str]) -> str:
    if not accept.strip():
        return offers[0]
    ranges = [_parse(part) for part in accept.split(",") if part.strip()]
    qualities = [_quality(offer, ranges) for offer in offers]
    best = max(qualities)
    if best <= 0:
        raise NotAcceptable(f"Accept {accept[:200]!r} names nothing that this route answers: {', '.join(offers)}")
    return offers[qualities.index(best)]


_negotiate_cached = lru_cache(maxsize=256)(_negotiate)


def _parse(part: str) -> tuple[str, float]:
    """Split a member of an Accept header into its media range and its quality."""
    media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            return media_type, _parse_quality(value)
    return media_type, 1.0


def _parse_quality(text: str) -> float:
    """Read a quality from 0 to 1; other text counts as 0."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 <= value <= 1 else 0.0


def _quality(offer: str, ranges: Sequence[tuple[str, float]]) -> float:
    """Return the quality of the most specific media range that covers an offer, 0 if none does."""
    group = offer.split("/")[0] + "/*"
    for candidate in (offer, group, "*/*"):
        qualities = [quality for media_type, quality in ranges if media_type == candidate]
        if qualities:
            return max(qualities)
    return 0.0
