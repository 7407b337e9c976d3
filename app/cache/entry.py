"""What is kept of an answer, as bytes that say whether they are whole and whether they belong where they were found."""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import Struct

from app.core import Usage

MAX_ENTRY_BYTES = 1_048_576
"""An answer beyond this is not kept, and not followed by others: memory is bounded by the answers under way."""
_SEAL_BYTES = 8
_encode = msgspec.msgpack.encode


class Entry(Struct, frozen=True, array_like=True):
    """An answer: `body` as a whole in the client's dialect, by which `model` at which `provider`, when (unix seconds).

    `question` is the last user turn's text where the mode is a semantic one; `tags` the documents that the answer comes
    from, each with its epoch then.
    """

    body: bytes
    provider: str | None
    model: str | None
    usage: Usage
    kept_at: float
    question: str = ""
    tags: dict[str, str] = {}


_decoder = msgspec.msgpack.Decoder(Entry)


def sealed(key: str, entry: Entry) -> bytes:
    """The entry's bytes for `key`."""
    content = _encode(entry)
    return _seal(key, content) + content


def opened(key: str, data: bytes) -> Entry | None:
    """The entry; None where the bytes are damaged, or were written for another key: then it is none of the caller's."""
    content = data[_SEAL_BYTES:]
    if data[:_SEAL_BYTES] != _seal(key, content):
        return None
    try:
        return _decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _seal(key: str, content: bytes) -> bytes:
    """Against damage and mix-ups; who can write to Redis can forge it."""
    return hashlib.sha256(b"%b\0%b" % (key.encode(), content)).digest()[:_SEAL_BYTES]
