"""How large a prompt is before anybody has counted its tokens."""

from __future__ import annotations

import re

BYTES_PER_TOKEN = 4
"""What a token is taken to be where no vendor has counted yet (OpenAI's rule of thumb for English)."""
BLOB_TOKENS = 1024
"""What an image or file inside a request is taken to be: base64 is not text, so its length says nothing."""

_URL, _DATA = b";base64,", b'"data"'
_BASE64 = {_URL: re.compile(_URL), _DATA: re.compile(rb'"data"\s*:\s*"(?=[A-Za-z0-9+/\\]{256})')}
"""What stands before base64, by the word that it begins with."""
LONG_BYTES = 8_192
HOPS = 64
"""A word is looked for in a long text from one of its first bytes to the next: where those are rare, 100 KB take 1 us,
and `bytes.find` 50. After so many that were none, that is left to do the rest."""


def size(body: bytes) -> tuple[int, int]:
    """Bytes of a request without what is base64 in it, and how many such parts there are.

    Those stand in data URLs (OpenAI's images and files), or as `data` (its audio, all of Anthropic's).
    """
    text_bytes, blobs = len(body), 0
    for word, before in _BASE64.items():
        at = _find(body, word, 0)
        while at != -1:
            found = before.match(body, at)
            if found is None:
                at = _find(body, word, at + 1)
                continue
            end = body.find(b'"', found.end())
            if end == -1:
                break
            text_bytes -= end - found.end()
            blobs += 1
            at = _find(body, word, end)
    return text_bytes, blobs


def marks_cache(body: bytes) -> bool:
    """Whether a request may ask for its prompt to be cached."""
    return _find(body, b'_control"', 0) != -1 and b'"cache_control"' in body


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
