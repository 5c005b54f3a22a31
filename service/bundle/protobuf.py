"""The protobuf wire format (protobuf.dev/programming-guides/encoding), enough to inspect and extend a message.

Reading copies nothing and allocates nothing of a size that the message claims: a hostile file costs at most one pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class MalformedMessageError(ValueError):
    """The bytes are no protobuf message."""


class Field(NamedTuple):
    """One field as it stands on the wire: its number, wire type, and integer or bytes."""

    number: int
    wire_type: int
    integer: int
    payload: memoryview


EMPTY = memoryview(b"")


def fields(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message in their order. Raises MalformedMessageError, also for the obsolete groups."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise MalformedMessageError("field number 0")
        if wire_type == VARINT:
            value, at = _varint(message, at)
            yield Field(number, wire_type, value, EMPTY)
            continue
        if wire_type == BYTES:
            size, at = _varint(message, at)
        elif wire_type in (FIXED64, FIXED32):
            size = 8 if wire_type == FIXED64 else 4
        else:
            raise MalformedMessageError(f"wire type {wire_type} of field {number}")
        if size > len(message) - at:
            raise MalformedMessageError(f"field {number} wants {size} bytes, {len(message) - at} are left")
        yield Field(number, wire_type, 0, message[at : at + size])
        at += size


def encoded(number: int, payload: bytes) -> bytes:
    """Return a field of bytes, as it stands on the wire, of a number below 16."""
    size, length = len(payload), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | BYTES, *length, size]) + payload


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Read the base-128 integer at offset ``at``, of at most 10 bytes: the integer, and the offset after it."""
    if at < len(message) and message[at] < 0x80:  # nearly all are that short
        return message[at], at + 1
    value = 0
    for i in range(10):
        if at + i >= len(message):
            raise MalformedMessageError("the message ends inside a number")
        byte = message[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise MalformedMessageError("a number is longer than 10 bytes")
