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

    word: bytes
    pattern: re.Pattern[bytes]
    byte: bytes
    there: re.Pattern[bytes]


_URL = Mark(b";base64,", re.compile(rb";base64,"), b";", re.compile(rb";base64,"))
_DATA = Mark(
    b'"data"',
    re.compile(rb'"data"\s*:\s*"(?=[A-Za-z0-9+/\\]{256})'),
    b":",
    re.compile(rb'(?:(?<="data")|(?<="data" )):\s*"(?=[A-Za-z0-9+/\\]{256})'),
)
_CACHE = Mark(b'"cache_control"', re.compile(rb'"cache_control"'), b"_", re.compile(rb'(?<="cache)_control"'))


def size(body: bytes) -> tuple[int, int]:
    """Bytes of a request without what is base64 in it, and how many such parts there are.

    Those stand in data URLs (OpenAI's images and files), or as `data` (its audio, all of Anthropic's).
    """
    text_bytes, blobs = len(body), 0
    short = text_bytes < LONG_BYTES
    if short and body.find(_URL.word) == -1 and body.find(_DATA.word) == -1:
        return text_bytes, 0
    for mark in (_URL, _DATA):
        found = mark.pattern.search(body) if short else _search(mark, body, 0)
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
    return body.find(_CACHE.word) != -1 if len(body) < LONG_BYTES else _search(_CACHE, body, 0) is not None


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
