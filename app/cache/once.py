"""Idempotency keys: a call that is sent again gets the answer of the first, and is neither asked nor billed twice."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from app.cache.entry import Entry, opened
from app.core import Call
from app.redis_pipe import RedisAway, RedisPipe, RedisRefused

KEPT_SECONDS = 86_400.0
"""A day, as at Stripe and in the drafts for the header."""
MARK_MS = 15_000
"""How long a running call's mark lives without a word from its replica: what a crash costs a client that asks again."""


class Once(Struct, frozen=True):
    """One idempotency key of one credential of one tenant, and the request that came with it."""

    mark: str
    answer: str
    request: str
    call_id: str

    @property
    def running(self) -> str:
        """What the mark says while this call runs."""
        return f"r {self.request} {self.call_id}"


class Kept(Struct, frozen=True, array_like=True):
    """An answer as it was sent: `status`, and whether `body` was a stream. None: it is too large to be kept."""

    status: int
    stream: bool
    error_code: str | None
    body: bytes | None
    content_type: bytes = b"application/json"


Claim = Literal["mine", "running", "other", "away"] | Entry | None
"""What became of a key: this call's, still running, another request's, Redis away; the entry of its answer, or None
where it is done and its answer was not kept."""
_kept = msgspec.msgpack.Decoder(Kept)


def once(call: Call, operation: str, tenant_id: str, key: str) -> Once:
    owner = hashlib.sha256(b"%b\0%b" % (call.key.id.encode(), key.encode())).hexdigest()[:40]
    route = f"{call.dialect.name} {operation} {call.relayed!r}"
    written = b"%b\0%b" % (route.encode(), call.body)
    mark = f"sc:{{{tenant_id}}}:_once:{owner}"
    return Once(mark, mark + ":answer", hashlib.sha256(written).hexdigest()[:40], call.event_id)


def kept(entry: Entry) -> Kept | None:
    try:
        return _kept.decode(entry.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


class Marks:
    """The marks in Redis."""

    def __init__(self, pipe: RedisPipe) -> None:
        here = Path(__file__)
        self._pipe = pipe
        self._claim = pipe.script(here.with_name("claim.lua").read_text())
        self._done = pipe.script(here.with_name("done.lua").read_text())

    async def claim(self, once: Once) -> Claim:
        try:
            state, *answer = await self._pipe.execute(
                "EVALSHA", self._claim, 2, once.mark, once.answer, once.request, once.call_id, MARK_MS
            )
        except (RedisAway, RedisRefused):
            return "away"
        if state == 3:
            return opened(once.answer, answer[0]) if answer and answer[0] is not None else None
        return {0: "running", 1: "mine", 2: "other"}[state]

    def done(self, once: Once) -> tuple[str | bytes | int, ...]:
        """The command that says so."""
        return "EVALSHA", self._done, 1, once.mark, once.request, once.call_id, int(KEPT_SECONDS * 1000)
