"""What lies in the cache, for people: read from Redis, some at a time, off the way of calls."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from msgspec import Struct

from app.cache.entry import Entry, opened
from app.redis_pipe import RedisPipe

_TENANT = re.compile(rb"sc:\{([^}]+)\}:_used")
PAGE = 256


class Held(Struct, frozen=True):
    """What is kept of a tenant. `bytes` is what counts towards its `cache.max_bytes`."""

    tenant: str
    entries: int
    bytes: int


class Shown(Struct, frozen=True):
    """One entry: its alias and digest, seconds since it was kept and until it ends, by which model, and the question
    where it is known. None as `model`: damaged.
    """

    alias: str
    digest: str
    bytes: int
    age_seconds: float
    ends_seconds: float
    provider: str | None
    model: str | None
    question: str
    tags: tuple[str, ...]


async def tenants(pipe: RedisPipe) -> AsyncIterator[str]:
    """Those of whom anything is kept."""
    for node in pipe.nodes:
        at = None
        while at != b"0":
            at, keys = await node.execute("SCAN", at or b"0", "MATCH", "sc:{*}:_used", "COUNT", PAGE)
            for key in keys:
                if match := _TENANT.fullmatch(key):
                    yield match[1].decode()


async def held(pipe: RedisPipe, tenant: str) -> Held:
    entries = await pipe.execute("ZCARD", f"sc:{{{tenant}}}:_used")
    size = await pipe.execute("HGET", f"sc:{{{tenant}}}:_bytes", "")
    return Held(tenant, entries, int(size or 0))


async def entries(pipe: RedisPipe, tenant: str, alias: str | None, limit: int, now: float) -> list[Shown]:
    """The ones used last. Answers of idempotency keys are not among them."""
    found: list[Shown] = []
    begins = f"sc:{{{tenant}}}:".encode()
    start = 0
    while len(found) < limit:
        keys = await pipe.execute("ZREVRANGE", f"sc:{{{tenant}}}:_used", start, start + PAGE - 1)
        if not keys:
            break
        start += PAGE
        for key in keys:
            named, _, digest = key.removeprefix(begins).decode().partition(":x:")
            if not digest or (alias is not None and named != alias):
                continue
            data, left_ms = await pipe.execute("GET", key), await pipe.execute("PTTL", key)
            if data is None:
                continue
            entry = opened(key.decode(), data)
            found.append(_shown(named, digest, data, entry, left_ms / 1000, now))
            if len(found) == limit:
                break
    return found


def _shown(alias: str, digest: str, data: bytes, entry: Entry | None, ends_seconds: float, now: float) -> Shown:
    if entry is None:
        return Shown(alias, digest, len(data), 0.0, ends_seconds, None, None, "", ())
    age_seconds = max(0.0, now - entry.kept_at)
    return Shown(
        alias, digest, len(data), age_seconds, ends_seconds, entry.provider, entry.model, entry.question,
        tuple(entry.tags),
    )  # fmt: skip


async def figures(pipe: RedisPipe, tenant: str, day: str) -> dict[str, dict[str, int]]:
    """A day's figures of questions that mean the same, by alias."""
    read = await pipe.execute("HGETALL", f"sc:{{{tenant}}}:_figures:{day}")
    found: dict[str, dict[str, int]] = {}
    for name, value in zip(read[::2], read[1::2], strict=True):
        alias, _, figure = name.decode().partition(":")
        found.setdefault(alias, {})[figure] = int(value)
    return found


async def worst(pipe: RedisPipe, tenant: str, limit: int) -> list[tuple[str, str, int, str]]:
    """Entries whose answers were found wrong: alias, digest, how often, and the question if it is still there."""
    read = await pipe.execute("ZREVRANGE", f"sc:{{{tenant}}}:_worst", 0, limit - 1, "WITHSCORES")
    found = []
    for key, score in zip(read[::2], read[1::2], strict=True):
        alias, _, digest = key.decode().removeprefix(f"sc:{{{tenant}}}:").partition(":x:")
        data = await pipe.execute("GET", key)
        entry = None if data is None else opened(key.decode(), data)
        found.append((alias, digest, int(float(score)), entry.question if entry else ""))
    return found
