"""How large a prompt is before anybody has counted its tokens."""

from __future__ import annotations

import re

BYTES_PER_TOKEN = 4
"""What a token is taken to be where no vendor has counted yet (OpenAI's rule of thumb for English)."""
BLOB_TOKENS = 1024
"""What an image or file inside a request is taken to be: base64 is not text, so its length says nothing."""

_URL = re.compile(rb";base64,")
_DATA = re.compile(rb'"data"\s*:\s*"(?=[A-Za-z0-9+/\\]{256})')
"""Compiled, since all of a long prompt is searched: `bytes.find` takes twice as long for words like these."""


def size(body: bytes) -> tuple[int, int]:
    """Bytes of a request without what is base64 in it, and how many such parts there are.

    Those stand in data URLs (OpenAI's images and files), or as `data` (its audio, all of Anthropic's).
    """
    text_bytes, blobs = len(body), 0
    for pattern in (_URL, _DATA):
        found = pattern.search(body)
        while found is not None:
            end = body.find(b'"', found.end())
            if end == -1:
                break
            text_bytes -= end - found.end()
            blobs += 1
            found = pattern.search(body, end)
    return text_bytes, blobs


def tokens(body: bytes) -> int:
    """About how many tokens a prompt has."""
    text_bytes, blobs = size(body)
    return text_bytes // BYTES_PER_TOKEN + 1 + blobs * BLOB_TOKENS
