"""How large a prompt is before anybody has counted its tokens."""

from __future__ import annotations

import re

from msgspec import Struct

BYTES_PER_TOKEN = 4
"""What a token is taken to be where no vendor has counted yet (OpenAI's rule of thumb for English)."""
BLOB_TOKENS = 1024
"""What an image or file inside a request is taken to be: base64 is not text, so its length says nothing."""

MOST_BLOBS = 10_000
"""More than any vendor takes. What is beyond counts as text: a body made of nothing but their beginnings would hold up
the loop for seconds."""
LONG_BYTES = 8_192
HOPS = 32
"""A long text is looked through from one rare byte to the next: 100 KB take 1 us where there is none, and with a
pattern 27 us. After so many that were none, the rest is left to that. In a short one `find` is twice as fast as it."""


class Mark(Struct, frozen=True):
    """What is looked for: a pattern, and one that holds from `byte` on; that and `word` stand in each of its places."""

    pattern: re.Pattern[bytes]
    word: bytes
    byte: bytes
    there: re.Pattern[bytes]

    def first(self, body: bytes) -> re.Match[bytes] | None:
        """Where it stands first."""
        if len(body) >= LONG_BYTES:
            return _search(self, body, 0)
        return None if body.find(self.word) == -1 else self.pattern.search(body)


_URL = Mark(re.compile(rb";base64,"), b";base64,", b";", re.compile(rb";base64,"))
_DATA = Mark(
    re.compile(rb'"data"\s*:\s*"(?=[A-Za-z0-9+/\\]{256})'),
    b'"data"',
    b":",
    re.compile(rb'(?:(?<="data")|(?<="data" )):\s*"(?=[A-Za-z0-9+/\\]{256})'),
)
_CACHE = Mark(re.compile(rb'"cache_control"'), b'"cache_control"', b"_", re.compile(rb'(?<="cache)_control"'))


def size(body: bytes) -> tuple[int, int]:
    """Bytes of a request without what is base64 in it, and how many such parts there are.

    Those stand in data URLs (OpenAI's images and files), or as `data` (its audio, all of Anthropic's).
    """
    text_bytes, blobs = len(body), 0
    for mark in (_URL, _DATA):
        found = mark.first(body)
        while found is not None and blobs < MOST_BLOBS:
            end = body.find(b'"', found.end())
            if end == -1:
                break
            text_bytes -= end - found.end()
            blobs += 1
            found = _search(mark, body, end)
    return text_bytes, blobs


def marks_cache(body: bytes) -> bool:
    """Whether a request may ask for its prompt to be cached."""
    return _CACHE.first(body) is not None


def _search(mark: Mark, body: bytes, at: int) -> re.Match[bytes] | None:
    for _ in range(HOPS):
        at = body.find(mark.byte, at)
        if at == -1:
            return None
        if (found := mark.there.match(body, at)) is not None:
            return found
        at += 1
    return mark.pattern.search(body, at)


def tokens(body: bytes) -> int:
    """About how many tokens a prompt has."""
    text_bytes, blobs = size(body)
    return text_bytes // BYTES_PER_TOKEN + 1 + blobs * BLOB_TOKENS
