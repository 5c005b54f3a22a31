"""Media types that the API reads and writes (RFC 9110, 8.3.1)."""

from __future__ import annotations

JSON, NPY, OCTETS, MULTIPART = (
    "application/json",
    "application/x-npy",
    "application/octet-stream",
    "multipart/form-data",
)
PNG, JPEG, GIF, WEBP = "image/png", "image/jpeg", "image/gif", "image/webp"

IMAGE_INPUTS = (PNG, JPEG, WEBP)
"""Encoded images that are read."""
INPUTS = (*IMAGE_INPUTS, MULTIPART, NPY, JSON, OCTETS)
"""What the body of a request to a model of images may be."""
PICTURES = (PNG, GIF, WEBP)
"""What rows are drawn as; only rows of a model of images are."""


def media_type(content_type: str) -> str:
    """The media type of a Content-Type header, in lower case, without its parameters."""
    return content_type.partition(";")[0].strip().lower()
