"""How large a prompt is before anybody has counted its tokens."""

from __future__ import annotations

import re

BYTES_PER_TOKEN = 4
"""What a token is taken to be where no vendor has counted yet (OpenAI's rule of thumb for English)."""
BLOB_TOKENS = 1024
"""What an image or file inside a request is taken to be: base64 is not text, so its length says nothing."""

_DATA = re.compile(rb'"data"\s*:\s*"(?=[A-Za-z0-9+/\\]{256})')
"""Compiled, since all of a long prompt is searched: `bytes.find` takes twice as long for such a word."""
LONG_BYTES = 8_192
HOPS = 64
"""A word whose first byte is rare in texts is looked for from one such byte to the next: 100 KB take 1 us if there is
none, and a pattern or `bytes.find` 30 to 50. After so many that were none, the rest is left to that."""


def size(body: bytes) -> tuple[int, int]:
    """Bytes of a request without what is base64 in it, and how many such parts there are.

    Those stand in data URLs (OpenAI's images and files), or as `data` (its audio, all of Anthropic's).
    """
    text_bytes, blobs = len(body), 0
    for next_blob in (_url, _data):
        start = next_blob(body, 0)
        while start != -1:
            end = body.find(b'"', start)
            if end == -1:
                break
            text_bytes -= end - start
            blobs += 1
            start = next_blob(body, end)
    return text_bytes, blobs


def marks_cache(body: bytes) -> bool:
    """Whether a request may ask for its prompt to be cached."""
    return _find(body, b'_control"', 0) != -1 and b'"cache_control"' in body


def _url(body: bytes, at: int) -> int:
    """Where the next base64 of a data URL begins; -1 where there is none."""
    found = _find(body, b";base64,", at)
    return -1 if found == -1 else found + len(b";base64,")


def _data(body: bytes, at: int) -> int:
    """The same of a member `data`."""
    found = _DATA.search(body, at)
    return -1 if found is None else found.end()


def _find(body: bytes, word: bytes, at: int) -> int:
    """`body.find`."""
    if len(body) >= LONG_BYTES:
        first = word[:1]
        for _ in range(HOPS):
            at = body.find(first, at)
            if at == -1 or body.startswith(word, at):
                return at
            at += 1
    return body.find(word, at)


def tokens(body: bytes) -> int:
    """About how many tokens a prompt has."""
    text_bytes, blobs = size(body)
    return text_bytes // BYTES_PER_TOKEN + 1 + blobs * BLOB_TOKENS
