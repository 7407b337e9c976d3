"""What a call's headers say of answers from before."""

from __future__ import annotations

import re
from collections.abc import Mapping

from app.config.caching import REVISION
from app.core import Wishes
from app.errors import InvalidRequest

HEADERS = frozenset({b"cache-control", b"idempotency-key", b"x-kb-revision", b"x-cache-tags"})
KEY = re.compile(r"[\x21-\x7e]{1,255}")
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
MAX_TAGS = 32
_MAX_AGE = re.compile(r"max-age=(\d{1,9})")


def read(headers: Mapping[bytes, str]) -> Wishes | None:
    """None where nothing is said. Directives of Cache-Control that are not ours are a cache's on the way.

    Raises InvalidRequest.
    """
    key = headers.get(b"idempotency-key") or None
    revision = headers.get(b"x-kb-revision") or None
    written = headers.get(b"x-cache-tags")
    tags = tuple(dict.fromkeys(tag.strip() for tag in written.split(","))) if written else ()
    if key is not None and not KEY.fullmatch(key):
        raise InvalidRequest(f"Idempotency-Key must match {KEY.pattern}.", param="Idempotency-Key")
    if revision is not None and not REVISION.fullmatch(revision):
        raise InvalidRequest(f"X-KB-Revision must match {REVISION.pattern}.", param="X-KB-Revision")
    if len(tags) > MAX_TAGS or not all(TAG.fullmatch(tag) for tag in tags):
        raise InvalidRequest(f"X-Cache-Tags takes up to {MAX_TAGS} of {TAG.pattern}, by commas.", param="X-Cache-Tags")
    directives = {word.strip().lower() for word in headers.get(b"cache-control", "").split(",")}
    ages = [int(match[1]) for word in directives if (match := _MAX_AGE.fullmatch(word))]
    wishes = Wishes(
        fresh="no-cache" in directives,
        store="no-store" not in directives,
        max_age=float(min(ages)) if ages else None,
        kb_revision=revision,
        tags=tags,
        idempotency_key=key,
    )
    return None if wishes == Wishes() else wishes
