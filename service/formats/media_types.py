"""Media types that the API reads and writes (RFC 9110, 8.3.1)."""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import UnsupportedMediaType

JSON, NPY, OCTETS, MULTIPART, CSV = (
    "application/json",
    "application/x-npy",
    "application/octet-stream",
    "multipart/form-data",
    "text/csv",
)
PNG, JPEG, GIF, WEBP = "image/png", "image/jpeg", "image/gif", "image/webp"

IMAGE_INPUTS = (PNG, JPEG, WEBP)
"""Media types of the encoded images that the API reads."""
INPUTS = (*IMAGE_INPUTS, MULTIPART, NPY, JSON, OCTETS)
"""Media types of request bodies that a model of images accepts."""
WHOLE_IMAGE_INPUTS = (*IMAGE_INPUTS, MULTIPART, NPY, JSON)
"""Media types of request bodies that a model of tiles accepts."""
TABLE_INPUTS = (JSON, NPY, CSV)
"""Media types of request bodies that a model of vectors or signals accepts."""
PICTURES = (PNG, GIF, WEBP)
"""Media types of pictures that the API draws; only models of images have them."""


ALIASES = {
    "image/jpg": JPEG,
    "image/pjpeg": JPEG,
    "image/x-png": PNG,
    "image/apng": PNG,
    "application/npy": NPY,
    "application/x-numpy": NPY,
    "text/json": JSON,
    "application/csv": CSV,
    "text/x-csv": CSV,
}
"""Names that clients write for media types that the API reads, and the types that they mean."""


def media_type(content_type: str) -> str:
    """Return the media type of a Content-Type header in lower case, without its parameters, by its usual name."""
    name = content_type.partition(";")[0].strip().lower()
    return ALIASES.get(name, name)


def accepted_media_type(content_type: str, accepted: Sequence[str]) -> str:
    """Return the media type of a Content-Type header, one of those ``accepted``.

    Raises:
        UnsupportedMediaType: it is none of them; the text lists them.
    """
    kind = media_type(content_type)
    if kind not in accepted:
        raise UnsupportedMediaType(f"Content-Type {kind[:80]!r}: one of {', '.join(accepted)} expected")
    return kind
