"""AWS's binary event stream, written: what ConverseStream answers in.

A message is its length, the length of its headers and a CRC of these two, then the headers, the payload and a CRC of
all before it. Source: AWS, "Event stream encoding" (`application/vnd.amazon.eventstream`).
"""

from __future__ import annotations

import struct
from zlib import crc32

_STRING = 7
_PRELUDE_BYTES = 12
_CRC_BYTES = 4


def message(headers: dict[str, str], payload: bytes) -> bytes:
    """One whole message. A header name is at most 255 bytes."""
    head = b"".join(
        struct.pack("!B", len(name)) + name + struct.pack("!BH", _STRING, len(value)) + value
        for name, value in ((name.encode(), value.encode()) for name, value in headers.items())
    )
    lengths = struct.pack("!II", _PRELUDE_BYTES + len(head) + len(payload) + _CRC_BYTES, len(head))
    checked = lengths + struct.pack("!I", crc32(lengths)) + head + payload
    return checked + struct.pack("!I", crc32(checked))


def event(kind: str, payload: bytes) -> bytes:
    return message({":event-type": kind, ":content-type": "application/json", ":message-type": "event"}, payload)


def exception(kind: str, payload: bytes) -> bytes:
    return message(
        {":exception-type": kind, ":content-type": "application/json", ":message-type": "exception"}, payload
    )
